"""The learning rates of a run, against torch's schedulers and the closed forms."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fogzo_lab.data.config import ImagesConfig
from fogzo_lab.training.config import ScheduleName, TrainConfig
from fogzo_lab.training.learning_rates import learning_rate_factor
from fogzo_lab.training.model_config import MlpConfig

CONFIG = TrainConfig(recipe="test", model=MlpConfig(), data=ImagesConfig())
SCHEDULES = get_args(ScheduleName)


def factors(schedule, max_steps=100, warmup_fraction=0.1, final_fraction=0.0):
    config = replace(
        CONFIG,
        schedule=schedule,
        max_steps=max_steps,
        warmup_fraction=warmup_fraction,
        final_fraction=final_fraction,
    )
    factor = learning_rate_factor(config)
    return [factor(step) for step in range(max_steps + 1)]


@pytest.mark.parametrize("max_steps", [1, 2, 37, 500])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.05, 1.0])
def test_cosine_is_bit_for_bit_what_earlier_versions_had(max_steps, warmup_fraction):
    warmup = max(1, round(warmup_fraction * max_steps))

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, max_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    expected = [factor(step) for step in range(max_steps + 1)]
    assert factors("cosine", max_steps, warmup_fraction) == expected


@given(
    schedule=st.sampled_from(SCHEDULES),
    max_steps=st.integers(1, 60),
    warmup_fraction=st.floats(0, 1),
    final_fraction=st.floats(0, 1),
)
def test_up_to_the_peak_and_down_to_the_end(schedule, max_steps, warmup_fraction, final_fraction):
    if schedule == "constant":
        final_fraction = 0.0
    found = factors(schedule, max_steps, warmup_fraction, final_fraction)
    assert all(0 <= factor <= 1 for factor in found)
    warmup = max(1, round(warmup_fraction * max_steps))
    assert found[warmup - 1] == 1
    assert all(a < b for a, b in pairwise(found[:warmup]))
    assert all(a >= b for a, b in pairwise(found[warmup - 1 :]))
    if warmup < max_steps and schedule != "constant":
        assert found[-1] == pytest.approx(final_fraction, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_stays_at_the_end(schedule):
    factor = learning_rate_factor(replace(CONFIG, schedule=schedule, max_steps=10))
    assert factor(10) == pytest.approx(factor(25), abs=1e-12)


@pytest.mark.parametrize(
    ("max_steps", "warmup_fraction", "final_fraction"), [(100, 0.1, 0.1), (40, 0.25, 0.001)]
)
def test_onecycle_is_that_of_torch(max_steps, warmup_fraction, final_fraction):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=1.0,
        total_steps=max_steps,
        pct_start=warmup_fraction,
        div_factor=100,
        final_div_factor=0.01 / final_fraction,
        cycle_momentum=False,
    )
    theirs = [scheduler.get_last_lr()[0]]
    for _ in range(max_steps - 1):
        optimizer.step()
        scheduler.step()
        theirs.append(scheduler.get_last_lr()[0])
    ours = factors("onecycle", max_steps, warmup_fraction, final_fraction)
    assert ours[:-1] == pytest.approx(theirs, abs=1e-12)
    assert ours[0] == pytest.approx(0.01)


def test_the_straight_lines():
    linear = factors("linear", final_fraction=0.1)
    assert linear[9:11] == [1.0, 1.0]
    assert linear[55] == pytest.approx(0.55)
    wsd = factors("wsd")
    assert wsd[9:81] == [1.0] * 72
    assert wsd[90] == pytest.approx(0.5)
    assert factors("constant")[9:] == [1.0] * 92


def test_wsd_whose_warmup_leaves_no_fifth_comes_down_from_the_peak():
    wsd = factors("wsd", max_steps=10, warmup_fraction=0.9)
    assert wsd[8:] == [1.0, 1.0, 0.0]


def test_an_end_that_would_be_ignored_is_refused():
    with pytest.raises(ValueError, match="--final-fraction 0, or --schedule linear"):
        factors("constant", final_fraction=0.1)
