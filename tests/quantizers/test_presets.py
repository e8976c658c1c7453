"""Each preset against its paper's formulas, written again here without the package's helpers."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

import fogzo
from fogzo.quantizers import (
    DRAWN_SURROGATE_NAMES,
    SIGN,
    SURROGATE_NAMES,
    TERNARY,
    Quantizer,
    fixed_scale,
    learned_scale,
    uniform,
)
from fogzo.quantizers.description import describe
from fogzo.quantizers.surrogates import identity_unmasked
from toolbox import every, pairwise

F64 = torch.float64
GRANULARITIES = ["tensor", "channel", 8]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
PRESETS = {
    "fixed2": lambda **kw: fogzo.fixed(2, **kw),
    "fixed1-integer": lambda **kw: fogzo.fixed(1, levels="integer", **kw),
    "fixed4-step": lambda **kw: fogzo.fixed(4, step_size=0.03, **kw),
    "fixed8-half": lambda **kw: fogzo.fixed(8, levels="half", **kw),
    "fixed8-unsigned": lambda **kw: fogzo.fixed(8, levels="unsigned", **kw),
    "lsq1": lambda **kw: fogzo.lsq(1, **kw),
    "lsq1-integer": lambda **kw: fogzo.lsq(1, levels="integer", **kw),
    "lsq2": lambda **kw: fogzo.lsq(2, **kw),
    "lsq3-max": lambda **kw: fogzo.lsq(3, init="max", **kw),
    "lsq2-unsigned": lambda **kw: fogzo.lsq(2, levels="unsigned", **kw),
    "lsq8": lambda **kw: fogzo.lsq(8, **kw),
    "quest2": lambda **kw: fogzo.quest(2, **kw),
    "quest4": lambda **kw: fogzo.quest(4, block=16, **kw),
    "ternary": lambda **kw: fogzo.ternary(**kw),
    "sign": lambda **kw: fogzo.sign(**kw),
    "abs_max8": lambda **kw: fogzo.abs_max(**kw),
    "abs_max4": lambda **kw: fogzo.abs_max(4, **kw),
}
EVERY_PRESET = every("make", PRESETS)
EVERY_GRANULARITY = pytest.mark.parametrize("granularity", GRANULARITIES)


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64, std: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=F64) * std).to(dtype)


def _grads(output: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, grad)


# --- LSQ ---------------------------------------------------------------------------------------


def _lsq_reference(w: Tensor, a: Tensor, bits: int, levels: str) -> tuple[Tensor, Tensor, Tensor]:
    """Forward, dw_q/dw and dw_q/da of LSQ; the half grid as QuEST's port has it."""
    x, half = w / a, 2 ** (bits - 1)
    if levels == "integer":
        low, high = -half, half - 1
        nearest = x.round()
    else:
        low, high = -half + 0.5, half - 0.5
        nearest = x.floor() + 0.5
    nearest = nearest.clamp(low, high)
    inside = (x >= low) & (x <= high)
    return a * nearest, inside.to(F64), torch.where(inside, nearest - x, nearest)


LSQ_CASES = pytest.mark.parametrize(
    "bits, levels", [*itertools.product((2, 3, 4, 8), ("integer", "half")), (1, "half")]
)


@LSQ_CASES
def test_lsq_starts_quantizes_and_differentiates_as_published(bits, levels):
    w, grad = _draw(5, 16), _draw(5, 16, seed=1)
    quantizer = fogzo.lsq(bits, levels=levels)
    largest = 2 ** (bits - 1) - (1 if levels == "integer" else 0.5)
    step = quantizer.initial_step_size(w)
    assert step.item() == pytest.approx(2 * w.abs().mean().item() / math.sqrt(largest))

    for factor in (1.0, 0.4):  # the second puts many weights outside
        a, latent = (step * factor).requires_grad_(), w.clone().requires_grad_()
        output = quantizer(latent, a)
        forward, dw, da = _lsq_reference(w, a.detach(), bits, levels)
        assert torch.equal(output, forward)
        grad_w, grad_a = _grads(output, grad, latent, a)
        assert torch.allclose(grad_w, grad * dw)
        scale = 1 / math.sqrt(w.numel() * largest)
        assert grad_a.item() == pytest.approx((grad * da).sum().item() * scale)


@LSQ_CASES
def test_lsq_gradients_are_finite_differences_of_its_own_definition(bits, levels):
    """Rounding straight through: a (clip(w/a) + the rounding error, held constant)."""
    w, grad = _draw(4, 8, seed=2), _draw(4, 8, seed=3)
    quantizer, h = fogzo.lsq(bits, levels=levels), 1e-6
    a = quantizer.initial_step_size(w) * 0.6
    low, high = uniform(bits, levels).low, uniform(bits, levels).high
    error = _lsq_reference(w, a, bits, levels)[0] / a - (w / a).clamp(low, high)

    def definition(w: Tensor, a: Tensor) -> Tensor:
        return a * ((w / a).clamp(low, high) + error)

    a.requires_grad_()
    latent = w.clone().requires_grad_()
    grad_w, grad_a = _grads(quantizer(latent, a), grad, latent, a)
    with torch.no_grad():
        slope_w = (definition(w + h, a) - definition(w - h, a)) / (2 * h)
        slope_a = (definition(w, a + h) - definition(w, a - h)) / (2 * h)
    assert torch.allclose(grad_w, grad * slope_w, atol=1e-6)
    grad_scale = 1 / math.sqrt(w.numel() * high)
    assert grad_a.item() == pytest.approx((grad * slope_a).sum().item() * grad_scale, rel=1e-5)


@pytest.mark.parametrize("granularity, groups, size", [("channel", 4, 16), (8, 8, 8)])
def test_lsq_learns_one_step_a_group(granularity, groups, size):
    w, grad = _draw(4, 16), _draw(4, 16, seed=1)
    quantizer = fogzo.lsq(3, granularity=granularity)
    step = quantizer.initial_step_size(w)
    assert step.shape == (groups, 1)
    rows = w.reshape(groups, size)
    assert torch.allclose(step, 2 * rows.abs().mean(1, keepdim=True) / math.sqrt(3))
    step.requires_grad_()
    forward, _, da = _lsq_reference(rows, step.detach(), 3, "integer")
    output = quantizer(w, step)
    assert torch.allclose(output, forward.reshape(4, 16))
    (grad_step,) = _grads(output, grad, step)
    expected = (grad.reshape(groups, size) * da).sum(1, keepdim=True) / math.sqrt(size * 3)
    assert torch.allclose(grad_step, expected)


def test_a_learned_step_below_the_minimum_still_gets_its_gradient():
    w = _draw(2, 4)
    step = torch.tensor([[-0.1]], dtype=F64, requires_grad=True)
    output = fogzo.lsq(2)(w, step)
    assert output.isfinite().all()
    (grad,) = _grads(output, w.sign(), step)
    assert grad.item() > 0 or grad.item() < 0


# --- QuEST -------------------------------------------------------------------------------------

QUEST_EDGE = {1: 0.7978846, 2: 1.4935346, 3: 2.0510684, 4: 2.5139306, 8: 3.884939}


def _sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=F64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64), matrix)
    return matrix / math.sqrt(size)


@pytest.mark.parametrize("bits", QUEST_EDGE)
def test_quest_rotates_clips_and_trusts_as_published(bits):
    w, grad = _draw(6, 256, std=0.02), _draw(6, 256, seed=1)
    w[:, ::50] *= 5
    h = torch.block_diag(_sylvester(128), _sylvester(128))
    rotated = w @ h
    scale = QUEST_EDGE[bits] * rotated.square().mean(1, keepdim=True).sqrt() + 1e-8
    step = 2 * scale / (2**bits - 1)
    clipped = torch.minimum(torch.maximum(rotated, -scale), scale)
    # rounded at x + 1/2; a clipped value on the last tie belongs to the last level
    index = (clipped / step + 0.5).round().clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1))
    quantized = index * step - step / 2
    trusted = (quantized - rotated).abs() <= step / 2

    latent = w.clone().requires_grad_()
    output = fogzo.quest(bits)(latent)
    assert torch.allclose(output, quantized @ h, atol=1e-7)
    (grad_w,) = _grads(output, grad, latent)
    assert torch.allclose(grad_w, (grad @ h * trusted) @ h, atol=1e-10)
    assert bits == 8 or not trusted.all()


def test_quest_measures_every_output_channel():
    w = _draw(3, 128) * torch.tensor([[1.0], [10.0], [0.1]])
    step = fogzo.quest(2).step_size(w)
    assert step.shape == (3, 1)
    assert torch.allclose(step[:, 0], 2 * 1.4935346 / 3 * w.square().mean(1).sqrt(), rtol=1e-6)


# --- BitNet and sign ---------------------------------------------------------------------------


def test_ternary_is_bitnet():
    w, grad = _draw(8, 32).requires_grad_(), _draw(8, 32, seed=1)
    a = w.detach().abs().mean()
    output = fogzo.ternary()(w)
    assert torch.equal(output, a * (w / a + 0.5).floor().clamp(-1, 1))
    assert torch.equal(_grads(output, grad, w)[0], grad)  # the mean is detached, nothing masked


def test_ternary_zeroes_a_third_of_a_gaussian():
    share = (fogzo.ternary()(_draw(1000, 100)) == 0).double().mean().item()
    assert share == pytest.approx(math.erf(0.5 * math.sqrt(2 / math.pi) / math.sqrt(2)), abs=0.005)
    assert share == pytest.approx(0.31, abs=0.005)


def test_sign_is_the_mean_magnitude_of_each_output_channel():
    w, grad = _draw(5, 3, 2, 2), _draw(5, 3, 2, 2, seed=1)
    w[0, 0, 0, 0] = 0.0
    latent = w.clone().requires_grad_()
    a = w.abs().mean((1, 2, 3), keepdim=True)
    output = fogzo.sign()(latent)
    assert torch.allclose(output, torch.where(w >= 0, a, -a))
    assert torch.equal(_grads(output, grad, latent)[0], grad * ((w / a).abs() <= 1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_abs_max_puts_the_largest_magnitude_on_the_largest_level(bits):
    w, grad = _draw(5, 32, dtype=torch.float32).requires_grad_(), _draw(5, 32, seed=1).float()
    largest = 2 ** (bits - 1) - 1
    a = w.detach().abs().amax(1, keepdim=True) / largest
    output = fogzo.abs_max(bits)(w)
    assert torch.equal(output, a * (w / a).round().clamp(-largest - 1, largest))
    assert torch.allclose(output.abs().amax(1, keepdim=True), a * largest)
    assert torch.equal(_grads(output, grad, w)[0], grad)


@pytest.mark.parametrize(
    "surrogate, slope",
    [
        ("tanh", lambda x: 1 - torch.tanh(x) ** 2),
        ("approx_sign", lambda x: (2 - 2 * x.abs()).clamp(min=0)),
    ],
)
def test_sign_takes_other_slopes(surrogate, slope):
    w, grad = _draw(4, 8).requires_grad_(), _draw(4, 8, seed=1)
    a = w.detach().abs().mean(1, keepdim=True)
    (grad_w,) = _grads(fogzo.sign(surrogate=surrogate)(w), grad, w)
    assert torch.allclose(grad_w, grad * slope(w.detach() / a))


# --- fixed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("levels", ["half", "integer"])
@pytest.mark.parametrize("shape", ["gaussian", "uniform", "heavy", "outlier", "sparse"])
def test_no_fixed_step_has_a_smaller_error(bits, levels, shape):
    w = _draw(4, 512, std=0.05)
    if shape == "uniform":
        w = torch.rand(4, 512, generator=Generator().manual_seed(1), dtype=F64) - 0.5
    elif shape == "heavy":  # Student's t with 3 degrees of freedom
        w = w / _draw(3, 4, 512, seed=1).square().mean(0).sqrt()
    elif shape == "outlier":
        w[2, 5] = 5.0
    elif shape == "sparse":
        w[:, ::2] = 0
    half = 2 ** (bits - 1)

    def error(step: Tensor) -> Tensor:
        x = w.flatten() / step[:, None]
        if levels == "half":
            rounded = x.floor().clamp(-half, half - 1) + 0.5
        else:
            rounded = x.round().clamp(-half, half - 1)
        return (rounded * step[:, None] - w.flatten()).square().mean(1)

    step = fogzo.fixed(bits, levels=levels).initial_step_size(w).flatten()
    scan = step * torch.logspace(-1.3, math.log10(60), 500, dtype=F64)
    least = min(error(part).min().item() for part in scan.split(100))
    assert error(step).item() <= least * 1.005


@pytest.mark.parametrize(
    "bits, levels, k", [(1, "half", 1.596), (2, "half", 0.996), (2, "integer", 1.049)]
)
def test_the_fixed_step_of_a_gaussian_is_the_known_multiple_of_its_rms(bits, levels, k):
    w = _draw(200, 1000, std=0.3)
    step = fogzo.fixed(bits, levels=levels).initial_step_size(w).item()
    assert step == pytest.approx(k * w.square().mean().sqrt().item(), rel=0.01)


def test_a_given_step_is_used_as_it_is():
    quantizer, w = fogzo.fixed(3, step_size=0.25), _draw(4, 8)
    step = quantizer.initial_step_size(w)
    assert step.tolist() == [[0.25]]
    assert torch.equal(quantizer(w, step), 0.25 * (w / 0.25).round().clamp(-4, 3))


# --- granularity and layout --------------------------------------------------------------------


@pytest.mark.parametrize("shape, dim", [((6, 16), 0), ((16, 6), 1), ((6, 4, 2, 2), 0)])
def test_channels_of_any_layout_are_quantized_on_their_own(shape, dim):
    """Linear, transformers' Conv1D (inputs first) and Conv2d."""
    w = _draw(*shape)
    output = fogzo.sign()(w, output_dim=dim)
    for channel in range(shape[dim]):
        own, quantized = w.select(dim, channel), output.select(dim, channel)
        assert torch.allclose(quantized, own.sign() * own.abs().mean())


@pytest.mark.parametrize("shape, dim", [((6, 16), 0), ((16, 6), 1), ((6, 4, 2, 2), 0)])
def test_groups_are_consecutive_inputs_of_one_output(shape, dim):
    w = _draw(*shape)
    output = fogzo.ternary(granularity=8)(w, output_dim=dim)
    for channel in range(shape[dim]):
        own, quantized = w.select(dim, channel).flatten(), output.select(dim, channel).flatten()
        for group, result in zip(own.split(8), quantized.split(8), strict=True):
            a = group.abs().mean()
            assert torch.allclose(result, a * (group / a).round().clamp(-1, 1))


def test_transposed_convolutions_group_their_inputs_and_kernel():
    w = _draw(4, 6, 2, 2)  # (inputs, outputs, kernel)
    output = fogzo.ternary(granularity=4)(w, output_dim=1)
    for i, o in itertools.product(range(4), range(6)):
        a = w[i, o].abs().mean()
        assert torch.allclose(output[i, o], a * (w[i, o] / a).round().clamp(-1, 1))


@pairwise(
    preset=PRESETS,
    granularity=GRANULARITIES,
    layout=[((6, 16), 0), ((16, 6), 1), ((4, 6, 2, 4), 1)],
)
def test_step_sizes_broadcast_against_the_weight(preset, granularity, layout):
    shape, dim = layout
    quantizer, w = PRESETS[preset](granularity=granularity), _draw(*shape)
    step = quantizer.step_size(w, quantizer.initial_step_size(w, dim), dim)
    assert torch.broadcast_shapes(step.shape, w.shape) == w.shape
    rounded = quantizer.grid.round(quantizer.rotate(w, dim) / step) * step
    output = quantizer(w, quantizer.initial_step_size(w, dim), dim)
    assert torch.allclose(quantizer.rotate(rounded, dim), output)


# --- codes -------------------------------------------------------------------------------------


@pairwise(
    preset=PRESETS,
    granularity=GRANULARITIES,
    dtype=DTYPES,
    scale_dtype=[None, torch.float16],
)
def test_codes_dequantize_to_exactly_the_forwards_weight(preset, granularity, dtype, scale_dtype):
    quantizer = PRESETS[preset](granularity=granularity, scale_dtype=scale_dtype)
    for shape, dim in (((6, 16), 0), ((16, 6), 1), ((4, 6, 2, 4), 0), ((4, 6, 2, 4), 1)):
        w = _draw(*shape, dtype=dtype, std=0.1)
        step = quantizer.initial_step_size(w, dim)
        codes, used = quantizer.codes(w, step, dim), quantizer.current_step_size(w, step, dim)
        output = quantizer(w, step, dim)
        assert output.dtype == dtype and output.shape == w.shape
        assert codes.dtype == (torch.uint8 if quantizer.grid.low_code >= 0 else torch.int8)
        assert codes.shape == w.shape
        assert torch.equal(quantizer.dequantize(codes, used, dim), output)
        # As a file would store them: the step in its own dtype, the weight's dtype named.
        stored = used.to(scale_dtype or used.dtype)
        assert torch.equal(quantizer.dequantize(codes, stored, dim, dtype), output)


@pairwise(
    preset=PRESETS,
    dtype=DTYPES,
    scale_dtype=[torch.float16, torch.bfloat16],
    std=[1e-7, 0.02, 1e6],
)
def test_rounded_steps_are_exactly_representable(preset, dtype, scale_dtype, std):
    quantizer = PRESETS[preset](scale_dtype=scale_dtype, granularity="channel")
    w = _draw(4, 16, dtype=dtype, std=std)
    w[0] = 0
    step = quantizer.initial_step_size(w)
    used = quantizer.current_step_size(w, step)
    assert used.isfinite().all() and (used > 0).all()
    assert torch.equal(used.to(scale_dtype).to(dtype), used)
    assert quantizer(w, step).isfinite().all()


@pairwise(preset=PRESETS, granularity=GRANULARITIES, dtype=[*DTYPES, torch.float16])
def test_zero_weights_stay_finite_forward_and_backward(preset, granularity, dtype):
    quantizer = PRESETS[preset](granularity=granularity)
    w = torch.zeros(4, 16, dtype=dtype)
    step = quantizer.initial_step_size(w)
    latent = w.requires_grad_()
    if step is not None:
        step.requires_grad_()
    output = quantizer(latent, step)
    output.sum().backward()
    assert output.isfinite().all() and latent.grad.isfinite().all()
    assert step is None or step.grad is None or step.grad.isfinite().all()


# --- properties --------------------------------------------------------------------------------


@st.composite
def _weights(draw) -> tuple[Tensor, int]:
    """Weights of any layout and size, with zeros and repeated and extreme values among them."""
    dims = draw(st.integers(2, 4))
    shape = [draw(st.integers(1, 4)) * (8 if dim == dims - 1 else 1) for dim in range(dims)]
    dtype = draw(st.sampled_from(DTYPES))
    w = _draw(*shape, seed=draw(st.integers(0, 10**6)), dtype=dtype)
    w *= 10.0 ** draw(st.floats(-6, 6))
    special = draw(st.lists(st.sampled_from([0.0, -0.0, 1e-9, -1e-9, 0.5, -1e6, 1e6]), max_size=8))
    flat = w.view(-1)
    flat[: len(special)] = torch.tensor(special, dtype=dtype)
    if draw(st.booleans()):
        flat[:: draw(st.integers(1, 3))] = 0
    return w, draw(st.integers(0, dims - 2).filter(lambda dim: dim < 2))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    _weights(),
    st.sampled_from(sorted(PRESETS)),
    st.sampled_from(GRANULARITIES),
    st.sampled_from([None, torch.float16]),
)
def test_any_weight_is_quantized_to_finite_levels_of_the_grid(
    weights, preset, granularity, scale_dtype
):
    w, dim = weights
    quantizer = PRESETS[preset](granularity=granularity, scale_dtype=scale_dtype)
    before, bits = w.clone(), quantizer.grid.bits
    step = quantizer.initial_step_size(w, dim)
    output, codes = quantizer(w, step, dim), quantizer.codes(w, step, dim)
    used = quantizer.current_step_size(w, step, dim)
    assert torch.equal(w, before)
    assert output.isfinite().all() and (used > 0).all()
    assert codes.min() >= quantizer.grid.low_code and codes.max() <= quantizer.grid.high_code
    assert torch.equal(quantizer.dequantize(codes, used, dim), output)
    if quantizer.rotation is None and (w.dtype != torch.bfloat16 or bits < 8):
        # Rounding again with the step kept changes nothing (bfloat16 itself has 8 bits).
        assert torch.equal(quantizer(output, used, dim), output)
        assert torch.equal(quantizer.codes(output, used, dim), codes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.sampled_from(GRANULARITIES),
    st.integers(-20, 20),
    st.integers(0, 10**6),
)
def test_scaling_a_weight_by_a_power_of_two_scales_its_quantization(preset, granularity, k, seed):
    quantizer = PRESETS[preset](granularity=granularity)
    w = _draw(4, 16, seed=seed)
    step = quantizer.current_step_size(w, quantizer.initial_step_size(w))
    output = quantizer(w, step)
    assert torch.equal(quantizer(w * 2.0**k, step * 2.0**k), output * 2.0**k)


# --- function transforms and refusals ----------------------------------------------------------


@EVERY_PRESET
@EVERY_GRANULARITY
def test_vmap_maps_over_weights(make, granularity):
    quantizer = make(granularity=granularity)
    batch = _draw(3, 4, 16)
    steps = [quantizer.initial_step_size(w) for w in batch]
    with torch.no_grad():
        if steps[0] is None:
            mapped = torch.func.vmap(quantizer)(batch)
        else:
            mapped = torch.func.vmap(quantizer)(batch, torch.stack(steps))
    expected = torch.stack([quantizer(w, s) for w, s in zip(batch, steps, strict=True)])
    assert torch.allclose(mapped, expected)


def test_a_composed_quantizer_equals_its_preset():
    w = _draw(4, 16)
    composed = Quantizer(uniform(2, "half"), learned_scale(), "identity")
    assert composed == fogzo.lsq(2)
    step = composed.initial_step_size(w)
    assert torch.equal(composed(w, step), fogzo.lsq(2)(w, step))


@pytest.mark.parametrize("name", [*SURROGATE_NAMES, *DRAWN_SURROGATE_NAMES])
def test_a_grid_can_be_replaced_under_a_surrogate_that_was_named(name):
    def on(grid):
        return Quantizer(grid, fixed_scale(1.0), name, stochastic=True)

    changed = copy.deepcopy(replace(on(TERNARY), grid=SIGN))
    assert describe(changed) == describe(on(SIGN))
    x = _draw(1, 64)
    outputs = []
    for quantizer in (changed, on(SIGN)):
        torch.manual_seed(0)
        w = x.clone().requires_grad_()
        quantized = quantizer(w, torch.ones(1, 1, dtype=F64), training=True)
        outputs.append((quantized, *_grads(quantized, torch.ones_like(x), w)))
    assert all(map(torch.equal, *outputs))
    assert describe(replace(changed, grid=TERNARY)) == describe(on(TERNARY))


def test_a_surrogate_that_was_given_as_an_object_stays():
    narrow = fogzo.sign(surrogate=identity_unmasked(1.0))
    assert replace(narrow, grid=TERNARY).surrogate is narrow.surrogate


@pytest.mark.parametrize(
    "make, advice",
    [
        (lambda: fogzo.lsq(0), r"from 1 to 8.*fogzo\.fixed\(bits=2\)"),
        (lambda: fogzo.quest(9), r"from 1 to 8.*fogzo\.fixed\(bits=2\)"),
        (lambda: fogzo.lsq(2, granularity="row"), r"fogzo\.lsq\(bits=4, granularity=64\)"),
        (lambda: fogzo.lsq(2, granularity=0), r"fogzo\.lsq\(bits=4, granularity=64\)"),
        (lambda: fogzo.lsq(2, granularity=True), r"fogzo\.lsq\(bits=4, granularity=64\)"),
        (lambda: fogzo.fixed(2, step_size=0.0), r"fixed_scale\(0\.05\)"),
        (lambda: fogzo.fixed(2, step_size=math.nan), r"fixed_scale\(0\.05\)"),
        (lambda: fogzo.fixed(2, init="best"), r'fixed_scale\(init="mse"\)'),
        (lambda: fogzo.lsq(2, scale_dtype=torch.int8), r"scale_dtype=torch\.float16"),
        (lambda: fogzo.sign(surrogate="hardtan"), r'surrogate="hardtanh"'),
        (lambda: fogzo.quest(2, block=100), r"Hadamard\(block=128\)"),
        (
            lambda: fogzo.lsq(2, granularity=12)(_draw(2, 16), torch.ones(1, 1)),
            r"granularity=8 or",
        ),
    ],
)
def test_a_bad_argument_is_refused_with_a_good_one(make, advice):
    with pytest.raises(ValueError, match=advice):
        make()


@pytest.mark.parametrize("surrogate", ["identity", "identity_unmasked", "trust"])
def test_a_learned_step_has_lsqs_gradient_under_every_identity(surrogate):
    # An unmasked rule must not pull the step by the distance of weights far outside the range.
    w = torch.tensor([[0.2, -0.7, 1.9, 40.0]], requires_grad=True)
    step = torch.ones(1, 1, requires_grad=True)
    quantizer = fogzo.lsq(2, surrogate=surrogate)
    quantizer(w, step).sum().backward()
    expected = (0.5 - 0.2) + (-0.5 + 0.7) + 1.5 + 1.5
    assert float(step.grad) == pytest.approx(expected / (4 * 1.5) ** 0.5)
