"""The statistics of a comparison, on toys whose truth is known."""

import math

import numpy
import pytest
import scipy.stats
import torch
from torch import nn

from fogzo import FogzoEstimator, QuantizedWeight
from fogzo_lab.comparison.intervals import Interval, Summary, mean, student_interval


def test_intervals_are_scipys_and_paired():
    ours, theirs = [2.0, 4.0, 9.0], [1.0, 2.0, 6.0]
    expected = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = Interval.paired(ours, theirs)
    assert (found.mean, found.low, found.high) == pytest.approx((2, *expected))
    zeros = Interval.of([0.0, 0.0])  # of rows that do the same; scipy has none
    assert (zeros.low, zeros.high) == (0, 0)


def test_of_five_seeds_student_errs_as_often_as_promised():
    samples = numpy.random.default_rng(1).normal(0.0, 1.0, (400, 5)).tolist()
    misses = sum(not low <= 0 <= high for low, high in map(student_interval, samples)) / 400
    assert 0.02 < misses < 0.08


@pytest.mark.parametrize("gaps", [[1.0], [1.0, math.inf], [0.9 - 0.8, 0.8 - 0.7]])
def test_no_interval_is_made_up_where_there_is_none(gaps):
    found = Interval.of(gaps)
    assert math.isnan(found.low) and math.isnan(found.high)
    assert not found.exists
    assert found.verdict(more_is_better=True) is None


def test_what_diverged_counts_as_infinite():
    assert mean([1.0, math.inf]) == math.inf
    assert mean([1.0, 3.0]) == 2
    diverged = Summary.of([1.0, None])
    assert diverged.mean == math.inf and math.isnan(diverged.sd)
    assert not Interval.paired([1.0, None], [1.0, 2.0]).exists


@pytest.mark.parametrize(
    ("low", "high", "up", "expected"),
    [
        (0.1, 0.3, True, "better"),
        (0.1, 0.3, False, "worse"),
        (-0.3, -0.1, False, "better"),
        (-0.1, 0.3, True, "not significant"),
        (0.0, 0.3, True, "not significant"),
        (math.nan, math.nan, True, None),
    ],
)
def test_a_difference_is_significant_only_where_the_interval_excludes_zero(low, high, up, expected):
    assert Interval(0.0, low, high).verdict(up) == expected


class _Round(torch.autograd.Function):
    """Rounding to -1, 0, 1 whose backward lies: it freezes every weight beyond 1."""

    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight.clamp(-1, 1).round()

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad * (weight.abs() <= 1)


def quadratic(estimator, seed, stream=0, steps=60, rate=0.02):
    """Train a quantized quadratic; STE cannot move half of its weights. The final hard loss."""
    draws = torch.Generator().manual_seed(seed)
    target = torch.randint(-1, 2, (16,), generator=draws).float()
    start = torch.rand(16, generator=draws) - 0.5
    start[:8] = 1.05 * target[:8].sub(0.5).sign().neg()  # out of range, on the wrong side
    weight = nn.Parameter(start)
    optimizer = torch.optim.SGD([weight], lr=rate)
    fogzo = None
    if estimator == "fogzo":
        record = QuantizedWeight("w", weight, lambda: torch.ones(()))
        fogzo = FogzoEstimator([record], noise_share=0.2, seed=1000 * stream + seed)

    curvature = torch.linspace(0.5, 1.5, 16)

    def loss_of():
        return ((_Round.apply(weight) - target).square() * curvature).sum()

    for _ in range(steps):
        loss = loss_of()
        loss.backward()
        if fogzo is not None and weight.grad.any():
            fogzo.refine_grads_(loss_of)
        optimizer.step()
        optimizer.zero_grad()
    return loss_of().item()


def called(ste, fogzo):
    """What the statistics call FOGZO's losses beside those of STE."""
    return Interval.paired(fogzo, ste).verdict(more_is_better=False)


@pytest.mark.filterwarnings("ignore:.*(the probes|bfloat16):RuntimeWarning")
def test_the_toy_whose_ste_is_wrong_has_the_right_winner():
    ste = [quadratic("ste", seed) for seed in range(10)]
    fogzo = [quadratic("fogzo", seed) for seed in range(10)]
    assert called(ste, fogzo) == "better"
    assert called(fogzo, ste) == "worse"


@pytest.mark.filterwarnings("ignore:.*(the probes|bfloat16):RuntimeWarning")
def test_identical_estimators_have_no_winner_but_for_the_promised_errors():
    calls = 0
    for trial in range(30):
        first, second = (
            [quadratic("fogzo", 5 * trial + seed, stream, steps=5, rate=0.06) for seed in range(5)]
            for stream in (1, 2)
        )
        assert first != second
        calls += called(first, second) != "not significant"
    assert calls <= 4  # of 30 at 5%, more in 1.6% of all worlds
