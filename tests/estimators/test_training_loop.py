"""Gradients of an ordinary training loop: scaled, accumulated, in buckets, not finite."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo
from toolbox import (
    EVERY_PRESET,
    Net,
    Snapshot,
    assert_bits_equal,
    backward,
    batch,
    quantized_net,
    streams_put_back,
)


@pytest.fixture(autouse=True)
def _clean_streams():
    with streams_put_back(seed=0):
        yield


def test_the_optimizer_of_the_reading_loop_steps_afterwards():
    model = quantized_net("lsq")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = batch()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    before = [p.detach().clone() for p in model.parameters()]
    with estimator.record_rng():
        loss = backward(lambda: mse_loss(model(x), y))
    estimator.refine_grads_(lambda: mse_loss(model(x), y), expected_loss=loss)
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert all(moved)


# Scaled gradients


def refined_with_scale(scale, told, num_samples=2, preset="lsq"):
    model = quantized_net(preset, dropout=0.0)
    x, y = batch()
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, num_samples=num_samples, noise_share=0.05)
    (scale * mse_loss(model(x), y)).backward()
    estimator.refine_grads_(lambda: mse_loss(model(x), y), grad_scale=told)
    return [p.grad for p in model.parameters()]


@EVERY_PRESET
def test_gradients_of_a_grad_scaler_give_the_same_result_at_their_scale(preset):
    plain = refined_with_scale(1.0, 1.0, preset=preset)
    scaled = refined_with_scale(65536.0, 65536.0, preset=preset)
    for p, s in zip(plain, scaled, strict=True):
        assert_bits_equal(s, p * 65536)
        assert_bits_equal(s / 65536, p)


@pytest.mark.parametrize("scale", [torch.tensor(1024.0), torch.tensor([1024.0]), np.float32(1024)])
def test_statistics_are_plain_numbers_whatever_number_the_scale_is(scale):
    model = quantized_net(dropout=0.0)
    x, y = batch()
    (1024 * mse_loss(model(x), y)).backward()
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, noise_share=np.float32(0.3))
    stats = estimator.refine_grads_(lambda: mse_loss(model(x), y), grad_scale=scale)
    assert type(stats.gradient_norm) is type(stats.agreement) is type(stats.noise_share) is float


@pytest.mark.parametrize("cls", [fogzo.PlaceboEstimator, fogzo.ControlVariateEstimator])
def test_every_estimator_understands_the_scale(cls):
    results = []
    for scale in (1.0, 65536.0):
        model = quantized_net(dropout=0.0)
        x, y = batch()
        (scale * mse_loss(model(x), y)).backward()
        estimator = cls(fogzo.quantized_weights(model), num_samples=2)
        stats = estimator.refine_grads_(lambda: mse_loss(model(x), y), grad_scale=scale)
        results.append(([p.grad / scale for p in model.parameters()], stats.gradient_norm))
    (plain, norm), (scaled, scaled_norm) = results
    assert norm == scaled_norm
    for p, s in zip(plain, scaled, strict=True):
        torch.testing.assert_close(p, s, rtol=1e-6, atol=0)


def test_a_scale_that_nobody_mentioned_is_warned_about_once():
    model = quantized_net(dropout=0.0)
    x, y = batch()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    (65536 * mse_loss(model(x), y)).backward()
    with pytest.warns(RuntimeWarning, match=r"scaler.unscale_\(optimizer\).*grad_scale=") as told:
        estimator.refine_grads_(lambda: mse_loss(model(x), y))
    assert len(told) == 1
    model.zero_grad()
    (65536 * mse_loss(model(x), y)).backward()
    estimator.refine_grads_(lambda: mse_loss(model(x), y))  # warnings are errors here


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_gradients_that_are_not_finite_are_left_to_the_scaler(value):
    model = quantized_net()
    x, y = batch()
    backward(lambda: mse_loss(model(x), y))
    model.second.weight.grad[1, 2] = value
    before = Snapshot(model)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    stats = estimator.refine_grads_(lambda: mse_loss(model(x), y))
    before.assert_same()
    assert "not finite" in stats.fallback
    assert estimator.step == 1
    assert stats.agreement is None


def test_a_gradient_of_zeros_is_left_alone():
    model = quantized_net()
    x, y = batch()
    backward(lambda: mse_loss(model(x), y))
    for w in fogzo.quantized_weights(model):
        w.param.grad.zero_()
    before = Snapshot(model)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    stats = estimator.refine_grads_(lambda: mse_loss(model(x), y))
    before.assert_same()
    assert "zero" in stats.fallback


# Agreement with the ordinary gradient


def test_without_quantizer_and_noise_the_refined_gradient_is_the_gradient():
    model = Net(dropout=0.4)
    x, y = batch(64)
    triples = [(f"{n}.weight", getattr(model, n).weight, 1e-1) for n in ("first", "second", "head")]
    estimator = fogzo.FogzoEstimator(triples, noise_share=0.0, model=model)
    with estimator.record_rng():
        loss = backward(lambda: mse_loss(model(x), y))
    before = Snapshot(model)
    given = torch.cat([p.grad.flatten().clone() for _, p, _ in triples])
    stats = estimator.refine_grads_(lambda: mse_loss(model(x), y), expected_loss=loss)
    refined = torch.cat([p.grad.flatten() for _, p, _ in triples])
    assert (refined - given).norm() < 1e-3 * given.norm()
    assert stats.agreement == pytest.approx(1, abs=1e-3)
    before.assert_same(rewritten={n for n, _, _ in triples})


def test_gradients_keep_their_storage_in_a_bucket():
    # DDP's gradient_as_bucket_view: all gradients are views of one flat tensor.
    model = quantized_net("lsq", dropout=0.0)
    reference = copy.deepcopy(model)
    x, y = batch()
    params = list(model.parameters())
    bucket = torch.zeros(sum(p.numel() for p in params))
    start = 0
    for p in params:
        p.grad = bucket[start : start + p.numel()].view_as(p)
        start += p.numel()
    addresses = [p.grad.data_ptr() for p in params]
    for m in (model, reference):
        mse_loss(m(x), y).backward()
        estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(m), num_samples=2, noise_share=0.1)
        estimator.refine_grads_(lambda m=m: mse_loss(m(x), y))
    assert [p.grad.data_ptr() for p in params] == addresses
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
    assert torch.equal(bucket, expected)


def test_accumulated_micro_batches_equal_one_large_batch():
    x, y = batch(24, torch.float64)
    windows = [(x[i : i + 6], y[i : i + 6]) for i in range(0, 24, 6)]
    gradients = []
    for micro_batches in ([(x, y)], windows):
        model = quantized_net("lsq", dropout=0.0, norm=nn.LayerNorm).double()
        estimator = fogzo.FogzoEstimator(
            fogzo.quantized_weights(model), num_samples=2, noise_share=0.1
        )

        def step_loss(model=model, micro_batches=micro_batches):
            total = 0.0
            for a, b in micro_batches:
                loss = mse_loss(model(a), b) / len(micro_batches)
                if torch.is_grad_enabled():
                    loss.backward()
                total = total + loss.detach()
            return total

        estimator.refine_grads_(step_loss, expected_loss=step_loss())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_a_first_step_that_overflows_does_not_use_up_the_warning_about_a_forgotten_scale():
    # A GradScaler starts high, so its first steps are the ones that overflow.
    model = quantized_net(dropout=0.0)
    x, y = batch()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    backward(lambda: mse_loss(model(x), y))
    model.first.weight.grad.fill_(math.inf)
    assert estimator.refine_grads_(lambda: mse_loss(model(x), y)).fallback
    model.zero_grad()
    (65536 * mse_loss(model(x), y)).backward()
    with pytest.warns(RuntimeWarning, match="unscale_"):
        estimator.refine_grads_(lambda: mse_loss(model(x), y))
