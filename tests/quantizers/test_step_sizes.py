"""Learned step sizes stay positive, whatever an optimizer does, and else are LSQ's."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

import fogzo
from fogzo.quantizers.step_sizes import effective_step_size, knee_of, positive_step_size
from toolbox import everything

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _quantized(quantizer=None, seed=0, inputs=None):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    quantizer = quantizer or fogzo.lsq(2, granularity="channel")
    fogzo.quantize_(model, quantizer, everything, activations=inputs)
    if inputs is not None:
        with torch.no_grad(), fogzo.calibrate_(model):
            model(torch.randn(32, 8))
    return model


def _push(model, steps, lr=0.1):
    """Drive all raw steps of a model down, as an optimizer with a large learning rate would."""
    raw = [p for name, p in model.named_parameters() if name.endswith("_step")]
    assert raw
    optimizer = torch.optim.Adam(raw, lr)
    for _ in range(steps):
        for step in raw:
            step.grad = torch.ones_like(step)
        optimizer.step()
    assert all((step < 0).all() for step in raw)


# The map


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_the_knee_up_a_step_is_itself(dtype):
    knee = torch.tensor([[0.02], [0.5]], dtype=dtype)
    for factor in (1.0, 1.25, 2.0, 100.0):
        step = knee * factor
        assert torch.equal(positive_step_size(step, knee), step)
        with torch.device("cpu"):  # and by the arithmetic that devices and compilers run
            batched = torch.func.vmap(positive_step_size)(step[None], knee[None])[0]
        assert torch.equal(batched, step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_below_the_knee_it_falls_smoothly_and_stays_positive(dtype):
    knee = torch.tensor(0.02, dtype=dtype)
    raw = torch.linspace(-50, 2, 2000, dtype=torch.float64).to(dtype) * knee
    found = positive_step_size(raw, knee)
    assert (found > 0).all() and (found.diff() >= 0).all()
    expected = torch.where(raw >= knee, raw, knee / (2 - raw / knee))
    torch.testing.assert_close(found, expected)
    assert (found >= knee / (1 + (knee - raw).clamp(min=0) / knee) * 0.98).all()


def test_the_map_has_no_corner_at_the_knee():
    knee = torch.tensor(0.02, dtype=torch.float64)
    raw = knee + torch.tensor([-1e-6, 0.0, 1e-6], dtype=torch.float64) * knee
    below, above = positive_step_size(raw, knee).diff() / raw.diff()
    assert below.item() == pytest.approx(1, abs=1e-5) and above.item() == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
@pytest.mark.parametrize(
    "function",
    [
        partial(positive_step_size, knee=torch.tensor([[0.1]] * 4)),
        partial(effective_step_size, dtype=None),
        partial(effective_step_size, dtype=torch.float16),
    ],
)
def test_the_gradient_passes_straight_through_in_every_mode(function):
    step = torch.tensor([[0.3], [0.1], [0.01], [-2.0]], requires_grad=True)
    weights = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    (function(step) * weights).sum().backward()
    assert torch.equal(step.grad, weights)
    plain = step.detach()
    value, tangent = torch.func.jvp(function, (plain,), (weights,))
    assert torch.equal(tangent, weights) and torch.equal(value, function(plain))
    gradient = torch.func.grad(lambda step: (function(step) * weights).sum())(plain)
    assert torch.equal(gradient, weights)
    batch = torch.stack([plain, 2 * plain])
    assert torch.equal(torch.func.vmap(function)(batch)[1], function(2 * plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_float16_holds_steps_of_wider_dtypes(dtype):
    step = torch.tensor([[0.0], [1e-7], [0.3], [65504.0]], dtype=torch.float16)
    found = effective_step_size(step, dtype)
    assert found.dtype == torch.float16 and found.isfinite().all() and (found > 0).all()
    torch.testing.assert_close(found[1:], step[1:], rtol=2**-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_steps_may_be_powers_of_two(dtype):
    step = torch.tensor([0.2, 0.3, 0.4, 3.5, 0.0, torch.finfo(dtype).max], dtype=dtype)
    found = effective_step_size(step, torch.float8_e8m0fnu)
    assert found[:4].tolist() == [0.25, 0.25, 0.5, 4.0]
    assert found.isfinite().all() and (found > 0).all()
    assert torch.equal(found.to(torch.float8_e8m0fnu).to(dtype), found)


def test_compiled_it_is_the_same():
    knee = torch.full((3, 1), 0.1)
    step = torch.tensor([[0.3], [0.1], [-0.2]], requires_grad=True)
    compiled = torch.compile(positive_step_size, backend="eager", fullgraph=True)
    found = compiled(step, knee)
    assert torch.equal(found, positive_step_size(step, knee))
    found.sum().backward()
    assert torch.equal(step.grad, torch.ones(3, 1))


# In a layer


@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
@pytest.mark.parametrize("scale_dtype", [None, torch.float16])
def test_no_optimizer_carries_a_step_through_zero(granularity, scale_dtype):
    quantizer = fogzo.lsq(2, granularity=granularity, scale_dtype=scale_dtype)
    model = _quantized(quantizer, inputs=fogzo.lsq(2))
    first = [w.step_size() for w in fogzo.quantized_weights(model)]
    _push(model, 60)
    for weight, was in zip(fogzo.quantized_weights(model), first, strict=True):
        assert (weight.step_size() > was / 1000).all()
        assert (weight.step_size() < was / 5).all()
    x = torch.randn(16, 8)
    assert model(x).isfinite().all() and model(x).any()


def test_all_that_reads_a_step_reads_the_one_in_use():
    model = _quantized()
    _push(model, 30)
    layer = model[0]
    quantized, step = layer.quantized_weight().detach(), layer.step_size()
    levels = layer.quantizer.grid.level(layer.codes().float())
    assert torch.equal(levels * step, quantized)
    x = torch.randn(16, 8)
    before = model(x).detach()
    fogzo.dequantize_(model)
    assert torch.equal(model[0].weight, quantized) and torch.equal(model(x), before)
    assert not any("step" in name for name in model.state_dict())


def test_in_the_usual_range_it_is_lsq_to_the_bit():
    model = _quantized()
    layer = model[0]
    with torch.no_grad():
        layer.weight_step.mul_(torch.linspace(0.5, 3, 16)[:, None])
    plain = layer.quantizer(layer.weight, layer.weight_step)
    assert torch.equal(layer.quantized_weight(), plain)
    gradients = [
        torch.autograd.grad(w.square().sum(), layer.weight_step)[0]
        for w in (plain, layer.quantized_weight())
    ]
    assert torch.equal(*gradients)


def test_a_step_that_strayed_comes_back_as_fast_as_it_went():
    model = _quantized()
    start = model[0].weight_step.detach().clone()
    _push(model, 30, lr=start.min().item() / 4)
    optimizer = torch.optim.SGD([model[0].weight_step], 1.0)
    model[0].weight_step.grad = model[0].weight_step.detach() - start
    optimizer.step()
    torch.testing.assert_close(model[0].step_size(), start)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_in_which_steps_cross_zero_is_none_the_worse(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                          nn.Linear(64, 8))  # fmt: skip
    x = torch.randn(256, 16)
    y = copy.deepcopy(model)(x).argmax(1)
    fogzo.quantize_(model, fogzo.lsq(4, granularity="channel"), everything)
    layers = [model[0], model[2], model[4]]
    start = [2 * layer.weight_step_knee for layer in layers]
    lr = 1e-2 if optimizer is torch.optim.AdamW else 3.0
    trained = optimizer(model.parameters(), lr)
    crossed, smallest, losses = False, 1.0, []
    for _ in range(80):
        loss = cross_entropy(model(x), y)
        trained.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trained.step()
        losses.append(loss.item())
        for layer, step in zip(layers, start, strict=True):
            crossed |= bool((layer.weight_step < 0).any())
            smallest = min(smallest, (layer.step_size() / step).min().item())
    assert smallest > 1e-3
    assert sum(losses[-5:]) / 5 < 0.15
    if optimizer is torch.optim.AdamW:
        assert crossed  # else this shows nothing


# Checkpoints and copies


def _outputs(model):
    return model(torch.linspace(-1, 1, 80).reshape(10, 8)).detach()


def test_a_state_dict_decides_the_steps_in_use():
    model = _quantized(inputs=fogzo.lsq(2))
    _push(model, 20)
    twin = _quantized(seed=1, inputs=fogzo.lsq(2))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(_outputs(twin), _outputs(model))


def _without_knees(state):
    return {name: value for name, value in state.items() if not name.endswith("_knee")}


def test_a_checkpoint_older_than_knees_keeps_its_outputs():
    model = _quantized(inputs=fogzo.lsq(2))
    with torch.no_grad():
        for name, step in model.named_parameters():
            if name.endswith("_step"):
                step.mul_(0.6)
    twin = _quantized(seed=1, inputs=fogzo.lsq(2))
    twin.load_state_dict(_without_knees(model.state_dict()))
    assert torch.equal(_outputs(twin), _outputs(model))
    assert torch.equal(twin[0].weight_step_knee, model[0].weight_step / 2)


def test_a_checkpoint_older_than_knees_whose_steps_have_crossed_zero_can_be_used():
    model = _quantized(inputs=fogzo.lsq(2))
    with torch.no_grad():
        model[0].weight_step[3] = -0.01
        model[0].input_step.fill_(-0.01)
    twin = _quantized(seed=1, inputs=fogzo.lsq(2))
    own = twin[0].weight_step_knee.clone()
    twin.load_state_dict(_without_knees(model.state_dict()))
    assert twin[0].weight_step_knee[3] == own[3]
    assert (twin[0].step_size() > 1e-3).all() and twin[0].input_step_knee > 1e-3
    assert _outputs(twin).isfinite().all()


def test_a_float_checkpoint_sets_steps_and_knees():
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():
        plain[0].weight.mul_(100)
    model = _quantized(inputs=fogzo.lsq(2))
    _push(model, 20)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model[0].step_size(), model[0].quantizer.initial_step_size(plain[0].weight))
    assert torch.equal(model[0].weight_step_knee, knee_of(model[0].weight_step))


def test_a_given_step_is_not_asked_to_fit_a_checkpoint_of_lower_precision():
    model = _quantized(fogzo.fixed(2, step_size=1e-5))
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).half()
    model.load_state_dict(plain.state_dict())
    assert model[0].step_size().item() == pytest.approx(1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of sizes
def test_tracing_a_model_does_not_record_what_its_steps_were():
    model = _quantized().eval()
    x = torch.randn(4, 8)
    traced = torch.jit.trace(model, x, check_trace=False)
    assert torch.equal(traced(x), model(x))
    _push(model, 30)
    assert torch.equal(traced(x), model(x))


def test_steps_of_ones_own_are_loaded():
    model = _quantized()
    own = torch.full((16, 1), 1e-3)
    model.load_state_dict({"0.weight_step": own}, strict=False)
    assert torch.equal(model[0].step_size(), own)


def test_loading_steps_of_another_granularity_says_so():
    model = _quantized()
    with pytest.raises(RuntimeError, match="size mismatch for weight_step"):
        model[0].load_state_dict({"weight_step": torch.ones(1, 1)}, strict=False)


def test_averages_of_copies_are_averages_of_parameters():
    model = _quantized()
    average = AveragedModel(model)
    _push(model, 30)
    average.update_parameters(model)
    average.update_parameters(model)
    assert (average.module[0].weight_step < 0).all()
    assert (average.module[0].step_size() > 0).all()
    assert torch.equal(average.module[0].weight_step_knee, model[0].weight_step_knee)
    assert _outputs(average).isfinite().all()


def test_calibrating_again_moves_the_knee_of_an_input():
    model = _quantized(inputs=fogzo.lsq(2))
    _push(model, 20)
    with torch.no_grad(), fogzo.calibrate_(model):
        model(100 * torch.randn(32, 8))
    assert model[0].input_step > 10
    assert torch.equal(model[0].input_step_knee, model[0].input_step / 2)


@pytest.mark.parametrize("quantizer", [fogzo.fixed(2), fogzo.ternary(), fogzo.quest(2)])
def test_steps_that_are_not_learned_have_no_knee(quantizer):
    model = _quantized(quantizer)
    assert not any(name.endswith("knee") for name in model.state_dict())


def test_tied_weights_share_their_knee():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

    model = fogzo.quantize_(Twins(), fogzo.lsq(2), everything)
    assert torch.equal(model.first.weight_step_knee, model.second.weight_step_knee)
    _push(model, 20)
    assert torch.equal(model.first.step_size(), model.second.step_size())
