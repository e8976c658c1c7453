"""One layer in many hands: threads, replicas, copies, and tools that change a layer under way."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval, parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import fogzo
from fogzo import QuantizedLayer
from toolbox import EVERY_QUANTIZER, PRESETS, draw, everything, fill, streams_put_back


class Looped(nn.Linear):
    """A user's layer, which reads its weight again and again and leaves notes on itself."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for _ in range(3):
            x = F.linear(x, self.weight, self.bias).tanh()
        self.last = x.detach()
        return x


def _net() -> nn.Sequential:
    """Every kind of forward: linear, convolutions both ways, a subclass that loops."""
    return fill(
        nn.Sequential(
            nn.Conv1d(4, 8, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose1d(8, 4, 2),
            nn.Flatten(),
            nn.Linear(36, 16),
            Looped(16, 16),
            nn.Linear(16, 4),
        )
    )


@pytest.fixture
def frequent_switches():
    """Threads take turns inside a forward, not only between them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


# --- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["fixed", "lsq per channel", "quest", "ternary"])
@pytest.mark.parametrize("activations", [None, fogzo.abs_max(8, granularity="token")])
def test_threads_that_share_a_model_compute_what_one_alone_does(
    preset, activations, frequent_switches
):
    model = fogzo.quantize_(_net(), PRESETS[preset](), everything, activations).eval()
    inputs = [draw(2, 4, 8, seed=seed) for seed in range(60)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]

    def evaluate(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(6) as pool:
        for output, alone in zip(pool.map(evaluate, inputs), expected, strict=True):
            assert torch.equal(output, alone)


@pytest.mark.parametrize("preset", ["fixed", "lsq per channel", "quest", "ternary"])
def test_gradients_are_right_while_another_thread_evaluates(preset, frequent_switches):
    model = fogzo.quantize_(_net(), PRESETS[preset](), everything)
    inputs = [draw(2, 4, 8, seed=seed) for seed in range(12)]
    params = list(model.parameters())

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x).square().sum(), params)

    expected = [gradients(x) for x in inputs]
    evaluating, trained = threading.Event(), threading.Event()

    def evaluate() -> int:
        count = 0
        with torch.no_grad():
            outputs = [model(x) for x in inputs]
            evaluating.set()
            while not (trained.is_set() and count):
                i = count % len(inputs)
                assert torch.equal(model(inputs[i]), outputs[i])
                count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(evaluate)
        assert evaluating.wait(60)
        try:
            for x, alone in zip(inputs, expected, strict=True):
                for ours, grad in zip(gradients(x), alone, strict=True):
                    assert torch.equal(ours, grad)
        finally:
            trained.set()
        assert reading.result() > 0


def test_no_forward_leaves_the_quantized_weight_behind():
    layer = fogzo.quantize_(fill(Looped(8, 8)), fogzo.lsq(2), everything)
    before = set(vars(layer))
    layer(draw(2, 8))
    assert set(vars(layer)) - before == {"_forward_dtype", "_weight_was_read", "calls", "last"}


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_forward_notes_on_its_layer_stays(compiled):
    torch.compiler.reset()
    layer = fogzo.quantize_(fill(Looped(8, 8)), fogzo.lsq(2), everything)
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    outputs = [forward(draw(2, 8)) for _ in range(2)]
    assert layer.calls == 2 and torch.equal(layer.last, outputs[-1])


# --- copies and replicas -----------------------------------------------------------------------


def _replica(module: nn.Module) -> nn.Module:
    """As `torch.nn.parallel.replicate` makes one, which needs several accelerators."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(copied, name, _replica(child))
    for name, param in module._parameters.items():
        setattr(copied, name, None if param is None else param * 1)
    return copied


@EVERY_QUANTIZER
def test_replicas_compute_with_their_own_weights_and_train_the_original(quantizer):
    model, x = fogzo.quantize_(_net(), quantizer, everything), draw(2, 4, 8)
    params = list(model.parameters())
    output = model(x)
    expected = torch.autograd.grad(output.sum(), params)
    replica = _replica(model)
    for _ in range(2):  # nothing of the first forward may be missing in the second
        assert torch.equal(replica(x), output)
    for ours, grad in zip(torch.autograd.grad(replica(x).sum(), params), expected, strict=True):
        assert torch.allclose(ours, grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for param in params:
            param.mul_(1.5)
    assert not torch.equal(model(x), output) and torch.equal(replica(x), output)


def test_a_model_that_ran_in_replicas_is_not_called_unused():
    model = fogzo.quantize_(_net(), fogzo.lsq(2), everything)
    _replica(model)(draw(2, 4, 8))
    assert all(m.forward_ran for m in model.modules() if isinstance(m, QuantizedLayer))


@EVERY_QUANTIZER
def test_copies_compute_with_their_own_weights(quantizer):
    model, x = fogzo.quantize_(_net(), quantizer, everything), draw(2, 4, 8)
    before = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.5)
    assert torch.equal(twin(x), before) and not torch.equal(model(x), before)


# --- wrappers of a layer's forward -------------------------------------------------------------


def _wrapped_by_hand(model: nn.Module) -> None:
    for layer in (model[0], model[4]):
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: forward(*args)


def _hooked_by_accelerate(model: nn.Module) -> None:
    for layer in (model[0], model[4]):
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))


WRAPPERS = {
    "by hand": _wrapped_by_hand,
    "accelerate's hooks": _hooked_by_accelerate,
    "accelerate's dispatch": lambda model: accelerate.dispatch_model(
        model, {"": "cpu"}, main_device="cpu", force_hooks=True
    ),
}
EVERY_WRAPPER = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())


@pytest.mark.parametrize("wrap", [_wrapped_by_hand, _hooked_by_accelerate])
def test_a_forward_put_on_the_layer_before_is_refused(wrap):
    model = _net()
    wrap(model)
    with pytest.raises(ValueError, match=r"'0' has a forward.*remove_hook_from_module.*dispatch"):
        fogzo.quantize_(model, fogzo.lsq(2), everything)
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())


def test_offloaded_weights_are_refused_before_and_not_baked_in_after():
    model = accelerate.cpu_offload(_net(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"'0' has a forward.*remove_hook_from_module"):
        fogzo.quantize_(model, fogzo.lsq(2), everything)
    model = fogzo.quantize_(_net(), fogzo.lsq(2), everything).eval()
    x = draw(2, 4, 8)
    before = model(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match=r"'0' is on the meta device.*remove_hook_from_module"):
        fogzo.dequantize_(model)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(fogzo.dequantize_(model)(x), before)


def test_the_advice_for_hooked_layers_works():
    model, x = _net(), draw(2, 4, 8)
    _hooked_by_accelerate(model)
    remove_hook_from_module(model, recurse=True)
    fogzo.quantize_(model, fogzo.lsq(2), everything)
    expected = fogzo.quantize_(_net(), fogzo.lsq(2), everything)(x)
    assert torch.equal(model(x), expected)


@EVERY_WRAPPER
def test_a_forward_wrapped_after_quantizes_and_outlives_it(wrap):
    model, x = fogzo.quantize_(_net(), fogzo.lsq(2), everything), draw(2, 4, 8)
    before = model(x)
    wrap(model)
    assert torch.equal(model(x), before)
    assert torch.equal(copy.deepcopy(model)(x), before)
    assert torch.equal(fogzo.dequantize_(model)(x), before)


def test_a_model_can_be_quantized_again_once_its_hooks_are_off():
    model, x = fogzo.quantize_(_net(), fogzo.ternary(), everything), draw(2, 4, 8)
    _hooked_by_accelerate(model)
    remove_hook_from_module(fogzo.dequantize_(model), recurse=True)
    plain = model(x)
    fogzo.quantize_(model, fogzo.lsq(2), everything)
    assert not torch.equal(model(x), plain)


@pytest.mark.parametrize("activations", [None, fogzo.abs_max(8)])
def test_a_symbolic_trace_of_a_quantized_model_says_to_trace_before(activations):
    plain, x = fill(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))), draw(2, 8)
    model = fogzo.quantize_(copy.deepcopy(plain), fogzo.lsq(2), everything, activations)
    with pytest.raises(ValueError, match=r"cannot follow '0'.*quantize_\(traced.*export\(model"):
        torch.fx.symbolic_trace(model)
    traced = fogzo.quantize_(torch.fx.symbolic_trace(plain), fogzo.lsq(2), everything, activations)
    assert torch.equal(traced(x), model(x))
    exported = torch.export.export(model.eval(), (x,), strict=False).module()
    assert torch.allclose(exported(x), model(x), atol=1e-6)


# --- parametrizations --------------------------------------------------------------------------


def _old_weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(layer)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


# How each is put on a layer, and what takes it off.
PARAMETRIZATIONS = {
    "weight_norm": (parametrizations.weight_norm, r"remove_parametrizations\(layer, \"weight\"\)"),
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations"),
    "of one's own": (
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Doubled()),
        "remove_parametrizations",
    ),
    "old weight_norm": (_old_weight_norm, r"remove_weight_norm\(layer\)"),
    "old spectral_norm": (torch.nn.utils.spectral_norm, r"remove_spectral_norm\(layer\)"),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        r"prune\.remove\(layer, \"weight\"\)",
    ),
}
EVERY_PARAMETRIZATION = pytest.mark.parametrize(
    "put_on, way_out", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS.keys()
)


@EVERY_PARAMETRIZATION
@pytest.mark.parametrize(
    "use",
    [lambda m: m(draw(2, 4, 8)), fogzo.quantized_weights, fogzo.dequantize_],
    ids=["forward", "quantized_weights", "dequantize_"],
)
def test_a_parametrization_after_quantize_is_refused(put_on, way_out, use):
    model = fogzo.quantize_(_net(), fogzo.lsq(2), everything)
    put_on(model[4])
    with pytest.raises(ValueError, match=f"'4' after fogzo.quantize_.*{way_out}"):
        use(model)
    assert isinstance(model[0], QuantizedLayer)


@EVERY_PARAMETRIZATION
def test_a_parametrization_before_quantize_is_refused(put_on, way_out):
    model = _net()
    put_on(model[4])
    with pytest.raises(ValueError, match=f"'4' is computed by.*leave it out.*{way_out}.*a file"):
        fogzo.quantize_(model, fogzo.lsq(2), everything)
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())


def test_a_layer_whose_parametrization_was_removed_is_quantized_as_before():
    model, x = fogzo.quantize_(_net(), fogzo.lsq(2), everything), draw(2, 4, 8)
    before = model(x)
    parametrizations.weight_norm(model[4])
    nn.utils.parametrize.remove_parametrizations(model[4], "weight")
    assert torch.allclose(model(x), before, atol=1e-5)


def test_another_parameter_may_be_parametrized():
    layer = fogzo.quantize_(fill(nn.Linear(8, 8)), fogzo.lsq(2), everything)
    x = draw(2, 8)
    before = layer(x)
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    assert torch.allclose(layer(x), before + layer.bias / 2)


@pytest.mark.parametrize("activations", ["drop", "keep"])
def test_a_parametrization_that_baking_in_would_lose_is_refused(activations):
    model = fogzo.quantize_(_net(), fogzo.lsq(2), everything, fogzo.abs_max(8)).eval()
    nn.utils.parametrize.register_parametrization(model[4], "bias", Doubled())
    classes, before = [type(module) for module in model], model(draw(2, 4, 8))
    with pytest.raises(ValueError, match=r"'bias' of '4'.*remove_parametrizations\(layer, \"bias"):
        fogzo.dequantize_(model, activations)
    assert [type(module) for module in model] == classes
    nn.utils.parametrize.remove_parametrizations(model[4], "bias")
    fogzo.dequantize_(model, activations)
    if activations == "keep":
        assert torch.equal(model(draw(2, 4, 8)), before)


def test_a_parametrization_from_before_quantize_outlives_it():
    layer, x = fill(nn.Linear(8, 8)), draw(2, 8)
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    before = fogzo.quantize_(layer, fogzo.lsq(2), everything)(x)
    assert torch.equal(fogzo.dequantize_(layer)(x), before)


# --- weights that are replaced -----------------------------------------------------------------


def _fused_convolution() -> None:
    conv, norm = nn.Conv2d(4, 4, 3).eval(), nn.BatchNorm2d(4).eval()
    with torch.no_grad():
        norm.running_var.copy_(torch.tensor([0.1, 1.0, 3.0, 9.0]))
    fuse_conv_bn_eval(fogzo.quantize_(conv, fogzo.lsq(2), everything), norm)


def _fused_linear() -> None:
    linear = fogzo.quantize_(nn.Linear(4, 4), fogzo.ternary(), everything).eval()
    with torch.no_grad():
        norm = nn.BatchNorm1d(4).eval()
        norm.weight.fill_(3.0)
    fuse_linear_bn_eval(linear, norm)


def _assigned() -> None:
    layer = fogzo.quantize_(nn.Linear(4, 4), fogzo.lsq(2), everything)
    layer.weight = nn.Parameter(torch.randn(4, 4))


def _tied() -> None:
    model = fogzo.quantize_(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), fogzo.lsq(2), everything
    )
    model[1].weight = model[0].weight


@pytest.mark.parametrize("replace", [_fused_convolution, _fused_linear, _assigned, _tied])
def test_another_weight_in_a_quantized_layer_is_refused(replace):
    with pytest.raises(ValueError, match=r"cannot be replaced.*fuse_conv_bn_eval.*dequantize_"):
        replace()


def test_a_baked_convolution_fuses():
    conv, norm, x = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4).eval(), draw(1, 4, 6, 6)
    fogzo.dequantize_(fogzo.quantize_(fill(conv).eval(), fogzo.lsq(2), everything))
    assert torch.allclose(fuse_conv_bn_eval(conv, norm)(x), norm(conv(x)), atol=1e-5)


@EVERY_QUANTIZER
def test_a_checkpoint_may_be_assigned(quantizer):
    model, x = fogzo.quantize_(_net(), quantizer, everything), draw(2, 4, 8)
    other = fogzo.quantize_(nn.Sequential(*_net()), quantizer, everything)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(1.3)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert torch.equal(model(x), other(x))
    with pytest.raises(ValueError, match="cannot be replaced"):
        model[4].weight = nn.Parameter(torch.zeros(16, 36))


def test_resized_embeddings_with_a_step_for_each_row_say_so():
    config = GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    fogzo.quantize_(model, fogzo.lsq(2, granularity="channel"), everything)
    model.resize_token_embeddings(20, mean_resizing=False)
    for use in (lambda: fogzo.dequantize_(model), lambda: model(torch.tensor([[1, 19]]))):
        with pytest.raises(ValueError, match=r"wte' has 20 groups.*16 step.*resize_token_embedd"):
            use()


# --- weights that are initialised anew ---------------------------------------------------------

MEASURED = {"fixed": fogzo.fixed(2), "lsq": fogzo.lsq(3, granularity="channel")}
EVERY_MEASURED = pytest.mark.parametrize("quantizer", MEASURED.values(), ids=MEASURED.keys())


def _initialise(model: nn.Module, std: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):
            nn.init.normal_(module.weight, std=std)


@EVERY_MEASURED
@pytest.mark.parametrize("std", [0.02, 3.0])
def test_weights_initialised_after_quantize_warn_once(quantizer, std):
    model, x = fogzo.quantize_(_net(), quantizer, everything), draw(2, 4, 8)
    _initialise(model, std)
    with pytest.warns(
        UserWarning, match=r"initialise them before.*measure_step_sizes_\(model\)"
    ) as said:
        model(x)
    assert len(said) == 1 and "'0'" in str(said[0].message)  # for all layers together
    model(x)


def _data_drawn(weight: nn.Parameter) -> None:
    weight.data.normal_(0, 3.0)


def _data_replaced(weight: nn.Parameter) -> None:
    weight.data = 100 * weight.data


@EVERY_MEASURED
@pytest.mark.parametrize("edit", [_data_drawn, _data_replaced])
def test_weights_edited_by_way_of_data_warn_too(quantizer, edit):
    model, x = fogzo.quantize_(_net(), quantizer, everything), draw(2, 4, 8)
    with streams_put_back(0):
        edit(model[0].weight)
    with torch.no_grad():
        model(x)  # not yet a training pass
    with pytest.warns(UserWarning, match=r"weights of '0' are not of the size") as said:
        model(x)
    assert len(said) == 1
    model(x)


@EVERY_MEASURED
def test_weights_lent_where_those_measured_lay_are_not_taken_for_them(quantizer):
    # FSDP drops the parameter and lends gathered ones, of which one may get its address.
    model, x = fogzo.quantize_(_net(), quantizer, everything), draw(2, 4, 8)
    layer = model[0]
    address, values = id(layer.weight), 100 * layer.weight.detach()
    kept = []
    del layer._parameters["weight"]
    while not kept or id(kept[-1]) != address:
        kept.append(nn.Parameter(values))
        assert len(kept) < 10_000
    layer._parameters["weight"] = kept[-1]
    model(x)


@EVERY_MEASURED
def test_a_loader_that_edits_data_brings_its_own_steps(quantizer):
    model, x = fogzo.quantize_(_net(), quantizer, everything), draw(2, 4, 8)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, fogzo.QuantizedLayer)):
            layer.weight.data.copy_(100 * layer.weight)
            layer.weight_step.data.copy_(10 * layer.weight_step)
    model(x)


READERS = {
    "FakeTensor": lambda model, x: _within(FakeTensorMode(allow_non_fake_inputs=True), model, x),
    "a mode that counts": lambda model, x: _within(FlopCounterMode(display=False), model, x),
    "vmap": lambda model, x: torch.func.vmap(lambda row: model(row[None])[0])(x),
    "compile": lambda model, x: torch.compile(model, backend="eager", fullgraph=True)(x),
}


def _within(mode, model: nn.Module, x: Tensor) -> Tensor:
    with mode:
        return model(x)


@pytest.mark.parametrize("run", READERS.values(), ids=READERS.keys())
def test_no_values_are_read_where_there_may_be_none(run):
    torch.compiler.reset()
    model = fogzo.quantize_(fill(nn.Sequential(nn.Linear(8, 8))), fogzo.lsq(2), everything)
    model[0].weight.data.mul_(100)
    run(model, draw(2, 8))


@EVERY_MEASURED
def test_the_advice_for_weights_initialised_anew_works(quantizer):
    model, x = fogzo.quantize_(_net(), quantizer, everything), draw(2, 4, 8)
    _initialise(model, 3.0)
    fogzo.layers.attach.measure_step_sizes_(model)
    fresh = _net()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "step" not in k})
    assert torch.equal(model(x), fogzo.quantize_(fresh, quantizer, everything)(x))


@EVERY_MEASURED
def test_reset_parameters_measures_the_steps(quantizer):
    layer = fogzo.quantize_(nn.Linear(64, 8), quantizer, everything)
    with torch.no_grad():
        layer.weight.mul_(100)
        layer.weight_step.mul_(100)
    step = layer.weight_step
    layer.reset_parameters()
    assert layer.weight_step is step
    assert torch.equal(step, quantizer.initial_step_size(layer.weight))
    layer(draw(2, 64))


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


@EVERY_MEASURED
@pytest.mark.parametrize("moves", [False, True], ids=["stays", "moves"])
@pytest.mark.parametrize("how", ["measured", "loaded", "initialised"])
def test_layers_that_share_a_weight_share_the_step_size_in_use(quantizer, how, moves):
    model = fogzo.quantize_(fill(Tied()), quantizer, everything)
    if moves:
        model.double().bfloat16().float()
    if how == "loaded":
        own = torch.full_like(model.a.weight_step, 1e-3)
        model.a.load_state_dict({"weight_step": own}, strict=False)
    else:
        with torch.no_grad():
            model.a.weight.mul_(0.01)
        model.a.measure_step_size_() if how == "measured" else model.a.reset_parameters()
    assert torch.equal(model.a.step_size(), model.b.step_size())
    assert torch.equal(model.a.quantized_weight(), model.b.quantized_weight())


@EVERY_QUANTIZER
def test_training_copies_and_checkpoints_are_no_new_initialisation(quantizer):
    model, x = fogzo.quantize_(_net(), quantizer, everything), draw(2, 4, 8)
    copy.deepcopy(model)(x)
    copy.deepcopy(model).double()(x.double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    other = fogzo.quantize_(_net(), quantizer, everything)
    other.load_state_dict({k: 9 * v for k, v in model.state_dict().items()})
    other(x)
    float_weights = {k: 9 * v for k, v in _net().state_dict().items()}
    other.load_state_dict(float_weights)
    other(x)


# --- TorchScript -------------------------------------------------------------------------------


def test_scripting_says_to_bake_in_first():
    model = fogzo.quantize_(fill(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))), fogzo.lsq(2))
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(ValueError, match=r"torch\.jit\.script\(fogzo\.dequantize_\(model\)\)"),
    ):
        torch.jit.script(model)


def test_a_buffer_that_changed_after_a_move_is_moved_as_it_is():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    fogzo.quantize_(model, fogzo.fixed(2), lambda *_: True)
    kept = model[0].weight_step
    model.double()
    assert model[0].weight_step is model[1].weight_step
    kept.mul_(3)
    model[0].weight_step = model[1].weight_step = kept
    model.double()
    assert model[0].weight_step is model[1].weight_step
    assert model[0].weight_step.item() == kept.item()
