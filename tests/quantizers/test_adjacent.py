"""The slope of a drawn level: exact where the loss is a parabola, and what it does to a layer."""

import copy
import io
import itertools
from dataclasses import replace

import pytest
import torch

import fogzo
from fogzo.quantizers import Surrogate, adjacent, uniform
from fogzo.quantizers.smoothing import Logistic, Normal, Rademacher, Triangular, Uniform
from toolbox import draw, every

GRID = uniform(2, "half")
LEVELS = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)
# With nothing raised that is divided by.
EXACT = {
    "uniform": adjacent(least_probability=1e-12),
    "triangular": adjacent(Triangular(1.0), least_probability=1e-12),
    "logistic": adjacent(Logistic(3.0), least_probability=1e-12),
    "normal": adjacent(Normal(0.4), least_probability=1e-12),
}
X = torch.tensor([-0.9, 0.37, 1.21], dtype=torch.float64)


def probabilities(x, law):
    """Of each level, differentiable."""
    cuts = torch.tensor(GRID.thresholds, dtype=x.dtype)
    above = law.cdf(x[:, None] - cuts)
    ones = torch.ones_like(above[:, :1])
    return torch.cat([ones, above], 1) - torch.cat([above, 0 * ones], 1)


def expectation(surrogate, of):
    """Mean over all draws of three weights of ``of(levels)``, weighted by their probability."""
    law, total = surrogate.perturbation, 0
    x = X.clone().requires_grad_()
    p = probabilities(x, law)
    for codes in itertools.product(range(4), repeat=3):
        share = p[0, codes[0]] * p[1, codes[1]] * p[2, codes[2]]
        total = total + share * of(LEVELS[list(codes)])
    return x, total


def bias(surrogate, loss):
    """The slope of the mean loss, and by how much the mean of the gradients differs from it."""
    x, mean = expectation(surrogate, loss)
    (truth,) = torch.autograd.grad(mean, x)

    def gradient(levels):
        q = levels.clone().requires_grad_()
        (own,) = torch.autograd.grad(loss(q), q)
        return own * surrogate.slope_of_drawn(X, levels, GRID)

    return truth, (expectation(surrogate, gradient)[1].detach() - truth).norm()


A = draw(3, 3, dtype=torch.float64)
QUADRATIC = lambda q: q @ A @ A.T @ q + (A[0] * q).sum()  # noqa: E731
CUBIC = lambda q: QUADRATIC(q) + (q**3).sum()  # noqa: E731


@every("surrogate", EXACT)
def test_it_is_exact_on_quadratics_and_not_on_cubics(surrogate):
    truth, error = bias(surrogate, QUADRATIC)
    assert truth.norm() > 1 and error < 1e-9
    assert bias(surrogate, CUBIC)[1] > 0.05


def test_least_probabilities_bias_it_and_bound_it():
    x = torch.tensor([0.45, 0.0], dtype=torch.float64)  # 0.05 and 0.5 from a level
    level = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    slopes = adjacent().slope_of_drawn(x, level, GRID)
    torch.testing.assert_close(slopes, torch.tensor([5.0, 1.0], dtype=torch.float64))
    truth, error = bias(adjacent(least_probability=0.5), QUADRATIC)
    assert error > 0.05 * truth.norm()


@every("surrogate", EXACT)
def test_its_mean_is_the_slope_without_draws(surrogate):
    mean = expectation(surrogate, lambda levels: surrogate.slope_of_drawn(X, levels, GRID))[1]
    torch.testing.assert_close(mean.detach(), surrogate.slope(X, GRID).to(X))


def drawn(quantizer, **options):
    return replace(quantizer, surrogate="adjacent", stochastic=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learned", [False, True])
def test_a_layer_gets_the_slope_of_its_own_draw(learned, dtype):
    quantizer = drawn(fogzo.lsq(2) if learned else fogzo.fixed(2, step_size=0.5))
    w = draw(8, 16).to(dtype).requires_grad_()
    step = torch.full((1, 1), 0.5, dtype=dtype, requires_grad=learned)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        level = quantizer(w, step, training=True)
        level.sum().backward()
    x = w.detach().float() / 0.5
    expected = adjacent().slope_of_drawn(x, level.detach().float() / 0.5, GRID)
    torch.testing.assert_close(w.grad, expected.to(dtype))
    assert expected[x.abs() > 1.5].eq(1).all() and expected.max() > 1.5
    if learned:
        inside = (x.abs() <= 1.5) * expected
        total = (level.detach().float() / 0.5 - x * inside).sum()
        scale = quantizer.scale.grad_scale(w.numel(), GRID)
        torch.testing.assert_close(step.grad.float().sum(), scale * total, rtol=0.02, atol=0.02)


@every("surrogate", EXACT)
def test_what_perturbs_instead_of_the_law_leaves_the_slope_alone(surrogate):
    changed = replace(surrogate, perturbation=Rademacher())
    x, level = torch.tensor([0.1, 0.4, 0.9, 5.0]), torch.tensor([0.0, 1.0, 1.0, 3.0])
    slopes = [one.slope_of_drawn(x, level, uniform(3)) for one in (changed, surrogate)]
    assert torch.equal(*slopes)


def test_in_evaluation_it_rounds_to_the_nearest_and_passes_gradients_as_they_are():
    quantizer, w = drawn(fogzo.fixed(2, step_size=0.5)), draw(4, 8).requires_grad_()
    q = quantizer(w, torch.full((1, 1), 0.5))
    q.sum().backward()
    assert torch.equal(q, fogzo.fixed(2, step_size=0.5)(w, torch.full((1, 1), 0.5)))
    assert (w.grad == 1).all()


@pytest.mark.parametrize("spacing", [1.0, 2.0])
def test_on_grids_of_any_spacing_it_is_as_wide_as_a_step(spacing):
    grid = replace(GRID, spacing=spacing, offset=spacing / 2)
    x = spacing * X
    own = adjacent(spacing=spacing).slope_of_drawn(x, spacing * LEVELS[1:], grid)
    torch.testing.assert_close(own, adjacent().slope_of_drawn(X, LEVELS[1:], GRID))


def test_the_slope_of_a_draw_needs_a_draw():
    with pytest.raises(ValueError, match=r"replace\(fogzo.fixed\(2\), surrogate='adjacent', stoch"):
        fogzo.fixed(2, surrogate="adjacent")
    with pytest.raises(ValueError, match=r"'adjacent'.*stochastic=True"):
        replace(drawn(fogzo.ternary()), stochastic=False)
    for least in (0.0, -1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match="least_probability must be above 0"):
            Surrogate("own", None, Uniform(), range_slack=0.0, least_probability=least)


def test_probes_see_the_draws_of_the_backward_pass_and_copies_keep_the_slope():
    layer = torch.nn.Linear(16, 8)
    with torch.no_grad():
        layer.weight.copy_(draw(8, 16))
    fogzo.quantize_(layer, drawn(fogzo.fixed(2, step_size=0.5)), lambda *_: True)
    file = io.BytesIO()
    torch.save(copy.deepcopy(layer), file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    x = draw(4, 16)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(layer), noise_share=0.01)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with estimator.record_rng():
            loss = layer(x).square().mean()
            loss.backward()
        assert (
            estimator.refine_grads_(lambda: layer(x).square().mean(), expected_loss=loss).fallback
            is None
        )
        layer.zero_grad()
        grads = []
        for made in (layer, other):
            torch.manual_seed(1)
            made(x).square().mean().backward()
            grads.append(made.weight.grad)
    assert torch.equal(*grads) and grads[0].any()


# What drawing has to do with a flow of particles (docs/dynamics.md)


def test_following_drawn_levels_and_matching_the_mean_is_ste_on_a_bernoulli():
    # Particles z of 0 and 1 move to z - eta f'(z); the law of the same mean moves as STE's does.
    mu, slopes = 0.3, torch.tensor([-1.0, 0.4], dtype=torch.float64)
    weight = torch.tensor([[mu - 0.5]], dtype=torch.float64).requires_grad_()  # levels -+ 1/2
    quantizer = replace(
        fogzo.fixed(1, step_size=1.0, surrogate="identity_unmasked"), stochastic=True
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        q = quantizer(weight.expand(40_000, 1), torch.ones(1, 1), training=True)
    q.backward(slopes[(q.detach() > 0).long()] / len(q))
    gradient = (1 - mu) * slopes[0] + mu * slopes[1]
    assert weight.grad.item() == pytest.approx(float(gradient), abs=0.02)
    moved = [mu - eta * float(gradient) for eta in (0.01, 0.1, 0.3, 0.6)]
    assert moved == pytest.approx([0.306, 0.358, 0.474, 0.648], abs=5e-4)
    # The nearest law in the Wasserstein metric does not move at all for small steps.
    for eta, nearest in ((0.01, 0.3), (0.1, 0.3), (0.3, 0.3), (0.6, 1.0)):
        assert float(nearest_bernoulli(mu, slopes, eta)) == pytest.approx(nearest, abs=1e-3)


def nearest_bernoulli(mu, slopes, eta):
    """The p of least squared Wasserstein distance from the moved particles, on a grid."""
    z = (torch.arange(2000) >= 2000 * (1 - mu)).double()
    moved = (z - eta * torch.where(z > 0, slopes[1], slopes[0])).sort().values
    zero = torch.cat([torch.zeros(1), moved.square().cumsum(0)])  # the lowest k particles to 0
    one = torch.cat([(1 - moved).square().flip(0).cumsum(0).flip(0), torch.zeros(1)])
    return 1 - (zero + one).argmin() / 2000


def test_the_same_slope_for_counts_is_exact_on_quadratics():
    # A Poisson count has levels without end; half of f'(z) and half of z / rate f'(z) is what the
    # two thresholds of a level are here.
    z = torch.arange(200, dtype=torch.float64)
    slope = lambda z: 2 * z - 5  # of a quadratic  # noqa: E731
    for rate, truth, ste in ((0.5, -3.0, -4.0), (3.0, 2.0, 1.0), (10.0, 16.0, 15.0)):
        p = torch.exp(z * torch.log(torch.tensor(rate)) - rate - torch.lgamma(z + 1))
        found = (p * slope(z) * (1 + z / rate) / 2).sum()
        assert float(found) == pytest.approx(truth)
        assert float((p * slope(z)).sum()) == pytest.approx(ste)
