import pytest
import torch
from torch import nn

import fogzo
from fogzo.export.integers import integer_weight, rounding_error
from fogzo.quantizers import Grid, Quantizer, abs_mean_scale

PRESETS = {
    "lsq1": lambda **o: fogzo.lsq(1, **o),
    "lsq2": lambda **o: fogzo.lsq(2, **o),
    "lsq2-integer": lambda **o: fogzo.lsq(2, levels="integer", **o),
    "lsq3": lambda **o: fogzo.lsq(3, **o),
    "lsq3-half": lambda **o: fogzo.lsq(3, levels="half", **o),
    "lsq4": lambda **o: fogzo.lsq(4, **o),
    "lsq4-half": lambda **o: fogzo.lsq(4, levels="half", **o),
    "fixed8": lambda **o: fogzo.fixed(8, **o),
    "fixed8-half": lambda **o: fogzo.fixed(8, levels="half", **o),
    "fixed2": lambda **o: fogzo.fixed(2, **o),
    "ternary": fogzo.ternary,
    "sign": fogzo.sign,
    "abs_max4": lambda **o: fogzo.abs_max(4, **o),
    "quest2": lambda **o: fogzo.quest(2, **o),
    "quest4": lambda **o: fogzo.quest(4, **o),
}
SCALE_DTYPES = [None, torch.float16, torch.bfloat16]


def quantized(layer, quantizer):
    model = nn.Sequential(layer)
    fogzo.quantize_(model, quantizer, filter_fn=lambda *_: True)
    return model[0]


def check_exact(layer):
    weight = integer_weight(layer)
    expected = layer.eval().quantized_weight().detach()
    assert torch.equal(weight.dequantize(), expected)
    assert weight.dequantize().dtype == expected.dtype
    assert weight.low <= weight.integers.min() <= weight.integers.max() <= weight.high
    u = weight.unsigned()
    assert 0 <= int(u.min()) <= int(u.max()) < weight.num_levels
    affine = (u.double() - weight.zero) * weight.step.double().repeat_interleave(
        u.shape[1] // weight.step.shape[1], 1
    )
    integers = weight.integers.double() * weight.row_scale().double().repeat_interleave(
        u.shape[1] // weight.scale.shape[1], 1
    )
    assert torch.equal(affine, integers)  # the same real numbers, before any rounding
    return weight


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("granularity", ["tensor", "channel", 32])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_weight_is_integer_times_scale(preset, granularity, scale_dtype):
    quantizer = PRESETS[preset](granularity=granularity, scale_dtype=scale_dtype)
    weight = check_exact(quantized(nn.Linear(64, 12), quantizer))
    groups = {"tensor": (1, 1), "channel": (12, 1), 32: (12, 2)}[granularity]
    assert weight.scale.shape == groups
    assert weight.row_scale().shape == (12, groups[1])
    if scale_dtype is not None:
        assert rounding_error(weight.step, scale_dtype) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", PRESETS)
def test_in_every_dtype_of_weights(preset, dtype):
    weight = check_exact(quantized(nn.Linear(64, 12, dtype=dtype), PRESETS[preset](granularity=32)))
    assert weight.dtype == dtype


def test_a_float16_step_that_is_odd_and_next_to_subnormal_is_halved_exactly():
    smallest = torch.finfo(torch.float16).smallest_normal
    layer = nn.Linear(8, 4, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.mul_(1e-3)
    layer = quantized(layer, fogzo.fixed(2, step_size=smallest * (1 + 2**-10)))
    assert rounding_error(check_exact(layer).scale, torch.float16) > 0


@pytest.mark.parametrize("granularity", ["tensor", "channel", 9])
@pytest.mark.parametrize("preset", ["lsq2", "ternary", "sign"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(8, 6, 9),
        lambda: nn.Conv2d(8, 6, 3),
        lambda: nn.Conv2d(8, 6, 3, groups=2),
        lambda: nn.ConvTranspose2d(6, 8, 3),
        lambda: nn.Embedding(6, 9),
    ],
)
def test_in_every_kind_of_layer(make, preset, granularity):
    layer = quantized(make(), PRESETS[preset](granularity=granularity))
    weight = check_exact(layer)
    assert weight.shape == layer.weight.shape
    assert len(weight.integers) == layer.weight.shape[layer.output_dim]


def test_a_learned_step_below_its_knee_exports_the_step_in_use():
    layer = quantized(nn.Linear(64, 12), fogzo.lsq(2))
    with torch.no_grad():
        layer.weight_step.fill_(-1.0)
    check_exact(layer)


@pytest.mark.parametrize(
    ("quantizer", "low", "high", "bits", "zero"),
    [
        (fogzo.lsq(1), -1, 1, 2, 0.5),
        (fogzo.lsq(2), -3, 3, 3, 1.5),
        (fogzo.lsq(2, levels="integer"), -2, 1, 2, 2),
        (fogzo.lsq(4), -8, 7, 4, 8),
        (fogzo.lsq(4, levels="half"), -15, 15, 5, 7.5),
        (fogzo.fixed(8), -128, 127, 8, 128),
        (fogzo.fixed(8, levels="half"), -255, 255, 9, 127.5),
        (fogzo.ternary(), -1, 1, 2, 1),
        (fogzo.sign(), -1, 1, 2, 0.5),
    ],
)
def test_the_range_is_the_grids(quantizer, low, high, bits, zero):
    weight = integer_weight(quantized(nn.Linear(64, 12), quantizer))
    assert (weight.low, weight.high, weight.bits, weight.zero) == (low, high, bits, zero)
    assert weight.integers.dtype == (torch.int16 if bits > 8 else torch.int8)
    assert weight.unsigned().dtype == torch.uint8
    assert weight.num_levels == quantizer.grid.num_levels


def test_rounded_steps_keep_the_integers():
    weight = integer_weight(quantized(nn.Linear(64, 12), fogzo.lsq(2, granularity=32)))
    assert 0 < rounding_error(weight.step, torch.float16) <= 2**-11
    rounded = weight.round_steps(torch.float16)
    assert rounding_error(rounded.step, torch.float16) == 0
    assert torch.equal(rounded.integers, weight.integers)
    torch.testing.assert_close(rounded.dequantize(), weight.dequantize(), rtol=2**-11, atol=0)


@pytest.mark.parametrize("step", [3e-6, 1e-9, 7e4])
def test_what_rounding_makes_of_steps_that_float16_hardly_holds(step):
    layer = quantized(nn.Linear(64, 12), fogzo.lsq(2, granularity="channel"))
    with torch.no_grad():
        layer.weight_step_knee.fill_(step / 2)
        layer.weight_step[0] = step
    weight = integer_weight(layer)
    rounded = weight.round_steps(torch.float16)
    change = weight.step_change(torch.float16)
    assert change == ((rounded.scale - weight.scale).abs() / weight.scale).max() > 2**-11
    assert rounding_error(rounded.step, torch.float16) == 0 < rounded.scale.min()
    # The nearest one, where it is not below all of them or above.
    assert change < (0.02 if step == 3e-6 else 20)


def test_levels_without_a_common_factor_are_refused():
    grid = Grid("thirds", -1, 1, spacing=1 / 3)
    layer = quantized(nn.Linear(64, 12), Quantizer(grid, abs_mean_scale()))
    with pytest.raises(ValueError, match="power of two"):
        integer_weight(layer)


def test_a_spacing_of_a_power_of_two_is_exact():
    grid = Grid("quarters", -2, 1, offset=0.125, spacing=0.25)
    check_exact(quantized(nn.Linear(64, 12), Quantizer(grid, abs_mean_scale())))
