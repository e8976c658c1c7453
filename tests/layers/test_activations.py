"""Activations: a layer's own forward sees exactly the quantized input, by a step measured once."""

import copy
import logging
import math
import pickle
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import fogzo
from fogzo.layers import quantized_input
from fogzo.quantizers import TERNARY, Hadamard, Quantizer, learned_scale, uniform
from toolbox import ESTIMATORS, WAYS, draw, every, everything, fill, pairwise

KEPT = {"learned": fogzo.lsq(2), "fixed": fogzo.fixed(2)}
EVERY_KEPT = every("activations", KEPT)


def _mlp(activations=None, weights=None) -> nn.Sequential:
    """The second layer's input follows a ReLU."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3))
    return fogzo.quantize_(fill(model), weights or fogzo.lsq(2), activations=activations)


def _measured(activations, weights=None) -> nn.Sequential:
    model = _mlp(activations, weights)
    with torch.no_grad(), fogzo.calibrate_(model):
        model(draw(32, 8, seed=5))
    return model


def _layer(layer: nn.Module, activations) -> nn.Module:
    """One layer whose weights no quantizer changes noticeably, so that inputs alone matter."""
    return fogzo.quantize_(fill(layer), fogzo.fixed(8), everything, activations)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- values ------------------------------------------------------------------------------------


def _per_tensor(x: Tensor) -> Tensor:
    step = 2 * x.abs().mean() / math.sqrt(1.5)
    return ((x / step).floor() + 0.5).clamp(-1.5, 1.5) * step


def _per_token(x: Tensor, dim: int) -> Tensor:
    step = x.abs().amax(dim, keepdim=True) / 7
    return (x / step).round().clamp(-8, 7) * step


LAYERS = {
    "linear": (lambda: nn.Linear(8, 4), (5, 8), -1),
    "linear, positions": (lambda: nn.Linear(8, 4), (2, 5, 8), -1),
    "linear, one token": (lambda: nn.Linear(8, 4), (8,), -1),
    "transformers conv1d": (lambda: Conv1D(4, 8), (2, 5, 8), -1),
    "conv1d": (lambda: nn.Conv1d(8, 4, 3), (2, 8, 5), 1),
    "conv2d": (lambda: nn.Conv2d(8, 4, 3, padding=1), (2, 8, 4, 5), 1),
    "conv2d, grouped": (lambda: nn.Conv2d(8, 4, 3, groups=2), (2, 8, 4, 5), 1),
    "conv2d, without batch": (lambda: nn.Conv2d(8, 4, 3), (8, 4, 5), 0),
    "conv3d": (lambda: nn.Conv3d(8, 4, 2), (2, 8, 3, 3, 3), 1),
    "transposed": (lambda: nn.ConvTranspose2d(8, 4, 3, groups=2), (2, 8, 4, 5), 1),
}
EVERY_LAYER = pytest.mark.parametrize("make, shape, dim", LAYERS.values(), ids=LAYERS.keys())


@EVERY_LAYER
def test_one_step_for_the_whole_input(make, shape, dim):
    x, layer = draw(*shape), _layer(make(), fogzo.lsq(2))
    seen = layer(x)
    assert torch.allclose(layer.input_step, 2 * x.abs().mean() / math.sqrt(1.5))
    plain = fogzo.dequantize_(copy.deepcopy(layer))
    assert torch.allclose(seen, plain(_per_tensor(x)), atol=1e-5)


@EVERY_LAYER
@pytest.mark.parametrize("word", ["token", "channel"])
def test_one_step_a_token(make, shape, dim, word):
    x, layer = draw(*shape), _layer(make(), fogzo.abs_max(4, granularity=word))
    plain = fogzo.dequantize_(copy.deepcopy(layer))
    assert torch.allclose(layer(x), plain(_per_token(x, dim)), atol=1e-5)


@EVERY_LAYER
def test_one_step_a_group_of_consecutive_features(make, shape, dim):
    x, layer = draw(*shape), _layer(make(), fogzo.abs_max(4, granularity=4))
    plain = fogzo.dequantize_(copy.deepcopy(layer))
    expected = torch.cat([_per_token(half, dim) for half in x.split(4, dim)], dim)
    assert torch.allclose(layer(x), plain(expected), atol=1e-5)


@pytest.mark.parametrize("activations", [fogzo.lsq(4), fogzo.abs_max(8), fogzo.fixed(2)])
def test_channels_stay_last(activations):
    x, layer = draw(2, 8, 4, 5), _layer(nn.Conv2d(8, 4, 3), activations)
    expected, last = layer(x), x.to(memory_format=torch.channels_last)
    seen = layer.with_quantized_input((last,))[0]
    assert seen.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen, layer.with_quantized_input((x,))[0])
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(layer(last), expected, atol=1e-5)


def test_eight_bits_of_bitnet():
    x = draw(6, 32)
    scale = 127 / x.abs().amax(-1, keepdim=True)
    expected = (x * scale).round().clamp(-128, 127) / scale
    assert torch.allclose(fogzo.abs_max().quantize_input(x), expected, atol=1e-6)


@pytest.mark.parametrize("shape, dim", [((6, 8), -1), ((2, 8, 3, 3), 1)])
def test_features_are_rotated_and_rotated_back(shape, dim):
    x = draw(*shape)
    tokens = x.movedim(dim, -1).reshape(-1, 8)
    expected = fogzo.quest(2)(tokens).reshape(x.movedim(dim, -1).shape).movedim(-1, dim)
    assert torch.equal(fogzo.quest(2).quantize_input(x, feature_dim=dim), expected)


def test_the_gradient_of_a_learned_step_is_lsqs():
    x, layer = draw(5, 8).requires_grad_(), _layer(nn.Linear(8, 4), fogzo.lsq(3))
    with torch.no_grad(), fogzo.calibrate_(layer):
        layer(x * 0.5)  # so that some values lie outside
    layer(x).square().sum().backward()
    a = layer.input_step.detach()
    inside = (x / a >= -4) & (x / a <= 3)
    assert not inside.all()
    rounded = (x / a).round().clamp(-4, 3)
    plain, seen = fogzo.dequantize_(copy.deepcopy(layer)), (rounded * a).detach().requires_grad_()
    (grad,) = torch.autograd.grad(plain(seen).square().sum(), seen)
    assert torch.allclose(x.grad, grad * inside, rtol=1e-4, atol=1e-5)
    expected = (grad * (rounded - x / a * inside)).sum() / math.sqrt(8 * 3)
    assert layer.input_step.grad.item() == pytest.approx(expected.item(), rel=1e-3)


def test_only_training_rounds_stochastically():
    layer = _layer(nn.Linear(8, 4), replace(fogzo.abs_max(2), stochastic=True))
    x = draw(5, 8)
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    exponent=st.integers(-5, 5),
    bits=st.integers(1, 8),
    levels=st.sampled_from(["half", "integer", "unsigned"]),
    granularity=st.sampled_from(["tensor", "token", 4]),
    conv=st.booleans(),
)
def test_inputs_become_levels_at_most_half_a_step_away(
    seed, exponent, bits, levels, granularity, conv
):
    shape, dim = ((2, 8, 3), 1) if conv else ((2, 3, 8), -1)
    x = (draw(*shape, seed=seed) * 10.0**exponent).double()
    quantizer = Quantizer(uniform(bits, levels), learned_scale(), granularity=granularity)
    step, before = quantizer.measure_input(x, dim), x.clone()
    output, grid = quantizer.quantize_input(x, step, dim), quantizer.grid
    assert torch.equal(x, before) and output.shape == x.shape

    groups = x.movedim(dim, -1).reshape(len(step), -1) / step
    rounded = output.movedim(dim, -1).reshape(len(step), -1) / step
    codes = rounded - grid.offset
    assert torch.allclose(codes, codes.round(), atol=1e-9)
    assert rounded.min() >= grid.low - 1e-9 and rounded.max() <= grid.high + 1e-9
    inside = (groups >= grid.low) & (groups <= grid.high)
    assert ((rounded - groups).abs()[inside] <= 0.5 + 1e-9).all()


# --- measuring ---------------------------------------------------------------------------------


@EVERY_KEPT
def test_the_first_training_forward_measures_and_later_ones_do_not(activations):
    model = _mlp(activations)
    assert model[0].input_step.item() == math.inf and model[0].input_state.item() == 0
    optimized = list(model.parameters())
    model(draw(4, 8))
    state = _state(model)
    assert model[0].input_step.item() > 0
    assert all(a is b for a, b in zip(model.parameters(), optimized, strict=True))
    model(draw(4, 8, seed=1) * 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


@EVERY_KEPT
def test_inputs_without_negatives_get_unsigned_levels(activations):
    model = _measured(activations)
    assert [model[i].input_state.item() for i in (0, 2)] == [1, 2]
    assert [model[i].activation_quantizer.grid for i in (0, 2)] == [
        uniform(2, "half"),
        uniform(2, "unsigned"),
    ]
    assert "; input: uniform2-unsigned" in repr(model[2])


@pytest.mark.parametrize(
    "activations",
    [
        fogzo.lsq(2, levels="unsigned"),
        Quantizer(TERNARY, learned_scale()),
        replace(fogzo.lsq(2), rotation=fogzo.quest(2).rotation),
        fogzo.fixed(2, step_size=0.5),
        fogzo.abs_max(8),
    ],
    ids=["unsigned", "ternary", "rotated", "step given", "dynamic"],
)
@pytest.mark.parametrize("positive", [False, True])
def test_other_levels_stay_as_given(activations, positive):
    layer, x = _layer(nn.Linear(8, 4), activations), draw(5, 8)
    layer(x.abs() if positive else x)
    assert layer.activation_quantizer == activations


def test_a_step_that_was_given_needs_no_measuring():
    layer = _layer(nn.Linear(8, 4), fogzo.fixed(2, step_size=0.5)).eval()
    with fogzo.calibrate_(layer):
        layer(draw(5, 8).abs())
    assert layer.input_step.item() == 0.5 and layer.activation_quantizer.grid.offset == 0.5


def test_calibrating_averages_over_forwards_and_one_negative_value_makes_levels_signed():
    layer = _layer(nn.Linear(8, 4), fogzo.lsq(2)).eval()
    first, second = draw(5, 8).abs(), draw(3, 8, seed=1)
    with torch.no_grad(), fogzo.calibrate_(layer):
        layer(first)
        assert layer.activation_quantizer.grid.name == "uniform2-unsigned"
        layer(second)
        layer(first)
    expected = (2 * first.mean() + second.abs().mean()) / 3 * 2 / math.sqrt(1.5)
    assert layer.input_step.item() == pytest.approx(expected.item())
    assert layer.activation_quantizer == fogzo.lsq(2) and layer.input_state.item() == 1
    with torch.inference_mode(), fogzo.calibrate_(layer):  # anew, not on top
        layer(first)
    assert layer.input_step.item() == pytest.approx(2 * first.mean().item() / math.sqrt(3))
    layer(first).sum().backward()


def test_calibrating_changes_nothing_else():
    model = _mlp(fogzo.lsq(2)).eval()
    before, stream = _state(model), torch.get_rng_state()
    with torch.no_grad(), fogzo.calibrate_(model):
        model(draw(4, 8))
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    measured = ("input_step", "input_step_knee", "input_state")
    assert changed == {f"{i}.{name}" for i in (0, 2) for name in measured}
    assert not model.training and torch.equal(torch.get_rng_state(), stream)


def test_a_layer_that_gets_zeros_alone_trains_and_answers_without_a_measurement():
    model = fill(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))  # as in DETR's decoder
    fogzo.quantize_(model, fogzo.lsq(2), everything, activations=fogzo.lsq(2))
    x = draw(4, 8)

    def loss_of(x):
        return (model[0](x)[:, :4] + model[1](torch.zeros_like(x))).square().mean()

    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    estimator.record(loss_of, x).backward()
    assert estimator.refine_grads_().fallback is None
    assert torch.equal(model.eval()[1](torch.zeros(2, 8)), model[1].bias.expand(2, 4))
    with pytest.raises(ValueError, match="no step size yet"):
        model[1](x)


def test_zeros_and_overflows_measure_nothing(caplog):
    layer = _layer(nn.Linear(8, 4), fogzo.lsq(2))
    for useless in (torch.zeros(2, 8), torch.full((2, 8), math.inf), torch.ones(0, 8)):
        layer(useless)
        assert layer.input_state.item() == 0
    with caplog.at_level(logging.WARNING, logger="fogzo"), fogzo.calibrate_(nn.Sequential(layer)):
        layer(torch.zeros(2, 8))
    assert "no input other than zeros of 0" in caplog.text
    layer(draw(2, 8))
    assert layer.input_state.item() == 1


def test_calibrating_within_calibrating_is_refused_and_ends_nothing():
    layer = _layer(nn.Linear(8, 4), fogzo.lsq(2)).eval()
    first, second = draw(5, 8), 100 * draw(5, 8, seed=1)
    with torch.no_grad(), fogzo.calibrate_(layer):
        layer(first)
        with pytest.raises(ValueError, match="one block around"), fogzo.calibrate_(layer):
            pass
        layer(second)
    step = layer.input_step.item()
    with torch.no_grad(), fogzo.calibrate_(layer):
        layer(first)
        layer(second)
    assert step == layer.input_step.item()


def test_an_exception_ends_calibrating():
    model = _mlp(fogzo.lsq(2))
    with pytest.raises(RuntimeError), fogzo.calibrate_(model):
        model(draw(4, 7))
    model(draw(4, 8))
    step = model[0].input_step.item()
    model(draw(4, 8) * 2)
    assert model[0].input_step.item() == step


@EVERY_KEPT
def test_evaluating_before_measuring_is_refused(activations):
    with pytest.raises(ValueError, match=r"with fogzo\.calibrate_\(model\): model\(x\)"):
        _mlp(activations).eval()(draw(4, 8))


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_do_not_measure_by_themselves(monkeypatch, ranks):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.delitem(sys.modules, "torch.distributed.fsdp", raising=False)
    model = _mlp(fogzo.lsq(2))
    if ranks > 1:
        with pytest.raises(ValueError, match=r"DDP or fully_shard, with the same x on every rank"):
            model(draw(4, 8))
        with torch.no_grad(), fogzo.calibrate_(model):
            model(draw(4, 8))
    assert model(draw(4, 8)).isfinite().all()


# --- estimators --------------------------------------------------------------------------------


@pairwise(
    estimator=ESTIMATORS,
    activations=[*KEPT.values(), fogzo.quest(2), fogzo.abs_max(8)],
    evaluate=WAYS,
)
def test_every_estimator_steps_and_leaves_the_steps_of_inputs_alone(
    estimator, activations, evaluate
):
    model, x, y = _measured(activations, fogzo.quest(2)), draw(16, 8), draw(16, 3, seed=1)
    make = ESTIMATORS[estimator]
    estimator = make(fogzo.quantized_weights(model), evaluate=evaluate)
    loss = mse_loss(model(x), y)
    loss.backward()
    before, grids = _state(model), [model[i].activation_quantizer for i in (0, 2)]
    stats = estimator.refine_grads_(lambda: mse_loss(model(x), y), expected_loss=loss)
    assert stats.fallback is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [model[i].activation_quantizer for i in (0, 2)] == grids
    assert torch.equal(mse_loss(model(x), y), loss)
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert model(x).isfinite().all()


@EVERY_KEPT
def test_a_probe_never_measures(activations):
    """It would take back the buffers that say so: the first forward of all must not be a probe."""
    model, x, y = _mlp(activations), draw(16, 8), draw(16, 3, seed=1)
    before = _state(model)
    estimator = fogzo.SpsaEstimator(fogzo.quantized_weights(model))
    with pytest.raises(ValueError, match=r"with fogzo\.calibrate_\(model\): model\(x\)"):
        estimator.refine_grads_(lambda: mse_loss(model(x), y))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad(), fogzo.calibrate_(model):
        model(x)
    estimator.refine_grads_(lambda: mse_loss(model(x), y))
    assert model[0].weight.grad.any() and model[0].input_step.item() > 0


# --- states, copies and baking in --------------------------------------------------------------


@EVERY_KEPT
def test_a_state_dict_restores_steps_and_levels_exactly(activations):
    model, x = _measured(activations), draw(4, 8)
    other = _mlp(activations)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model.eval()(x))
    swapped = _state(model)
    swapped["0.input_state"], swapped["2.input_state"] = (
        swapped["2.input_state"],
        swapped["0.input_state"],
    )
    other.load_state_dict(swapped)  # a measured model takes the checkpoint's levels
    assert [other[i].activation_quantizer.grid.offset for i in (0, 2)] == [0, 0.5]


@EVERY_KEPT
def test_a_float_checkpoint_is_measured_anew(activations):
    checkpoint = _state(fogzo.dequantize_(_mlp()))
    assert not any("input" in name for name in checkpoint)
    model, keys = _measured(activations), set(checkpoint)
    model.load_state_dict(checkpoint)
    assert model[2].input_state.item() == 0 and model[2].activation_quantizer == activations
    with pytest.raises(ValueError, match="calibrate_"):
        model.eval()(draw(4, 8))
    model.train()(draw(4, 8))
    assert model[2].input_state.item() == 2 and set(checkpoint) == keys


@EVERY_KEPT
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_what_was_measured(activations, copied):
    model, x = _measured(activations).eval(), draw(4, 8)
    twin = copied(model)
    assert torch.equal(twin(x), model(x))
    assert twin[2].activation_quantizer.grid.name == "uniform2-unsigned"
    assert twin[2].input_step.data_ptr() != model[2].input_step.data_ptr()


@pytest.mark.parametrize("activations", [None, *KEPT.values(), fogzo.abs_max(8)])
def test_dequantizing_leaves_float_inputs_and_nothing_behind(activations):
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3))
    model, x = _mlp(activations), draw(4, 8)
    model(x)
    weights = {i: model[i].quantized_weight() for i in (0, 2)}
    fogzo.dequantize_(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for ours, theirs in zip(model, plain, strict=True):
        assert type(ours) is type(theirs) and vars(ours).keys() == vars(theirs).keys()
    hidden = nn.functional.linear(x, weights[0], model[0].bias).relu()
    hidden = nn.functional.linear(hidden, weights[2], model[2].bias)
    assert torch.allclose(model(x), model[3](hidden))


def test_without_activations_nothing_is_added():
    assert _mlp().state_dict().keys() == _mlp(fogzo.abs_max(8)).state_dict().keys()
    assert not any("input" in name for name in _mlp().state_dict())


def test_tied_weights_have_a_step_for_each_input():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    fogzo.quantize_(fill(model), fogzo.lsq(2), everything, fogzo.lsq(2))
    model(draw(4, 8)).sum().backward()
    assert model[0].input_step is not model[2].input_step
    assert model[0].input_step.grad.any() and model[2].input_step.grad.any()


# --- precision, compiling, checkpointing -------------------------------------------------------


@pytest.mark.parametrize("activations", [*KEPT.values(), fogzo.quest(2), fogzo.abs_max(8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_dtype_of_inputs(activations, dtype):
    model, seen = _mlp(activations), []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype):
        output = model(draw(16, 8) * 300)  # whose squares overflow float16
        output.float().square().mean().backward()
    assert seen == [dtype] and output.dtype == dtype and output.isfinite().all()
    half = draw(16, 8).to(dtype)
    quantized = model[0].activation_quantizer.quantize_input(half, model[0].input_step)
    assert quantized.dtype == dtype and model[0].weight.dtype == torch.float32
    if isinstance(model[2].input_step, nn.Parameter):
        assert model[2].input_step.grad.dtype == torch.float32


@pytest.mark.parametrize("activations", [fogzo.lsq(2), fogzo.quest(2)])
def test_the_compiled_model_agrees(activations):
    torch.compiler.reset()
    model, x = _measured(activations), draw(4, 8)
    output = model(x)
    output.square().sum().backward()
    expected = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    compiled.square().sum().backward()
    assert torch.allclose(compiled, output, rtol=1e-6, atol=1e-6)
    for name, param in model.named_parameters():
        assert torch.allclose(param.grad, expected[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    "activations",
    [fogzo.lsq(4), fogzo.bbq(2, granularity="tensor"), replace(fogzo.lsq(4), rotation=Hadamard())],
    ids=["unsigned", "companded", "rotated"],
)
@torch.no_grad()
def test_inputs_without_negatives_are_rounded_alike_where_no_state_can_be_read(activations):
    torch.compiler.reset()
    model, x = nn.Sequential(nn.ReLU(), nn.Linear(16, 16)), draw(64, 16)
    fogzo.quantize_(fill(model), fogzo.fixed(8), everything, activations=activations)
    with fogzo.calibrate_(model):
        model(x)
    for module in (model.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))


@EVERY_KEPT
@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_gradient_checkpointing_agrees(activations, measured, on_gpu, monkeypatch):
    if on_gpu:  # where no value is read that would have to be waited for
        monkeypatch.setattr(quantized_input, "can_be_read", lambda *_: False)
    make = _measured if measured else _mlp
    grads, x = [], draw(4, 8)
    for checkpointed in (False, True):
        model = make(activations)
        output = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        output.square().sum().backward()
        grads.append([param.grad for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def _gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=16,
        n_positions=16,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("make", [_gpt2, _llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("preset", [fogzo.lsq(2), fogzo.quest(2)], ids=["lsq", "quest"])
def test_transformers_train_with_two_bit_weights_and_activations(make, preset):
    model = fogzo.quantize_(fill(make()), preset, activations=preset).eval()
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    if preset.scale.has_state:
        with torch.no_grad(), fogzo.calibrate_(model):
            model(input_ids=tokens)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    stats = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.01).refine_grads_(
        lambda: model(input_ids=tokens, labels=tokens).loss, expected_loss=loss
    )
    assert stats.fallback is None
    steps = [param for name, param in model.named_parameters() if name.endswith("input_step")]
    assert bool(steps) == preset.scale.has_state
    assert all(step.grad.isfinite().all() and step.item() > 0 for step in steps)


# --- choosing and refusing ---------------------------------------------------------------------


def test_activations_are_chosen_layer_by_layer():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    asked = []

    def choose(module, name):
        asked.append(name)
        return fogzo.abs_max(8) if name == "2" else None

    fogzo.quantize_(model, fogzo.lsq(2), everything, activations=choose)
    assert asked == ["1", "2"]
    assert [layer.activation_quantizer for layer in model] == [None, None, fogzo.abs_max(8)]
    model(torch.tensor([1, 2]))


def _quantize(weights=None, activations=None, features=8):
    model = nn.Sequential(nn.Linear(features, 6), nn.Linear(6, 3))
    return model, lambda: fogzo.quantize_(model, weights or fogzo.lsq(2), None, activations)


REFUSALS = {
    "token of weights": (
        _quantize(fogzo.lsq(2, granularity="token")),
        r'fogzo\.lsq\(bits=2, granularity="channel"\)',
    ),
    "learned step a token": (
        _quantize(activations=fogzo.lsq(2, granularity="token")),
        r"'0'.*activations=fogzo\.lsq\(2\).*fogzo\.abs_max\(8, granularity=\"token\"\)",
    ),
    "fixed step a group": (
        _quantize(activations=fogzo.fixed(2, granularity=4)),
        r"'0'.*fogzo\.abs_max\(8",
    ),
    "group size": (
        _quantize(activations=fogzo.abs_max(granularity=3)),
        r"input of '0'.*granularity=2 or",
    ),
    "odd features": (
        _quantize(activations=fogzo.quest(2), features=7),
        r"input of '0'.*dataclasses\.replace\(quantizer, rotation=None\)",
    ),
    "a preset not called": (_quantize(activations=fogzo.lsq), r"activations=fogzo\.lsq\(2\)\)"),
    "a number": (
        _quantize(activations=lambda module, name: 2),
        r"'0'.*got int.*lambda module, name: fogzo\.lsq\(2\)",
    ),
}


@pytest.mark.parametrize("attempt, advice", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_shows_the_corrected_call_and_changes_nothing(attempt, advice):
    model, call = attempt
    with pytest.raises(ValueError, match=advice):
        call()
    assert type(model[0]) is nn.Linear and not hasattr(model[0], "activation_quantizer")


def test_an_input_by_keyword_is_refused():
    with pytest.raises(ValueError, match=r"layer\(x\), not layer\(input=x\)"):
        _mlp(fogzo.abs_max(8))[0](input=draw(2, 8))


def test_calibrating_a_model_with_float_inputs_is_refused():
    with (
        pytest.raises(ValueError, match=r"activations=fogzo\.lsq\(2\)"),
        fogzo.calibrate_(_mlp()),
    ):
        pass


@pytest.mark.parametrize("activations", [fogzo.lsq(4), fogzo.fixed(4)], ids=["learned", "fixed"])
def test_a_step_of_ones_own_is_not_measured_over(activations):
    layer = fogzo.quantize_(nn.Linear(8, 4), fogzo.lsq(2), everything, activations)
    own = torch.full((1, 1), 0.125)
    layer.load_state_dict({"input_step": own}, strict=False)
    layer(draw(4, 8))
    assert torch.equal(layer.input_step, own) and layer.eval()(draw(4, 8)).isfinite().all()
    with fogzo.calibrate_(layer):
        layer(draw(4, 8).abs())
    measured = layer.activation_quantizer
    assert measured.grid.name == "uniform4-unsigned"
    layer.load_state_dict({"input_step": own}, strict=False)  # on the levels in use
    assert layer.activation_quantizer == measured and torch.equal(layer.input_step, own)
