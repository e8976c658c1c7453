"""Two real processes against one: the same training, half a batch each.

This file is also the program that each rank runs: ``python test_ranks.py RANK FOLDER``.
"""

import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import fogzo
from toolbox import joined, run_ranks, told

RANKS = 2
STEPS = 3
SCENARIOS = {
    "n=1": {"num_samples": 1, "preset": "lsq", "views": False},
    "n=2": {"num_samples": 2, "preset": "lsq", "views": False},
    "n=2, gradients in buckets": {"num_samples": 2, "preset": "lsq", "views": True},
    "rotated, lean": {"num_samples": 1, "evaluate": "lean", "preset": "quest", "views": False},
    "one-sided": {"num_samples": 2, "one_sided": True, "preset": "lsq", "views": False},
}


def network(preset):
    # Double precision, so that the order of the sums flips no code.
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    model.double()
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=stream, dtype=torch.float64))
    return fogzo.quantize_(model, fogzo.lsq(2) if preset == "lsq" else fogzo.quest(2))


def batch(step):
    stream = torch.Generator().manual_seed(100 + step)
    x = torch.randn(32, 8, generator=stream, dtype=torch.float64)
    return x, torch.randn(32, 3, generator=stream, dtype=torch.float64)


def train(part, preset, views, wrap=lambda model, views: model, **options):
    """Train on ``part`` of every batch; the weights, the probe losses and the agreements."""
    model = network(preset)
    estimator = fogzo.FogzoEstimator(
        fogzo.quantized_weights(model), noise_share=0.02, seed=5, **options
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parallel = wrap(model, views)
    losses, agreements = [], []
    for step in range(STEPS):
        x, y = (t[part] for t in batch(step))
        optimizer.zero_grad()
        loss = mse_loss(parallel(x), y)
        loss.backward()
        stats = estimator.refine_grads_(
            lambda x=x, y=y: mse_loss(parallel(x), y), expected_loss=loss
        )
        losses += stats.probe_losses
        agreements.append(stats.agreement)
        optimizer.step()
    weights = [p.detach().clone() for p in model.parameters()]
    return {"weights": weights, "losses": losses, "agreements": agreements}


def one_rank_returns_nan(rank):
    """Gradients before and after a step in which only rank 1 sees a NaN."""
    model = network("lsq")
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    parallel = data_parallel(model, False)
    x, y = (t[rank::RANKS] for t in batch(0))
    mse_loss(parallel(x), y).backward()
    given = [p.grad.clone() for p in model.parameters()]
    factor = math.nan if rank == 1 else 1.0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        stats = estimator.refine_grads_(lambda: factor * mse_loss(parallel(x), y))
    refined = [p.grad.clone() for p in model.parameters()]
    said = sum(issubclass(w.category, RuntimeWarning) for w in told)
    return {"given": given, "refined": refined, "fallback": stats.fallback, "warnings": said}


def one_rank_has_another_batch(rank):
    """What each rank is told where only rank 1's closure evaluates another batch."""
    model = network("lsq")
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    parallel = data_parallel(model, False)
    x, y = (t[rank::RANKS] for t in batch(0))
    other = batch(rank)[0][rank::RANKS]  # of rank 0 the same
    loss = mse_loss(parallel(x), y)
    loss.backward()
    return told(
        lambda: estimator.refine_grads_(lambda: mse_loss(parallel(other), y), expected_loss=loss)
    )


DIFFERENTLY = {
    "seeds": lambda weights, rank: fogzo.FogzoEstimator(weights, seed=rank),
    "samples": lambda weights, rank: fogzo.FogzoEstimator(weights, num_samples=1 + rank),
    "noise": lambda weights, rank: fogzo.FogzoEstimator(weights, noise_share=0.1 * rank),
    "order": lambda weights, rank: fogzo.FogzoEstimator(weights[:: 1 - 2 * rank]),
}


def made_differently(rank, make):
    """What a rank is told whose estimator is another one than that of the other rank."""
    model = network("lsq")
    estimator = make(fogzo.quantized_weights(model), rank)
    parallel = data_parallel(model, False)
    x, y = (t[rank::RANKS] for t in batch(0))
    mse_loss(parallel(x), y).backward()
    tensors = [t for p in model.parameters() for t in (p.detach(), p.grad)]
    given = [t.clone() for t in tensors]
    message = told(lambda: estimator.refine_grads_(lambda: mse_loss(parallel(x), y)))
    return message, all(map(torch.equal, given, tensors))


def inside_of_join(rank):
    """What the ranks are told where one of them may run out of batches."""
    model = network("lsq")
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    parallel = data_parallel(model, False)
    x, y = (t[rank::RANKS] for t in batch(0))
    with parallel.join():
        loss = mse_loss(parallel(x), y)
        loss.backward()
        return told(lambda: estimator.refine_grads_(lambda: mse_loss(parallel(x), y), loss))


def around_ddp(rank):
    """What the ranks are told whose forward passes go around DDP."""
    model = network("lsq")
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    x, y = (t[rank::RANKS] for t in batch(0))
    parallel = data_parallel(model, False)
    mse_loss(parallel.module(x), y).backward()
    return told(lambda: estimator.refine_grads_(lambda: mse_loss(parallel.module(x), y)))


def inside_of_no_sync(rank):
    """What is told where gradients are not averaged, and where those of a judge alone are not."""
    model, judge = network("lsq"), nn.Linear(3, 3).double()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    parallel, judging = data_parallel(model, False), data_parallel(judge, False)
    x, y = (t[rank::RANKS] for t in batch(0))
    messages = []
    for unsynchronised in (parallel, judging):
        with unsynchronised.no_sync():
            loss = estimator.record(lambda x, y: mse_loss(judging(parallel(x)), y), x, y)
            loss.backward()
            messages.append(told(estimator.refine_grads_))
        model.zero_grad()
    return messages


class Centre(nn.Module):
    """Subtracts a running mean, which moves in train mode, as DINO's centre does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(16, dtype=torch.float64))
        self.seen = []

    def forward(self, x):
        self.seen.append(self.mean[0].item())
        out = x - self.mean
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return out


def buffers_of_ddp(rank, refines):
    """What each forward pass of three steps saw of a buffer that DDP broadcasts, step by step."""
    model = network("lsq")
    model.insert(1, Centre())
    parallel = data_parallel(model, False)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.02)
    seen = []
    for step in range(STEPS):
        x, y = (t[rank::RANKS] for t in batch(step))
        loss = estimator.record(lambda x, y: mse_loss(parallel(x), y), x, y)
        loss.backward()
        if refines:
            estimator.refine_grads_()
        seen.append(model[1].seen.copy())
        model[1].seen.clear()
        model.zero_grad()
    return seen


def losses_of_one_rank(rank, wrap=lambda model: model):
    """Probe losses of a model that one rank trains by itself."""
    model = network("lsq")
    parallel = wrap(model)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.02)
    x, y = (t[rank::RANKS] for t in batch(0))
    loss = mse_loss(parallel(x), y)
    loss.backward()
    return estimator.refine_grads_(lambda: mse_loss(parallel(x), y), loss).probe_losses


def in_a_group_of_its_own(rank):
    groups = [torch.distributed.new_group([each]) for each in range(RANKS)]
    return losses_of_one_rank(
        rank, lambda model: DistributedDataParallel(model, process_group=groups[rank])
    )


def data_parallel(model, views):
    return DistributedDataParallel(model, gradient_as_bucket_view=views)


def rank_program(rank, folder):
    with joined(rank, folder):
        part = slice(rank, None, RANKS)
        results = {name: train(part, wrap=data_parallel, **s) for name, s in SCENARIOS.items()}
        results["nan"] = one_rank_returns_nan(rank)
        results["another batch"] = one_rank_has_another_batch(rank)
        results["differently"] = {n: made_differently(rank, m) for n, m in DIFFERENTLY.items()}
        results["around DDP"] = around_ddp(rank)
        results["no_sync"] = inside_of_no_sync(rank)
        results["join"] = inside_of_join(rank)
        results["buffers"] = [buffers_of_ddp(rank, refines) for refines in (False, True)]
        results["group"] = in_a_group_of_its_own(rank)
        torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_on_half_batches_equal_one_process_on_the_whole_batch(ranks, name):
    expected = train(slice(None), **SCENARIOS[name])
    for result in (ranks[0][name], ranks[1][name]):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-10)
        assert result["agreements"] == pytest.approx(expected["agreements"], rel=1e-6)
        for a, b in zip(result["weights"], expected["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_ranks_stay_bitwise_identical(ranks, name):
    first, second = ranks[0][name], ranks[1][name]
    assert first["losses"] == second["losses"]
    assert first["agreements"] == second["agreements"]
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(a, b)


def test_a_nan_on_one_rank_makes_all_ranks_keep_the_first_order_gradient(ranks):
    for result in (ranks[0]["nan"], ranks[1]["nan"]):
        assert "not finite" in result["fallback"]
        assert result["warnings"] == 1
        for given, refined in zip(result["given"], result["refined"], strict=True):
            assert torch.equal(given, refined)


def test_a_mistake_on_one_rank_is_told_on_all_and_none_waits(ranks):
    first, second = ranks[0]["another batch"], ranks[1]["another batch"]
    assert first.startswith("on another rank the closure does not return expected_loss")
    assert "rebound to the next batch" in second


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("seeds", ["seed=0, step=0", "seed=1, step=0"]),
        ("samples", ["num_samples=1", "num_samples=2"]),
        ("noise", ["noise_share=0 ", "noise_share=0.1 "]),
        ("order", ["'0.weight', '2.weight'", "'2.weight', '0.weight'"]),
    ],
)
def test_estimators_that_would_let_the_ranks_drift_apart_are_refused(ranks, made, said):
    for result, own in zip(ranks, said, strict=True):
        message, is_given_back = result["differently"][made]
        assert own in message and "the same options, seed=0" in message
        assert is_given_back


def test_gradients_that_ddp_does_not_average_are_refused(ranks):
    for result in ranks:
        own, judges = result["no_sync"]
        assert "refine outside of DDP's no_sync()" in own
        assert judges == "nothing"
        assert "ddp(x) and not model(x)" in result["around DDP"]


def test_ranks_that_may_run_out_of_batches_are_refused(ranks):
    for result in ranks:
        assert "leave join() out" in result["join"]


def test_probes_begin_with_a_ranks_own_buffers_which_ddp_goes_on_broadcasting(ranks):
    for result in ranks:
        plain, refined = result["buffers"]
        for step in range(STEPS):
            train, *probes = refined[step]
            assert train == plain[step][0]
            # The audit of the first step alone looks what one more forward pass makes of them.
            assert len(set(probes)) == (1 if step else 2) and len(probes) >= 2
    first, second = (result["buffers"][1][-1] for result in ranks)
    assert first[0] == second[0]  # as broadcast
    assert first[-1] != second[-1]  # as each rank's own half of the batch has left it


def test_losses_are_averaged_over_the_ranks_that_train_the_model(ranks):
    for rank, result in enumerate(ranks):
        assert result["group"] == pytest.approx(losses_of_one_rank(rank), rel=1e-10)


if __name__ == "__main__":
    rank_program(int(sys.argv[1]), Path(sys.argv[2]))
