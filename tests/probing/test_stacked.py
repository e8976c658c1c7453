"""Stacked probes alone: chunks of them, what torch.vmap cannot follow, and their memory."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo
from fogzo.probing.stacked import chunk_size
from toolbox import (
    IN_16_BITS,
    Net,
    Snapshot,
    backward,
    batch,
    draw,
    everything,
    fill,
    in_chunks_of,
    quantized_net,
    streams_put_back,
)

# By chance some of these small networks' measured slopes are tiny, which is warned about.
pytestmark = pytest.mark.filterwarnings("ignore:the loss's slope is:RuntimeWarning")


@pytest.fixture(autouse=True)
def _clean_streams():
    with streams_put_back(seed=0):
        yield


def started(model=None, n=3, dtype=torch.float32, **options):
    """An estimator after the backward pass of its model, and the closure."""
    model = model or quantized_net("lsq")
    x, y = batch(dtype=dtype)
    estimator = fogzo.FogzoEstimator(
        fogzo.quantized_weights(model),
        **{"num_samples": n, "noise_share": 0.1, "evaluate": "stacked"} | options,
    )
    model.zero_grad()

    def loss_of():
        return mse_loss(model(x).float(), y.float())

    with streams_put_back(seed=2):
        backward(loss_of)
    return model, estimator, loss_of


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 100])
@pytest.mark.parametrize("n", [1, 5, 6])
def test_chunks_of_any_size(n, size, one_sided, monkeypatch):
    model = quantized_net("lsq", dropout=0.0)
    results = []
    for evaluate in ("in_place", "stacked"):
        _, estimator, loss_of = started(model, n, evaluate=evaluate, one_sided=one_sided)
        in_chunks_of(size, monkeypatch, estimator.weights)
        assert chunk_size(estimator.weights) == size
        calls = []
        expected = loss_of().detach() if one_sided else None
        stats = estimator.refine_grads_(
            lambda f=loss_of, calls=calls: (calls.append(0), f())[1], expected_loss=expected
        )
        results.append(stats.probe_losses)
    assert len(calls) == math.ceil(n / size) * (1 if one_sided else 2) + one_sided
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_the_bound_on_memory_is_that_of_a_cpus_caches():
    for features, size in ((1024, 1), (64, 4 * 2**20 // (64 * 64 * 8))):
        layer = nn.Linear(features, features)
        fogzo.quantize_(layer, fogzo.fixed(2, step_size=0.1), everything)
        assert chunk_size(fogzo.quantized_weights(layer)) == size


@IN_16_BITS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = quantized_net("lsq", dropout=0.0).to(dtype)
    losses = []
    for evaluate in ("in_place", "stacked"):
        _, estimator, loss_of = started(model, 5, dtype, evaluate=evaluate)
        losses.append(estimator.refine_grads_(loss_of).probe_losses)
    assert losses[1] == pytest.approx(losses[0], rel=8 * torch.finfo(dtype).eps + 1e-7)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_autocast_inside_the_closure(norm):
    model = fogzo.quantize_(Net(dropout=0.0, norm=norm), fogzo.lsq(2))
    losses = []
    for evaluate in ("in_place", "stacked"):
        _, estimator, loss_of = started(model, 5, evaluate=evaluate)

        def cast(loss_of=loss_of):
            with torch.autocast("cpu", torch.bfloat16):
                return loss_of()

        losses.append(estimator.refine_grads_(cast).probe_losses)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_all_that_draws_random_numbers_meets_the_draws_of_the_loop(monkeypatch):
    model = quantized_net("lsq", dropout=0.5)
    seen, losses = [], []
    for evaluate in ("in_place", "stacked"):
        _, estimator, loss_of = started(model, 5, evaluate=evaluate)
        in_chunks_of(2, monkeypatch, estimator.weights)
        draws = []

        def noisy(draws=draws, loss_of=loss_of):
            draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
            return loss_of() * (1 + sum(draws[-1])) * torch.rand(3).sum()

        with streams_put_back(seed=3):
            losses.append(estimator.refine_grads_(noisy).probe_losses)
        assert len(draws) == (10 if evaluate == "in_place" else 6)  # both sides of three chunks
        seen.append(set(draws))
    assert len(seen[0]) == 1
    assert seen[0] == seen[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("draws", [{"noise": 0.05}, {"stochastic": True}], ids=str)
def test_a_quantizer_draws_alike_for_weights_in_any_memory_format(draws):
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = fill(nn.Conv2d(8, 6, 2)).to(memory_format=torch.channels_last)
            self.second = nn.Linear(6, 4, bias=False)
            self.second.weight = nn.Parameter(draw(6, 4).t())  # transposed in memory

        def forward(self, x):
            return self.second(self.first(x[:, :, None, None].expand(-1, -1, 2, 2)).flatten(1))

    quantizer = replace(fogzo.lsq(2, surrogate="erf", granularity="channel"), **draws)
    losses, x = [], draw(16, 8)
    for evaluate in ("in_place", "stacked"):
        model = fogzo.quantize_(Strided(), quantizer, everything)
        estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), evaluate=evaluate)
        with streams_put_back(seed=3), estimator.record_rng():
            loss = backward(lambda model=model: model(x).square().mean())
        stats = estimator.refine_grads_(
            lambda model=model: model(x).square().mean(), expected_loss=loss
        )
        losses.append(stats.probe_losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_compiled_model():
    model = quantized_net("lsq", dropout=0.0)
    compiled = torch.compile(model, backend="eager")
    x, y = batch()
    losses = []
    for evaluate in ("in_place", "stacked"):
        _, estimator, _ = started(model, 5, evaluate=evaluate)
        stats = estimator.refine_grads_(lambda: mse_loss(compiled(x), y))
        losses.append(stats.probe_losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# Mistakes


@pytest.mark.parametrize(
    "closure",
    [
        lambda model, loss_of: loss_of().item(),
        lambda model, loss_of: loss_of() * model.first.weight.sum().tolist(),
        lambda model, loss_of: float(loss_of()),
        lambda model, loss_of: loss if (loss := loss_of()) > 0 else 2 * loss,
        lambda model, loss_of: model.seen.copy_(loss_of().expand(2)).mean(),
    ],
)
def test_what_vmap_cannot_follow_is_explained_and_everything_given_back(closure):
    model, estimator, loss_of = started()
    before = Snapshot(model)
    with pytest.raises(ValueError, match='evaluate="in_place" evaluates'):
        estimator.refine_grads_(lambda: closure(model, loss_of))
    before.assert_same()


def test_an_autograd_function_without_a_rule_is_explained():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    _, estimator, loss_of = started()
    with pytest.raises(ValueError, match='evaluate="in_place" evaluates'):
        estimator.refine_grads_(lambda: Double.apply(loss_of()))


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda loss: loss.expand(4), r"got a tensor of shape \(4,\)"),
        (lambda loss: None, "got NoneType"),
        (lambda loss: torch.tensor(1.0), "does not depend on the quantized weights"),
        (lambda loss: 1.0, "does not depend on the quantized weights"),
    ],
)
def test_closures_that_the_loop_refuses_are_refused(closure, message):
    model, estimator, loss_of = started()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        estimator.refine_grads_(lambda: closure(loss_of()))
    before.assert_same()


def test_an_error_of_the_closure_itself_is_not_explained_away():
    _, estimator, _ = started()
    with pytest.raises(RuntimeError, match="mat1 and mat2") as raised:
        estimator.refine_grads_(lambda: (torch.ones(2, 3) @ torch.ones(2, 3)).sum())
    assert 'evaluate="in_place"' in raised.value.__notes__[0]
