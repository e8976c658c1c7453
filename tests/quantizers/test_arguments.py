"""Arguments that cannot mean anything are refused at once, with the corrected call."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import fogzo
from fogzo.quantizers import (
    SIGN,
    TERNARY,
    Grid,
    Hadamard,
    Quantizer,
    Scale,
    Surrogate,
    adjacent,
    fixed_scale,
    learned_scale,
    resolve_surrogate,
    rms_scale,
    uniform,
    unsigned,
)
from fogzo.quantizers.smoothing import (
    Logistic,
    Normal,
    Scaled,
    Triangular,
    Uniform,
    with_radius,
)
from fogzo.quantizers.surrogates import erf, identity, tanh, trust

NO_NUMBERS = ("a", None, True, [1.0], torch.tensor(1.0), 1j)
NOT_POSITIVE = (*NO_NUMBERS, 0, 0.0, -1.0, math.nan, math.inf, -math.inf)


def quantizer(**fields):
    return replace(fogzo.lsq(2), **fields)


CALLS = {
    "fixed(step)": (
        lambda v: fogzo.fixed(2, step_size=v),
        [v for v in NOT_POSITIVE if v is not None],
    ),
    "fixed(small step)": (lambda v: fogzo.fixed(2, step_size=v), [1e-9, 9.9e-9, 5e-324]),
    "fixed_scale": (fixed_scale, ["0.1", False, 1e-9, math.nan]),
    "fixed(bits)": (fogzo.fixed, [0, 9, 2.0, "2", None, True]),
    "lsq(bits)": (fogzo.lsq, [0, 9, 2.5, "2", None, True]),
    "quest(bits)": (fogzo.quest, [0, 9, math.nan, "2"]),
    "abs_max(bits)": (fogzo.abs_max, [0, 9, 7.5, [8]]),
    "init": (lambda v: fogzo.lsq(2, init=v), ["best", None, 1, ["mse"], torch.ones(1)]),
    "levels": (lambda v: fogzo.fixed(2, levels=v), ["both", 1, ["half"], True]),
    "block": (lambda v: fogzo.quest(2, block=v), ["a", 3.5, True, 1, 100, 0, -2, None, 128.0]),
    "Hadamard": (Hadamard, ["a", 3.5, True, 1, 0, None, 2.0, [128]]),
    "granularity": (
        lambda v: fogzo.ternary(granularity=v),
        ["row", 0, -1, True, 2.0, None, ["channel"], torch.tensor(8)],
    ),
    "surrogate": (lambda v: fogzo.sign(surrogate=v), ["hardtan", None, 1, ["tanh"], tanh]),
    "scale_dtype": (
        lambda v: fogzo.lsq(2, scale_dtype=v),
        ["float16", torch.int8, 16, torch.complex64, torch.bool, float, np.float16],
    ),
    "stochastic": (lambda v: quantizer(stochastic=v), ["yes", 1, None, torch.tensor(True)]),
    "grid": (lambda v: quantizer(grid=v), ["uniform2-half", 2, None, uniform]),
    "scale": (lambda v: quantizer(scale=v), ["lsq", 0.1, None, learned_scale]),
    "rotation": (lambda v: quantizer(rotation=v), [128, "hadamard", Hadamard, True]),
    "Quantizer(weight)": (
        lambda v: fogzo.sign()(v),
        [1.0, [[0.1]], torch.ones(8), torch.tensor([[1, 2]]), torch.ones(0, 8), torch.ones(8, 0)],
    ),
    "Quantizer(step)": (
        lambda v: fogzo.lsq(2)(torch.randn(4, 8), v),
        [0.1, torch.tensor(0.1), torch.ones(4), torch.ones(2, 2)],
    ),
    "bbq(init)": (lambda v: fogzo.bbq(2, learned=False, init=v), ["mse", "max"]),
    "Quantizer": (lambda v: Quantizer(v, v), [2, "lsq", None]),
    "Scale(rule)": (lambda v: Scale(v, "fixed"), ["best", None, 1, ["mse"]]),
    "Scale(kind)": (lambda v: Scale("mse", v), ["x", None, True, ["fixed"], "Fixed"]),
    "Scale(dynamic value)": (lambda v: Scale("mse", "dynamic", v), [0.1]),
    "rms_scale": (rms_scale, ["mse", None, 2]),
    "learned_scale": (learned_scale, ["lsq+", None, 0.1]),
    "Grid(codes)": (lambda v: Grid("g", v, 7), [-1.0, "a", None, True, 7, 8, math.nan]),
    "Grid(high code)": (lambda v: Grid("g", -1, v), [1.5, "a", None, True, -1, math.inf]),
    "Grid(name)": (lambda v: Grid(v, -1, 1), [None, 3]),
    "Grid(offset)": (lambda v: Grid("g", -2, 1, v), ["a", None, 0.25, math.nan, 1.0, True]),
    "Grid(spacing)": (lambda v: Grid("g", -2, 1, 0.0, v), NOT_POSITIVE),
    "unsigned": (unsigned, ["uniform2-half", 2, None]),
    "resolve_surrogate": (lambda v: resolve_surrogate("identity", v), [2, None, "ternary"]),
    "tanh(tau)": (tanh, NOT_POSITIVE),
    "erf(sigma)": (erf, NOT_POSITIVE),
    "identity(spacing)": (identity, NOT_POSITIVE),
    "trust(spacing)": (trust, NOT_POSITIVE),
    "Uniform": (Uniform, NOT_POSITIVE),
    "Triangular": (Triangular, NOT_POSITIVE),
    "Logistic": (Logistic, NOT_POSITIVE),
    "Normal": (Normal, NOT_POSITIVE),
    "Scaled": (lambda v: Scaled(Uniform(), v), NOT_POSITIVE),
    "Scaled(law)": (lambda v: Scaled(v, 1.0), ["uniform", None, Uniform]),
    "with_radius": (lambda v: with_radius(Uniform(), v), NOT_POSITIVE),
    "Surrogate(name)": (lambda v: replace(identity(), name=v), [None, 1]),
    "Surrogate(law)": (lambda v: replace(identity(), law=v), ["uniform", Uniform, 1.0]),
    "Surrogate(perturbation)": (
        lambda v: replace(identity(), perturbation=v),
        ["uniform", None, Uniform],
    ),
    "Surrogate(range_slack)": (
        lambda v: replace(identity(), range_slack=v),
        ["a", -1.0, True, math.nan],
    ),
    "Surrogate(range_slack, kernel)": (
        lambda v: Surrogate("own", None, Uniform(), v, Uniform(2.0).pdf),
        [0.0, 0.5, math.inf],
    ),
    "adjacent": (lambda v: adjacent(least_probability=v), [0, 0.0, -0.1, 2.0, "a"]),
    "Surrogate(kernel)": (lambda v: replace(tanh(), kernel=v), ["pdf", 1.0]),
}


@pytest.mark.parametrize(
    ("call", "value"),
    [(call, value) for call, (_, values) in CALLS.items() for value in values],
    ids=lambda value: getattr(value, "__name__", None) or repr(value),
)
def test_it_is_refused_with_what_came_and_what_to_write(call, value):
    with pytest.raises(ValueError, match=r"(got|unknown|value=).*(for example|fixed_scale)"):
        CALLS[call][0](value)


def test_a_step_size_and_the_rule_to_measure_it_by_are_refused_together():
    for call in (partial(fogzo.fixed, 2, step_size=0.1), partial(fixed_scale, 0.1)):
        with pytest.raises(ValueError, match=r"got init='mse'.*step_size=0\.1\) or fixed_scale"):
            call(init="mse")
    assert fixed_scale() == fixed_scale(init="mse") == fogzo.fixed(2).scale


def test_levels_of_one_side_are_refused_to_a_bell():
    with pytest.raises(ValueError, match=r"uniform2-unsigned have one side.*bbq\(2, levels=\"half"):
        fogzo.bbq(2, granularity="tensor", levels="unsigned")


@pytest.mark.parametrize(("granularity", "groups"), [("tensor", 1), ("channel", 8), (4, 32)])
def test_another_number_of_step_sizes_is_refused(granularity, groups):
    quantizer, weight = fogzo.lsq(2, granularity=granularity), torch.ones(8, 16)
    for count in (3, 16):
        with pytest.raises(ValueError, match=rf"here \({groups}, 1\), got shape \({count}, 1\)"):
            quantizer(weight, torch.ones(count, 1))
    quantizer(weight, torch.ones(groups, 1))


@pytest.mark.parametrize("step", [1e-6, 1e-7, 6e-5, 1e6, 7e4])
def test_a_step_that_the_scale_dtype_cannot_hold_is_refused(step):
    with pytest.raises(ValueError, match=r"does not fit scale_dtype torch\.float16.*bfloat16"):
        fogzo.fixed(2, step_size=step, scale_dtype=torch.float16)
    fogzo.fixed(2, step_size=step, scale_dtype=torch.bfloat16)


@pytest.mark.parametrize("step", [1e-6, 1e6])
def test_a_step_that_the_weights_cannot_hold_is_refused_by_name(step):
    model = nn.Sequential(nn.Linear(4, 4).half())
    with pytest.raises(ValueError, match=r"'0'.*does not fit a weight of torch\.float16"):
        fogzo.quantize_(model, fogzo.fixed(2, step_size=step), lambda *_: True)
    with pytest.raises(ValueError, match=r"'0'.*does not fit a weight of torch\.float16"):
        fogzo.quantize_(
            model, fogzo.lsq(2), lambda *_: True, activations=fogzo.fixed(2, step_size=step)
        )
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "step", [1, 0.05, 1e-8, 1e30, np.float32(0.5), np.float64(0.5), np.int64(2)]
)
def test_any_number_that_can_be_used_is_a_step(step):
    quantizer = fogzo.fixed(2, step_size=step)
    assert quantizer.scale.value == float(step)
    assert quantizer.initial_step_size(torch.randn(3, 4)).item() == pytest.approx(float(step))


def test_what_can_be_meant_is_accepted():
    Surrogate("own", None, Uniform(2.0), kernel=lambda z: torch.exp(-z.abs()) / 2)
    Surrogate("own", None, Uniform(), range_slack=math.inf)
    Grid("wide", -500, 500)
    Scale("lsq", "learned", 0.1)
    assert tanh(2).radius < tanh(1).radius and erf(1).radius == 1 and trust(2).range_slack == 1


def test_codes_of_a_wide_grid_are_kept_whole():
    wide = Quantizer(Grid("wide", -500, 500), fixed_scale(0.01))
    weight = torch.tensor([[4.0, -5.0, 0.01]])
    assert wide.codes(weight).tolist() == [[400, -500, 1]]
    assert fogzo.lsq(8).codes(weight).dtype == torch.int8
    assert Quantizer(unsigned(uniform(8)), fixed_scale(1.0)).codes(weight).dtype == torch.uint8
    assert {g.num_levels for g in (SIGN, TERNARY)} == {2, 3}
