"""The table of smoothing laws, by quadrature: E Q(x + z) is the surrogate, its slope the backward.

The densities and closed forms here are written out again from the table, so that the laws in the
package are checked against something they did not compute themselves.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from laws import cdf, smooth
from torch import Generator, Tensor

from fogzo.quantizers import (
    SIGN,
    SURROGATE_NAMES,
    TERNARY,
    Surrogate,
    resolve_surrogate,
    uniform,
)
from fogzo.quantizers import surrogates as named
from fogzo.quantizers.smoothing import (
    Logistic,
    Normal,
    Rademacher,
    SmoothingLaw,
    Triangular,
    Uniform,
)

GRIDS = [
    SIGN,
    TERNARY,
    *(uniform(bits, levels) for bits in (1, 2, 3, 4) for levels in ("half", "integer")),
]
LAWLESS = {"identity_unmasked", "trust", "stable_qat"}
WITH_LAW = [name for name in SURROGATE_NAMES if name not in LAWLESS]
F64 = torch.float64

# No multiple of 1/4, where slopes of the piecewise surrogates jump.
POINTS = torch.arange(-9.9, 9.9, 0.331, dtype=F64) + 0.0123


# law -> (density, radius, kurtosis), from the table of the method.
TABLE: dict[str, tuple[SmoothingLaw, object, float, float]] = {
    "round/identity": (Uniform(), lambda z: (z.abs() <= 0.5).to(F64), 0.288675, 1.8),
    "sign/hardtanh": (Uniform(2.0), lambda z: (z.abs() <= 1).to(F64) / 2, 0.577350, 1.8),
    "triangle": (Triangular(), lambda z: (1 - z.abs()).clamp(min=0), 0.408248, 2.4),
    "tanh": (Logistic(), lambda z: 0.5 / torch.cosh(z) ** 2, 0.906900, 4.2),
    "tanh, tau 3": (Logistic(3.0), lambda z: 1.5 / torch.cosh(3 * z) ** 2, 0.302300, 4.2),
    "erf": (
        Normal(0.5),
        lambda z: torch.exp(-2 * z * z) * math.sqrt(2 / math.pi),
        0.5,
        3.0,
    ),
    "erf, sigma 1.3": (
        Normal(1.3),
        lambda z: torch.exp(-z * z / 3.38) / (1.3 * math.sqrt(2 * math.pi)),
        1.3,
        3.0,
    ),
}
LAWS = pytest.mark.parametrize("law, density, radius, kurtosis", TABLE.values(), ids=TABLE.keys())


def _quadrature(cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [-24, 24], split at ``cuts`` (a row per integral)."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(12))
    halves = torch.arange(-24, 24.5, 0.5, dtype=F64).expand(len(cuts), -1)
    edges = torch.cat([halves, cuts.clamp(-24, 24)], 1).sort(1).values
    half = (edges[:, 1:] - edges[:, :-1]) / 2
    middle = (edges[:, 1:] + edges[:, :-1]) / 2
    z = middle[..., None] + half[..., None] * nodes
    return z.flatten(1), (half[..., None] * weights).flatten(1)


def _density_of(law: SmoothingLaw):
    return next(density for other, density, *_ in TABLE.values() if other == law)


@LAWS
def test_density_radius_and_kurtosis_are_those_of_the_table(law, density, radius, kurtosis):
    z, weight = _quadrature(torch.zeros(1, 1, dtype=F64))
    p = density(z)
    assert (p * weight).sum().item() == pytest.approx(1, abs=1e-9)
    assert (p * z * z * weight).sum().sqrt().item() == pytest.approx(law.radius, rel=1e-9)
    fourth = (p * z**4 * weight).sum().item() / law.radius**4
    assert fourth == pytest.approx(law.kurtosis, rel=1e-9)
    assert law.radius == pytest.approx(radius, abs=2e-6)
    assert law.kurtosis == pytest.approx(kurtosis, abs=2e-6)
    assert torch.allclose(law.pdf(z), p, atol=1e-9)


@LAWS
def test_the_cdf_integrates_the_density(law, density, radius, kurtosis):
    x = torch.linspace(-4, 4, 81, dtype=F64) + 0.003
    z, weight = _quadrature(x[:, None])
    below = (density(z) * (z < x[:, None]) * weight).sum(1)
    assert torch.allclose(cdf(law, x), below, atol=1e-9)
    assert torch.allclose(cdf(law, x) + cdf(law, -x), torch.ones_like(x))


@pytest.mark.parametrize("name", WITH_LAW)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_the_expected_staircase_is_the_surrogate(name, grid):
    surrogate = resolve_surrogate(name, grid)
    thresholds = torch.tensor(grid.thresholds, dtype=F64)
    z, weight = _quadrature(thresholds - POINTS[:, None])
    expected = (grid.round(POINTS[:, None] + z) * _density_of(surrogate.law)(z) * weight).sum(1)
    assert (smooth(surrogate.law, POINTS, grid) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", WITH_LAW)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_the_slope_is_the_derivative_of_the_surrogate(name, grid):
    surrogate, h = resolve_surrogate(name, grid), 1e-5
    above, below = (smooth(surrogate.law, POINTS + d, grid) for d in (h, -h))
    difference = (above - below) / (2 * h)
    assert torch.allclose(surrogate.slope(POINTS, grid).to(F64), difference, atol=1e-7)


@pytest.mark.parametrize("name", WITH_LAW)
def test_the_radius_belongs_to_the_law_that_gives_the_slope(name):
    surrogate = resolve_surrogate(name, TERNARY)
    assert surrogate.perturbation == surrogate.law
    assert surrogate.radius == surrogate.law.radius


@pytest.mark.parametrize(
    "name, formula",
    {
        "identity": lambda x: x.clamp(-1, 1),
        "hardtanh": lambda x: x.clamp(-1, 1),
        "tanh": torch.tanh,
        "approx_sign": lambda x: torch.where(x.abs() < 1, 2 * x - x * x.abs(), x.sign()),
        "erf": lambda x: torch.erf(x / (math.sqrt(2) * 0.5)),
    }.items(),
)
def test_sign_becomes_the_function_that_names_the_surrogate(name, formula):
    x = torch.linspace(-2.5, 2.5, 101, dtype=F64)
    surrogate = resolve_surrogate(name, SIGN)
    assert torch.allclose(smooth(surrogate.law, x, SIGN), formula(x), atol=1e-12)


@pytest.mark.parametrize("tau", [0.5, 2.0, 7.0])
def test_tanh_takes_its_sharpness(tau):
    x = torch.linspace(-2.5, 2.5, 101, dtype=F64)
    surrogate = named.tanh(tau)
    assert torch.allclose(smooth(surrogate.law, x, SIGN), torch.tanh(tau * x))
    assert torch.allclose(surrogate.slope(x, SIGN), tau / torch.cosh(tau * x) ** 2)
    assert surrogate.radius == pytest.approx(math.pi / (math.sqrt(12) * tau))


@pytest.mark.parametrize("grid", [TERNARY, *GRIDS[2:]], ids=lambda grid: grid.name)
def test_the_smooth_identity_is_the_clip_to_the_end_levels(grid):
    law = resolve_surrogate("identity", grid).law
    clip = POINTS.clamp(grid.low, grid.high)
    assert torch.allclose(smooth(law, POINTS, grid), clip, atol=1e-12)


@pytest.mark.parametrize("name", sorted(LAWLESS))
def test_a_surrogate_that_no_law_explains_perturbs_with_one(name):
    surrogate = resolve_surrogate(name, TERNARY)
    assert surrogate.law is None and isinstance(surrogate.perturbation, SmoothingLaw)


@pytest.mark.parametrize(
    "kernel, formula",
    [
        (
            lambda z: 0.3 / (math.pi * (z * z + 0.3**2)),
            lambda x: 2 / math.pi * torch.atan(x / 0.3),
        ),
        (lambda z: 1.5 / (1 + 3 * z.abs()) ** 2, lambda x: 3 * x / (1 + 3 * x.abs())),
    ],
    ids=["arctangent", "fast sigmoid"],
)
def test_a_kernel_of_ones_own_without_a_law_is_the_slope(kernel, formula):
    surrogate = Surrogate("own", None, Uniform(2.0), kernel=kernel)
    x = POINTS.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(formula(x).sum(), x)
    assert torch.allclose(surrogate.slope(POINTS, SIGN), derivative)
    assert surrogate.radius == Uniform(2.0).radius


@pytest.mark.parametrize("perturbation", [Uniform(2.0), Rademacher()], ids=str)
@pytest.mark.parametrize("name", sorted({*LAWLESS, *WITH_LAW}))
def test_what_perturbs_instead_of_the_law_leaves_the_slope_alone(name, perturbation):
    x, grid = torch.linspace(-2, 2, 41), TERNARY
    surrogate = resolve_surrogate(name, grid)
    changed = replace(surrogate, perturbation=perturbation)
    assert torch.equal(changed.slope(x, grid), surrogate.slope(x, grid))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("cells", [1, 2, 3])
def test_where_two_cells_meet_one_of_them_counts(grid, cells):
    law = Uniform(cells * grid.spacing)
    # Levels and thresholds, and so all ends of cells; a sum of clips has one slope on either side.
    x = torch.arange(-6, 7, dtype=F64) * grid.spacing / 2
    slope, before, after = (
        Surrogate("own", law, law).slope(p, grid) for p in (x, x - 0.1, x + 0.1)
    )
    assert torch.allclose(slope, torch.maximum(before, after))


def test_the_masks_end_where_their_papers_say():
    grid = uniform(2, "half")
    x = torch.tensor([-2.01, -2.0, -1.51, -1.5, 0.0, 1.5, 1.51, 2.0, 2.01])
    inside, trusted = x.abs() <= 1.5, x.abs() <= 2
    assert torch.equal(resolve_surrogate("identity", grid).slope(x, grid), inside)
    assert torch.equal(resolve_surrogate("trust", grid).slope(x, grid), trusted)
    assert resolve_surrogate("identity_unmasked", grid).slope(x, grid).all()


@LAWS
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_samples_follow_the_law(law, density, radius, kurtosis, dtype):
    count = 100_000
    out = torch.empty(count, dtype=dtype)
    u = law.sample_(out, Generator().manual_seed(11))
    assert u is out and u.isfinite().all()
    u = u.double()
    # Five standard errors of each moment; E u^8 bounds the error of the fourth.
    assert abs(u.mean().item()) < 5 / math.sqrt(count)
    assert abs(u.square().mean().item() - 1) < 5 * math.sqrt((kurtosis - 1) / count)
    assert abs((u**4).mean().item() - kurtosis) < 5 * (u**8).mean().sqrt().item() / count**0.5
    # Kolmogorov-Smirnov at p = 1e-4.
    ranks = torch.arange(1, count + 1, dtype=F64) / count
    found = cdf(law, u.sort().values * law.radius)
    distance = torch.maximum((ranks - found).abs(), (ranks - 1 / count - found).abs()).max()
    assert distance < 2.23 / math.sqrt(count)


@pytest.mark.parametrize("count", [1, 3, 4, 7, 4096, 2**16 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_uniform_noise_on_a_cpu_is_made_of_odd_16_bit_integers(count, dtype):
    u = Uniform().sample_(torch.empty(count, dtype=dtype), Generator().manual_seed(6))
    codes = u.double() * (2**15 / math.sqrt(3))
    odd = codes.round()
    assert (codes - odd).abs().max() < 0.01
    assert (odd.abs() % 2 == 1).all() and odd.abs().max() < 2**15
    assert len(odd.unique()) > min(count, 2**15) / 2


def test_uniform_noise_is_uniform_in_all_its_bits():
    count = 100_000
    u = Uniform().sample_(torch.empty(count, dtype=F64), Generator().manual_seed(6))
    codes = (u * (2**15 / math.sqrt(3))).round().long()
    for bit in range(1, 16):
        share = ((codes >> bit) & 1).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(count)


def test_noise_of_a_part_of_a_tensor_is_of_the_same_law():
    out = torch.zeros(64, 64).t()[::2]  # not contiguous
    Uniform().sample_(out, Generator().manual_seed(6))
    assert out.square().mean().item() == pytest.approx(1, abs=0.1)
    assert out.abs().max() <= math.sqrt(3)


@LAWS
def test_neighbouring_samples_are_independent(law, density, radius, kurtosis):
    u = law.sample_(torch.empty(40_000), Generator().manual_seed(3))
    for lag in (1, 2, 3, 4, 5):  # several values may come from one draw of the generator
        assert abs((u[lag:] * u[:-lag]).mean().item()) < 5 / math.sqrt(len(u))
        squares = (u.square()[lag:] - 1) * (u.square()[:-lag] - 1)
        assert abs(squares.mean().item()) < 5 * (kurtosis - 1) / math.sqrt(len(u))


@LAWS
def test_samples_depend_on_their_generator_alone(law, density, radius, kurtosis):
    state = torch.get_rng_state()
    first = law.sample_(torch.empty(3, 7), Generator().manual_seed(5))
    again = law.sample_(torch.empty(3, 7), Generator().manual_seed(5))
    other = law.sample_(torch.empty(3, 7), Generator().manual_seed(6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "make, advice",
    [
        (lambda: named.tanh(0.0), r"tanh\(tau=1\.0\)"),
        (lambda: named.tanh(math.inf), r"tanh\(tau=1\.0\)"),
        (lambda: named.erf(-1.0), r"erf\(sigma=0\.5\)"),
    ],
)
def test_a_bad_shape_of_a_law_is_refused_with_a_good_one(make, advice):
    with pytest.raises(ValueError, match=advice):
        make()
