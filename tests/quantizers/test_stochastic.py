"""Stochastic rounding: smooth in expectation, and the same draw for every probe of a step."""

import logging
from dataclasses import replace

import pytest
import torch
from laws import smooth

import fogzo
from fogzo.quantizers import (
    SIGN,
    SURROGATE_NAMES,
    TERNARY,
    Quantizer,
    Surrogate,
    fixed_scale,
    resolve_surrogate,
    uniform,
)
from fogzo.quantizers.smoothing import Rademacher, Triangular

GRIDS = [SIGN, TERNARY, uniform(2, "half"), uniform(3, "integer")]
EVERY_GRID = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)


def linear(quantizer, generator):
    layer = torch.nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    return fogzo.quantize_(layer, replace(quantizer, stochastic=True), lambda module, name: True)


@pytest.mark.parametrize("levels", ["half", "integer"])
def test_the_mean_is_the_clipped_weight_and_the_slope_its_mask(levels):
    quantizer = fogzo.fixed(3, step_size=1.0, levels=levels, surrogate="identity")
    quantizer = replace(quantizer, stochastic=True)
    w = torch.linspace(-6, 6, 25).reshape(1, -1).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.stack([quantizer(w, torch.ones(1, 1), training=True) for _ in range(2000)])
    clipped = w.detach().clamp(quantizer.grid.low, quantizer.grid.high)
    assert (draws.mean(0) - clipped).abs().max() < 0.05
    assert set(draws.unique().tolist()) <= {quantizer.grid.low + k for k in range(8)}
    draws[0].sum().backward()
    assert torch.equal(w.grad, (w.detach() == clipped).float())


def test_the_mean_loss_is_lotions_which_is_exact_for_diagonal_quadratics():
    # arXiv 2510.08757: L(w) + 1/2 sum of h a^2 f (1 - f), f the fraction of w / a.
    step, h = 0.4, torch.tensor([[0.5, 1.0, 2.0, 4.0]])
    w, target = torch.tensor([[0.1, -0.33, 0.57, 0.2]]), torch.tensor([[0.3, -0.5, 0.1, 0.0]])
    quantizer = replace(fogzo.fixed(4, step_size=step, levels="integer"), stochastic=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rounded = quantizer(w.expand(100_000, -1), torch.full((1, 1), step), training=True)
    losses = 0.5 * (h * (rounded - target) ** 2).sum(1)
    f = (w / step).remainder(1)
    lotion = 0.5 * (h * (w - target) ** 2).sum() + 0.5 * (h * step**2 * f * (1 - f)).sum()
    assert (losses.mean() - lotion).abs() < 5 * losses.std() / 100_000**0.5


@EVERY_GRID
@pytest.mark.parametrize("name", SURROGATE_NAMES)
@pytest.mark.parametrize("of_input", [False, True], ids=["weight", "input"])
def test_the_mean_forward_is_the_smooth_function_of_the_surrogate(grid, name, of_input):
    surrogate = resolve_surrogate(name, grid)
    # Of those that no law explains, by the law that they perturb with where they are identities.
    laws = {"identity_unmasked": "identity", "trust": "identity"}
    expected = resolve_surrogate(laws.get(name, name), grid)
    if expected.law is None:
        expected = resolve_surrogate("identity", grid)
    quantizer = Quantizer(grid, fixed_scale(1.0), surrogate, stochastic=True)
    quantize = quantizer.quantize_input if of_input else quantizer
    x = torch.linspace(-5, 5, 41)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = quantize(x.expand(20_000, -1), torch.ones(1, 1), training=True)
    # Five standard errors of a value that is one of two neighbouring levels, or a few more.
    error = (draws.mean(0) - smooth(expected.law, x, grid)).abs()
    assert error.max() < 5 * grid.spacing * (0.5 + surrogate.radius) / 20_000**0.5


def test_half_precision_rounds_up_as_often_as_it_should():
    quantizer = Quantizer(uniform(2, "half"), fixed_scale(1.0), "tanh", stochastic=True)
    x = torch.tensor([0.01, 0.3, 0.99], dtype=torch.bfloat16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = quantizer(x.expand(100_000, -1), torch.ones(1, 1), training=True)
    assert draws.dtype == torch.bfloat16
    expected = smooth(quantizer.surrogate.law, x.float(), quantizer.grid)
    assert (draws.float().mean(0) - expected).abs().max() < 0.02


@pytest.mark.parametrize("levels", ["half", "integer"])
def test_sums_of_half_precision_do_not_round_onto_thresholds(levels):
    quantizer = replace(fogzo.fixed(8, step_size=1.0, levels=levels), stochastic=True)
    x = torch.arange(64, 96, 0.5, dtype=torch.bfloat16)  # neighbours, of which half are ties
    x = torch.cat([x, -x])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = quantizer(x.expand(5_000, -1), torch.ones(1, 1, dtype=x.dtype), training=True)
    assert draws.dtype == torch.bfloat16
    assert (draws.double().mean(0) - x.double()).abs().max() < 0.05


def _rounds_at_random(name):
    quantizer = replace(fogzo.fixed(2, step_size=1.0, surrogate=name), stochastic=True)
    return lambda w: quantizer(w, torch.ones(1, 1), training=True)


def _seeded(call):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return call()


@pytest.mark.parametrize("name", SURROGATE_NAMES)
@pytest.mark.parametrize("size", [8, 4096])
def test_vmap_draws_what_a_plain_call_draws_for_all_samples_or_for_each(name, size):
    quantize = _rounds_at_random(name)
    w = torch.zeros(3, 1, size)
    same = _seeded(lambda: torch.vmap(quantize, randomness="same")(w))
    each = _seeded(lambda: torch.vmap(quantize, randomness="different")(w))
    plain = _seeded(lambda: quantize(w[0]))
    assert torch.equal(same, plain.expand_as(same))
    assert not torch.equal(each[0], each[1])


@pytest.mark.parametrize("name", ["identity", "tanh", "erf"])
def test_the_compiler_draws_what_a_plain_call_draws(name):
    torch.compiler.reset()
    quantize, w = _rounds_at_random(name), torch.zeros(1, 4096)
    compiled = torch.compile(quantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(_seeded(lambda: compiled(w)), _seeded(lambda: quantize(w)))


@pytest.mark.parametrize("law", [Rademacher(), Triangular()], ids=str)
def test_a_law_of_ones_own_is_what_dithers(law):
    surrogate = Surrogate("own", law, law)
    quantizer = Quantizer(uniform(4, "integer"), fixed_scale(1.0), surrogate, stochastic=True)
    x = torch.full((1, 4000), 0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = quantizer(x, torch.ones(1, 1), training=True)
    assert set(draws.unique().tolist()) == {-1.0, 1.0} | ({0.0} if law != Rademacher() else set())


@pytest.mark.parametrize(
    "surrogate, masks",
    [("identity", True), ("trust", True), ("identity_unmasked", False), ("tanh", False)],
)
def test_a_mask_that_stays_is_said_once(surrogate, masks, caplog):
    with caplog.at_level(logging.WARNING, logger="fogzo"):
        quantizer = replace(fogzo.fixed(2, surrogate=surrogate), stochastic=True)
        quantizer(torch.ones(2, 2), torch.ones(1, 1), training=True)
    assert caplog.text.count('surrogate="identity_unmasked" has no mask') == masks
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fogzo"):
        layer = fogzo.quantize_(
            torch.nn.Linear(4, 4), fogzo.lsq(2), lambda *_: True, activations=quantizer
        )
        layer(torch.rand(3, 4))
    assert not caplog.text and layer.activation_quantizer.grid.low == 0


def test_sign_is_plus_one_as_often_as_the_weight_is_near_it():
    quantizer = Quantizer(SIGN, fixed_scale(1.0), "hardtanh", stochastic=True)
    w = torch.full((1, 20_000), 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mean = quantizer(w, torch.ones(1, 1), training=True).mean()
    assert abs(float(mean) - 0.5) < 0.03


def test_a_learned_step_is_trained_by_what_was_really_rounded():
    quantizer = replace(fogzo.lsq(2), stochastic=True)
    w = torch.tensor([[0.1, 0.7, -5.0, 0.3]])
    step = torch.ones(1, 1, requires_grad=True)
    with torch.random.fork_rng():
        rounded = quantizer(w, step, training=True)
    rounded.sum().backward()
    inside = (w.abs() <= 1.5).float()
    grad_scale = quantizer.scale.grad_scale(w.numel(), quantizer.grid)
    expected = (rounded.detach() - w * inside).sum() * grad_scale
    torch.testing.assert_close(step.grad.sum(), expected)


def test_evaluation_codes_and_baking_round_to_nearest():
    generator = torch.Generator().manual_seed(0)
    layer = linear(fogzo.fixed(2), generator).eval()
    weight = fogzo.quantized_weights(layer)[0]
    nearest = replace(layer.quantizer, stochastic=False)
    baked = nearest(weight.param, layer.weight_step).detach()
    assert torch.equal(layer.quantized_weight(), baked)
    layer.train()
    assert torch.equal(fogzo.dequantize_(layer).weight, baked)


def test_probes_round_with_the_draws_of_the_backward():
    generator = torch.Generator().manual_seed(0)
    layer = linear(fogzo.fixed(2), generator)
    x = torch.randn(4, 16, generator=generator)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(layer), noise_share=0.01)
    with torch.random.fork_rng():
        with estimator.record_rng():
            loss = layer(x).square().mean()
            loss.backward()
        # expected_loss fails unless the unperturbed probe draws what the backward drew
        stats = estimator.refine_grads_(lambda: layer(x).square().mean(), expected_loss=loss)
    assert stats.fallback is None
