"""WinQ's noise: on weights and learned ranges, in training alone, and the same in every probe."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fogzo
from toolbox import EVERY_PRESET, PRESETS, Snapshot, draw, everything, fill, streams_put_back

SIGMA = 0.05


def layer(quantizer, noise=SIGMA):
    own = fill(nn.Linear(16, 8, bias=False), 0.5)
    return fogzo.quantize_(own, replace(quantizer, noise=noise), everything)


@EVERY_PRESET
def test_it_is_off_in_evaluation_codes_and_baked_weights(preset):
    noisy, plain = (layer(PRESETS[preset](), noise=noise) for noise in (0.5, 0.0))
    expected = plain.quantized_weight()
    with streams_put_back(1):  # 0 would draw the weights again, and change no sign
        before = torch.get_rng_state()
        assert torch.equal(noisy.codes(), plain.codes())
        assert torch.equal(noisy.eval().quantized_weight(), expected)
        assert torch.equal(before, torch.get_rng_state())
        assert not torch.equal(noisy.train().quantized_weight(), expected)
        assert torch.equal(fogzo.dequantize_(noisy).weight, expected)


def test_weights_are_rounded_as_often_as_a_gaussian_carries_them_over():
    quantizer = replace(fogzo.fixed(4, step_size=1.0, levels="integer"), noise=0.2)
    w = torch.full((1, 200_000), 0.3, requires_grad=True)  # one sigma below the threshold
    with streams_put_back(0):
        rounded = quantizer(w, torch.ones(1, 1), training=True)
    assert rounded.mean().item() == pytest.approx(0.15866, abs=5 * (0.16 * 0.84 / 2e5) ** 0.5)
    rounded.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))  # straight through


def test_the_largest_level_moves_by_the_same_deviation():
    quantizer = replace(fogzo.lsq(2, granularity="channel"), noise=0.01)  # each step moves alone
    w, step = torch.tensor([[5.0, -5.0]]), torch.full((4000, 1), 0.4, requires_grad=True)
    with streams_put_back(0):
        ends = quantizer(w.repeat(4000, 1), step, training=True)
    ends.sum().backward()
    largest = ends[:, 0].detach()
    assert torch.equal(ends[:, 0], -ends[:, 1])
    assert largest.mean().item() == pytest.approx(1.5 * 0.4, abs=5 * 0.01 / 4000**0.5)
    assert largest.std().item() == pytest.approx(0.01, rel=0.05)
    assert step.grad is not None


def test_a_step_stays_positive_whatever_the_noise():
    quantizer = replace(fogzo.lsq(2), noise=10.0)
    with streams_put_back(0):
        for _ in range(100):
            end = quantizer(torch.full((1, 1), 1e4), torch.full((1, 1), 0.4), training=True)
            assert end.item() >= 1.5 * 0.2


@EVERY_PRESET
def test_probes_see_the_noise_of_the_backward_pass_and_give_the_stream_back(preset):
    model = fill(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)))
    fogzo.quantize_(model, replace(PRESETS[preset](), noise=SIGMA), everything)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.01)
    x = draw(4, 16)
    with streams_put_back(0):
        with estimator.record_rng():
            loss = model(x).square().mean()
            loss.backward()
        before = Snapshot(model)
        # expected_loss fails unless the unperturbed probe draws what the backward pass drew
        stats = estimator.refine_grads_(lambda: model(x).square().mean(), expected_loss=loss)
        before.assert_same([weight.name for weight in fogzo.quantized_weights(model)])
    assert stats.fallback is None


@pytest.mark.parametrize("noise", [-0.1, float("nan"), "much", True])
def test_what_is_no_deviation_is_refused(noise):
    with pytest.raises(ValueError, match=r"noise must be a standard deviation.*noise=0\.001"):
        replace(fogzo.lsq(2), noise=noise)


# ParetoQ's quantizer, which WinQ's authors train


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_of_paretoqs_levels_are_its_own_up_to_the_last_level(bits):
    levels = 2 ** (bits - 1)
    quantizer = fogzo.lsq(
        bits, levels="half", init="range", surrogate="trust", granularity="channel"
    )
    w = draw(8, 64, seed=bits).requires_grad_()
    alpha = w.detach().abs().amax(1, keepdim=True) * 0.7  # so that some are beyond
    step = (alpha / levels).requires_grad_()
    found = quantizer(w, step)
    found.sum().backward()

    x = w.detach() / alpha
    inside = x.abs() <= 1
    q = ((x.clamp(-1, 1) * levels - 0.5).round() + 0.5) / levels
    end = (levels - 0.5) / levels
    q = q.clamp(-end, end)
    torch.testing.assert_close(found.detach(), alpha * q)
    assert torch.equal(w.grad, inside.float())
    # Of alpha: Q(x) - x up to the last level, as in LSQ; ParetoQ's goes half a step further.
    by_alpha = torch.where(x.abs() <= end, q - x, end * x.sign()).sum(1, keepdim=True)
    scale = quantizer.scale.grad_scale(64, quantizer.grid)
    torch.testing.assert_close(step.grad, levels * by_alpha * scale, rtol=1e-4, atol=1e-4)
