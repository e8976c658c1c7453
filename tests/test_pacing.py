"""`overhead` picks how often to probe from measured times; here from a clock of our own."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo
from fogzo.estimators import pacing

# Twelve weights, of which now and then none flips.
pytestmark = pytest.mark.filterwarnings("ignore:no weight rounds differently:RuntimeWarning")


class Clock:
    """Time that passes when told."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(pacing.time, "perf_counter", lambda: self.now)


def training(clock, step_seconds, probe_seconds, **options):
    """A function that trains one step of these durations and tells whether it was probed."""
    layer = nn.Linear(4, 3)
    model = fogzo.quantize_(nn.Sequential(layer), fogzo.lsq(2), lambda module, name: True)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), **options)
    x, y = torch.randn(8, 4), torch.randn(8, 3)

    def probe():
        clock.now += probe_seconds / 2
        return mse_loss(model(x), y)

    def step():
        model.zero_grad()
        mse_loss(model(x), y).backward()
        clock.now += step_seconds
        return bool(estimator.refine_grads_(probe).probe_losses)

    return estimator, step


@pytest.mark.parametrize(
    ("probe_seconds", "overhead", "interval"),
    [(0.5, 0.5, 1), (0.5, 0.6, 1), (0.5, 0.49, 2), (0.6, 0.15, 4), (0.6, 0.1, 6), (9.0, 0.01, 900)],
)
def test_the_interval_is_the_shortest_that_keeps_the_overhead(
    monkeypatch, caplog, probe_seconds, overhead, interval
):
    estimator, step = training(Clock(monkeypatch), 1.0, probe_seconds, overhead=overhead)
    with caplog.at_level(logging.INFO, logger="fogzo"):
        # The first step has no time before it.
        assert all(step() for _ in range(11))
    assert estimator.interval == interval
    assert f"probing every {interval} steps" in caplog.text
    start = estimator.step
    probed = [start + i for i in range(3 * interval) if step()]
    assert probed == [i for i in range(start, start + 3 * interval) if i % interval == 0]


def test_plain_steps_before_the_start_are_not_measured(monkeypatch):
    clock = Clock(monkeypatch)
    schedule = fogzo.linear_noise_share(num_weights=12, total_steps=100, start=0.2)
    estimator, step = training(clock, 1.0, 0.6, overhead=0.2, noise_share=schedule)
    assert not any(step() for _ in range(20))
    assert all(step() for _ in range(10))
    assert estimator.interval == 3


def test_a_resumed_run_keeps_the_interval(monkeypatch):
    clock = Clock(monkeypatch)
    estimator, step = training(clock, 1.0, 0.6, overhead=0.15)
    for _ in range(11):
        step()
    state = estimator.state_dict()
    assert state == {"step": 11, "seed": 0, "interval": 4}
    resumed, step = training(clock, 1.0, 6.0, overhead=0.15)
    resumed.load_state_dict(state)
    assert resumed.interval == 4
    assert [step() for _ in range(5)] == [False, True, False, False, False]  # steps 11 to 15
    without = training(clock, 1.0, 0.6)[0]
    without.load_state_dict(state)
    assert without.interval is None


@pytest.mark.parametrize("overhead", [0.0, -0.1, float("nan"), float("inf")])
def test_an_overhead_that_is_no_share_is_refused(overhead):
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"overhead=0\.15"):
        fogzo.FogzoEstimator([("w", layer.weight, 0.1)], overhead=overhead)
