"""Grids: levels, thresholds, ties, and the step that is best for a Gaussian."""

import math

import numpy as np
import pytest
import torch
from torch import Generator

from fogzo.quantizers import SIGN, TERNARY, Grid, uniform, unsigned

BITS = range(1, 9)
LEVELS = ("half", "integer", "unsigned")
GRIDS = [SIGN, TERNARY, *(uniform(b, levels) for b in BITS for levels in LEVELS)]
EVERY_GRID = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)


def _levels(grid: Grid) -> torch.Tensor:
    return grid.level(torch.arange(grid.low_code, grid.high_code + 1).double())


@pytest.mark.parametrize("bits", BITS)
def test_integer_levels_are_twos_complement(bits):
    grid = uniform(bits, "integer")
    assert _levels(grid).tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert grid.bits == bits and grid.num_levels == 2**bits


@pytest.mark.parametrize("bits", BITS)
def test_half_levels_are_symmetric(bits):
    levels = _levels(uniform(bits, "half"))
    assert torch.equal(levels, -levels.flip(0))
    assert torch.equal(levels.diff(), torch.ones(2**bits - 1).double())
    assert levels.abs().min() == 0.5


@pytest.mark.parametrize("bits", BITS)
def test_unsigned_levels_count_from_zero(bits):
    grid = uniform(bits, "unsigned")
    assert _levels(grid).tolist() == list(range(2**bits))
    assert grid.bits == bits
    assert unsigned(uniform(bits, "half")) == unsigned(uniform(bits, "integer")) == grid


@pytest.mark.parametrize("grid", [SIGN, TERNARY, uniform(2, "unsigned"), Grid("own", -500, 500)])
def test_only_signed_uniform_grids_have_an_unsigned_twin(grid):
    assert unsigned(grid) is grid


def test_half_levels_are_the_default_up_to_two_bits():
    assert [uniform(bits) for bits in (1, 2)] == [uniform(bits, "half") for bits in (1, 2)]
    assert [uniform(bits) for bits in (3, 8)] == [uniform(bits, "integer") for bits in (3, 8)]


def test_named_grids_have_their_levels():
    assert _levels(TERNARY).tolist() == [-1, 0, 1] and TERNARY.bits == pytest.approx(
        1.585, abs=1e-3
    )
    assert _levels(SIGN).tolist() == [-1, 1] and SIGN.bits == 1


@EVERY_GRID
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_value_goes_to_its_nearest_level(grid, dtype):
    x = torch.empty(2000, dtype=dtype).normal_(
        0, grid.high + 1, generator=Generator().manual_seed(1)
    )
    levels = _levels(grid)
    chosen = (grid.round(x).double() - x.double()).abs()
    nearest = (levels - x.double()[:, None]).abs().min(1).values
    assert torch.equal(chosen, nearest)
    assert grid.round(x).dtype == dtype


@EVERY_GRID
def test_codes_are_in_range_and_fit_eight_bits(grid):
    x = torch.tensor([-math.inf, -1e30, -300.0, -0.3, 0.0, 0.3, 300.0, 1e30, math.inf])
    code = grid.round_to_code(x)
    assert code.min() == grid.low_code and code.max() == grid.high_code
    dtype = torch.uint8 if grid.low_code >= 0 else torch.int8
    assert torch.equal(code.to(dtype).to(code.dtype), code)
    assert torch.equal(grid.level(code), grid.round(x))


@EVERY_GRID
def test_levels_are_their_own_rounding(grid):
    assert torch.equal(grid.round(_levels(grid)), _levels(grid))


@EVERY_GRID
def test_thresholds_lie_between_neighbouring_levels(grid):
    levels = _levels(grid)
    assert grid.thresholds == tuple(((levels[1:] + levels[:-1]) / 2).tolist())
    below = torch.tensor([math.nextafter(t, -math.inf) for t in grid.thresholds]).double()
    above = torch.tensor(grid.thresholds).double() + 1e-9
    assert torch.equal(grid.round(below - 1e-9), levels[:-1])
    assert torch.equal(grid.round(above), levels[1:])


@EVERY_GRID
def test_rounding_leaves_its_input_alone(grid):
    x = torch.tensor([-2.7, 0.2, 9.0])
    grid.round(x)
    assert x.tolist() == pytest.approx([-2.7, 0.2, 9.0])


def test_the_sign_of_zero_is_plus_one():
    assert SIGN.round(torch.tensor([0.0, -0.0])).tolist() == [1, 1]


@pytest.mark.parametrize("grid", [SIGN, *(uniform(b, "half") for b in BITS)], ids=lambda g: g.name)
@pytest.mark.parametrize("tiny", [1e-9, 1e-30])
def test_a_tiny_negative_value_rounds_down_where_zero_is_a_threshold(grid, tiny):
    lowest_positive = grid.spacing / 2
    assert grid.round(torch.tensor([-tiny, tiny])).tolist() == [-lowest_positive, lowest_positive]


def test_ties_go_to_even_on_integer_grids_and_up_on_half_grids():
    integer, half = uniform(4, "integer"), uniform(4, "half")
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert integer.round(x).tolist() == [-2, -2, 0, 0, 2, 2]
    assert half.round(x + 0.5).tolist() == [-1.5, -0.5, 0.5, 1.5, 2.5, 3.5]


@pytest.mark.parametrize(
    "grid, edge",
    [
        (uniform(1, "half"), 0.7978845),
        (TERNARY, 1.2240),
        (uniform(2, "half"), 1.4935346),
        (uniform(3, "half"), 2.0510684),
        (uniform(4, "half"), 2.5139306),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_gaussian_step_gives_the_published_end_levels(grid, edge):
    assert grid.gaussian_step_size * grid.high == pytest.approx(edge, abs=1e-4)


def test_the_gaussian_step_of_the_two_bit_grids_is_as_measured():
    assert uniform(2, "half").gaussian_step_size == pytest.approx(0.996, abs=1e-3)
    assert uniform(2, "integer").gaussian_step_size == pytest.approx(1.049, abs=1e-3)
    assert SIGN.gaussian_step_size == pytest.approx(math.sqrt(2 / math.pi), abs=1e-6)


@pytest.mark.parametrize("spacing", [1 / 512, 0.01, 64.0])
def test_the_gaussian_step_fits_any_spacing(spacing):
    usual = uniform(8)
    wide = Grid("wide", usual.low_code, usual.high_code, spacing=spacing)
    assert wide.gaussian_step_size * spacing == pytest.approx(usual.gaussian_step_size, rel=1e-5)


@EVERY_GRID
def test_no_other_step_has_a_smaller_error_on_a_gaussian(grid):
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(8))

    def error(step: float) -> float:
        # Split at the thresholds, where the integrand jumps.
        cuts = torch.tensor(grid.thresholds).double() * step
        edges = torch.cat([torch.linspace(-9, 9, 73).double(), cuts.clamp(-9, 9)]).sort().values
        half, middle = edges.diff() / 2, (edges[1:] + edges[:-1]) / 2
        x = middle[:, None] + half[:, None] * nodes
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        loss = (x - step * grid.round(x / step)).square() * density
        return (loss * half[:, None] * weights).sum().item()

    best = error(grid.gaussian_step_size)
    for factor in (0.5, 0.8, 0.95, 0.99, 1.01, 1.05, 1.2, 2.0):
        assert best < error(grid.gaussian_step_size * factor)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, "2", None, True])
def test_bits_outside_one_to_eight_are_refused(bits):
    with pytest.raises(ValueError, match=r"from 1 to 8.*fogzo\.fixed\(bits=2\)"):
        uniform(bits)


def test_unknown_levels_are_refused():
    with pytest.raises(ValueError, match=r'fogzo\.fixed\(bits=3, levels="half"\)'):
        uniform(3, "centred")


@pytest.mark.parametrize(
    "make", [lambda: Grid("x", 1, 1), lambda: Grid("x", -1, 1, 0.3), lambda: Grid("x", 0, 1, 0, -1)]
)
def test_an_impossible_grid_is_refused(make):
    with pytest.raises(ValueError, match=r"use low_code|must be"):
        make()
