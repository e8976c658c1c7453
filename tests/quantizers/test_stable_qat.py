"""StableQAT's slope and its smoothing law."""

import math

import pytest
import torch
from laws import cdf, smooth

from fogzo.quantizers import SIGN, Quantizer, fixed_scale, resolve_surrogate, uniform
from fogzo.quantizers.smoothing import Crest
from fogzo.quantizers.surrogates import stable_qat

F64 = torch.float64


def multiplier(v):
    """The published one, in its own words: K = sqrt2 pi A cos(pi (v + round v))."""
    k = math.sqrt(2) * math.pi * 0.21 * torch.cos(math.pi * (v + v.round()))
    return (1 - k) / (1 + k)


def test_the_slope_is_the_published_multiplier_within_the_range():
    grid, x = uniform(3), torch.linspace(-6, 5, 1201, dtype=F64) + 1e-4
    inside = (x > grid.low) & (x < grid.high)
    slope = stable_qat().slope(x, grid)
    assert torch.allclose(slope[inside], multiplier(x[inside]), atol=1e-12)
    assert (slope[~inside] == 0).all()


def test_it_has_the_known_values():
    grid = uniform(3)
    x = torch.tensor([-1.0, 0.0, 0.25, -0.25, 0.5], dtype=F64)
    expected = torch.tensor([0.0347, 0.0347, 0.2050, 0.2050, 1.0], dtype=F64)
    assert torch.allclose(stable_qat().slope(x, grid), expected, atol=5e-5)
    assert Crest().mean_slope == pytest.approx(0.30246, abs=5e-6)
    assert Crest().radius == pytest.approx(0.16946, abs=5e-6)


@pytest.mark.parametrize("grid", [uniform(2), uniform(3), SIGN], ids=lambda grid: grid.name)
def test_without_amplitude_it_is_the_masked_identity(grid):
    x = torch.randn(1000, dtype=F64, generator=torch.Generator().manual_seed(0)) * 3
    identity = resolve_surrogate("identity", grid)
    slope = stable_qat(grid.spacing, amplitude=0.0).slope(x, grid)
    assert torch.equal(slope, identity.slope(x, grid).to(F64))


@pytest.mark.parametrize("width", [1.0, 2.0])
@pytest.mark.parametrize("amplitude", [0.0, 0.1, 0.21])
def test_the_law_is_one(amplitude, width):
    law = Crest(amplitude, width)
    z = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000 * width - width / 2
    p = law.pdf(z) * width / 200_000
    assert p.sum().item() == pytest.approx(1, abs=1e-7)
    assert (p * z * z).sum().sqrt().item() == pytest.approx(law.radius, rel=1e-6)
    assert (p * z**4).sum().item() / law.radius**4 == pytest.approx(law.kurtosis, rel=1e-6)
    points = torch.linspace(-0.7, 0.7, 29, dtype=F64) * width
    below = (p * (z < points[:, None])).sum(1)
    assert torch.allclose(cdf(law, points), below, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_follow_the_law(dtype):
    law, generator = Crest(), torch.Generator().manual_seed(0)
    u = law.sample_(torch.empty(400_000, dtype=dtype), generator).double()
    assert u.mean().item() == pytest.approx(0, abs=0.01)
    assert u.std().item() == pytest.approx(1, abs=0.005)
    assert u.pow(4).mean().item() == pytest.approx(law.kurtosis, abs=0.03)
    z = u.sort().values * law.radius
    rank = (torch.arange(len(z)) + 0.5) / len(z)
    assert (cdf(law, z) - rank).abs().max() < 0.003  # Kolmogorov and Smirnov: 1.6 / sqrt(n)


def test_normalised_it_is_the_slope_of_a_smoothed_staircase():
    surrogate, grid = stable_qat(normalized=True), uniform(3)
    x = torch.linspace(-5, 4, 451, dtype=F64).requires_grad_()
    (slope,) = torch.autograd.grad(smooth(surrogate.law, x, grid).sum(), x)
    away = ((x * 2) - (x * 2).round()).abs() > 1e-6
    assert torch.allclose(slope[away], surrogate.slope(x.detach(), grid)[away], atol=1e-9)
    ratio = surrogate.slope(x.detach(), grid) * Crest().mean_slope
    assert torch.allclose(ratio, stable_qat().slope(x.detach(), grid), atol=1e-12)


def test_a_quantizer_takes_it_by_name():
    w = torch.tensor([[0.5, 0.25, 0.1, 7.0]], dtype=F64, requires_grad=True)
    Quantizer(uniform(3), fixed_scale(1.0), "stable_qat")(w, torch.ones(1, 1)).sum().backward()
    assert w.grad[0].tolist() == pytest.approx(
        [1.0, 0.2050, multiplier(torch.tensor(0.1)).item(), 0], abs=5e-5
    )


@pytest.mark.parametrize("amplitude", [-0.1, 0.3, math.nan, "0.2"])
def test_an_impossible_amplitude_is_refused(amplitude):
    with pytest.raises(ValueError, match=r"crest must be from 0 to less than 0\.2251"):
        Crest(amplitude)
