"""Stochastic rounding: smooth in expectation, and the same draw for every probe of a step."""

from dataclasses import replace

import pytest
import torch

import fogzo
from fogzo.quantizers import SIGN, Quantizer, fixed_scale


def linear(quantizer, generator):
    layer = torch.nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    return fogzo.quantize_(layer, replace(quantizer, stochastic=True), lambda module, name: True)


@pytest.mark.parametrize("levels", ["half", "integer"])
def test_the_mean_is_the_clipped_weight_and_the_slope_its_mask(levels):
    quantizer = replace(fogzo.fixed(3, step=1.0, levels=levels), stochastic=True)
    w = torch.linspace(-6, 6, 25).reshape(1, -1).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.stack([quantizer(w, torch.ones(1, 1), training=True) for _ in range(4000)])
    clipped = w.detach().clamp(quantizer.grid.low, quantizer.grid.high)
    assert (draws.mean(0) - clipped).abs().max() < 0.05
    assert set(draws.unique().tolist()) <= {quantizer.grid.low + k for k in range(8)}
    draws[0].sum().backward()
    assert torch.equal(w.grad, (w.detach() == clipped).float())


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
