"""Counting over steps: flips, those that undo the last, movement, and what a watch keeps."""

import json

import pytest
import torch
from torch import nn

import fogzo
from fogzo.inspection import THRESHOLDS
from toolbox import Snapshot, draw, everything, fill, quantized_net

OSCILLATING = fogzo.fixed(2, step_size=0.1, surrogate="identity_unmasked")


def one_layer(*values, quantizer=None):
    layer = nn.Linear(len(values), 1, bias=False)
    model = fogzo.quantize_(
        nn.Sequential(layer), quantizer or fogzo.fixed(2, step_size=1.0), everything
    )
    move(model, *values)
    return model


@torch.no_grad()
def move(model, *values):
    model[0].weight.copy_(torch.tensor([values]))


def test_flips_and_those_that_undo_the_last_are_counted():
    model = one_layer(0.2, 0.2, 0.2, 1.2)
    watch = fogzo.Watch(model, every=5, window=4)
    found = watch.update()
    for values in (
        (-0.2, 0.2, 1.2, 1.2),  # two flips
        (0.2, 0.2, 1.2, 1.2),  # back
        (0.2, 0.2, 0.2, 1.2),  # back
        (0.2, 0.2, -1.2, 1.2),  # a flip in the same direction as the last
    ):
        assert found is None
        move(model, *values)
        found = watch.update()
    (layer,) = found.layers
    assert (found.step, found.counted) == (5, 4)
    assert layer.flips == 5 / (4 * 4)
    assert layer.flips_back == 2 / 5
    assert layer.moved == pytest.approx((0.4 + 1.0 + 0.4 + 1.0 + 1.4) / 4 / 4)
    assert watch.history == [found]


def test_weights_that_are_masked_are_frozen_only_if_they_do_not_move():
    quantizer = fogzo.fixed(2, step_size=1.0, surrogate="identity")
    model = one_layer(0.2, 3.0, 4.0, 0.3, quantizer=quantizer)
    watch = fogzo.Watch(model, every=3)
    watch.update()
    move(model, 0.25, 3.0, 4.1, 0.35)
    watch.update()
    move(model, 0.3, 3.0, 4.2, 0.4)
    (layer,) = watch.update().layers
    assert (layer.masked, layer.frozen) == (2 / 4, 1 / 4)


def test_it_counts_in_its_window_alone_and_begins_anew():
    model = one_layer(0.2, -0.2)
    watch = fogzo.Watch(model, every=10, window=2)
    found = []
    for step in range(1, 31):
        if step == 5:
            move(model, -0.2, 0.2)  # outside of any window
        if step == 20:
            move(model, 0.2, 0.2)
        inspection = watch.update()
        assert bool(watch._counters) == (step % 10 in (8, 9))
        found += [inspection] if inspection else []
    assert [i.step for i in found] == [10, 20, 30]
    assert [i.layers[0].flips for i in found] == [0, 1 / 4, 0]
    resumed = fogzo.Watch(model, every=10, window=2)
    resumed.load_state_dict({"step": 27})
    assert [bool(resumed.update()) for _ in range(3)] == [False, False, True]
    assert (resumed.history[0].step, resumed.history[0].counted) == (30, 2)


def test_every_step_can_be_inspected():
    model = one_layer(0.2, 0.2)
    watch = fogzo.Watch(model, every=1)
    assert watch.update().layers[0].flips is None
    for values, flips, back in (((-0.2, 0.2), 0.5, 0.0), ((0.2, 0.2), 0.5, 1.0)):
        move(model, *values)
        (layer,) = watch.update().layers
        assert (layer.flips, layer.flips_back) == (flips, back)


@pytest.mark.parametrize("when", [1, 2, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_reported_and_their_flips_are_not(value, when):
    model = one_layer(0.2, 0.2, 0.2, 1.2)
    watch = fogzo.Watch(model, every=4)
    found = []
    for step in range(1, 13):
        # From one inspection to the next they are, as after an earlier checkpoint was loaded.
        move(model, 0.2, value if when <= step <= 4 else 0.2, 0.2, 1.2)
        found.append(watch.update())
    broken, between, whole = watch.history
    assert found[3::4] == watch.history
    assert [finding.kind for finding in broken.findings] == ["not_finite"]
    assert broken.findings[0].layers == [("0", 1 / 4)]
    assert (broken.layers[0].flips, broken.layers[0].moved) == (None, None)
    assert between.layers[0].not_finite == 0
    assert (whole.layers[0].flips, whole.layers[0].moved) == (0, 0)
    for inspection in watch.history:
        json.dumps(inspection.as_dict(), allow_nan=False)


def test_the_learning_rate_that_broke_a_network_is_named():
    model = one_layer(0.2, 0.2, 0.2, 1.2)
    watch = fogzo.Watch(model, every=2)
    for values in ((0.2,) * 4, (9.0,) * 4, (float("nan"),) * 4, (float("nan"),) * 4):
        move(model, *values)
        watch.update()
    assert [finding.kind for finding in watch.history[1].findings] == [
        "not_finite",
        "learning_rate",
    ]


@pytest.mark.parametrize(
    "preset", ["fixed", "lsq per group", "quest", "ternary", "sign", "abs_max"]
)
def test_a_watch_changes_nothing(preset):
    model = quantized_net(preset)
    before = Snapshot(model)
    watch = fogzo.Watch(model, every=2)
    watch.update()
    watch.update(forward=lambda: model(draw(4, 8)))
    before.assert_same()
    assert all(layer.flips == 0 for layer in watch.history[0].layers)


def test_what_makes_no_watch_is_refused():
    model = quantized_net()
    with pytest.raises(ValueError, match=r"every must be a number of steps, 1 or more, got 0"):
        fogzo.Watch(model, every=0)
    with pytest.raises(ValueError, match="window must be"):
        fogzo.Watch(model, window=2.5)
    with pytest.raises(ValueError, match="nothing in this model is quantized"):
        fogzo.Watch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"watch.load_state_dict\(checkpoint\['watch'\]\)"):
        fogzo.Watch(model).load_state_dict({"steps": 1})


# Sick runs and healthy ones


def train(
    quantizer, *, lr=0.02, steps=120, optimizer=torch.optim.Adam, kill=0, empty=0, decays=True
):
    """The findings of a classification of 8 clusters by a quantized perceptron."""
    centres, generator = draw(8, 16, seed=5), torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 8))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
            layer.bias.zero_()
        model[0].bias[:kill] = -100.0
        model[0].weight[:empty] = 0
    fogzo.quantize_(model, quantizer, everything)
    watch = fogzo.Watch(model, every=20)
    made = optimizer(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(made, steps if decays else 10**9)
    for _ in range(steps):
        y = torch.randint(8, (64,), generator=generator)
        x = centres[y] + torch.randn(64, 16, generator=generator)
        made.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        watch.update()
        made.step()
        schedule.step()
        with torch.no_grad():
            model[0].weight[:empty] = 0  # as pruning would
    return watch.history[-1].findings


HEALTHY = {
    "lsq": lambda: train(fogzo.lsq(2)),
    "lsq 4 bits": lambda: train(fogzo.lsq(4, granularity="channel")),
    "lsq 8 bits": lambda: train(fogzo.lsq(8), lr=0.002),
    "quest": lambda: train(fogzo.quest(2)),
    "ternary": lambda: train(fogzo.ternary()),
    "constant learning rate": lambda: train(fogzo.lsq(2), decays=False),
    "sgd": lambda: train(fogzo.lsq(2), lr=0.1, optimizer=torch.optim.SGD),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_finding(name):
    assert HEALTHY[name]() == []


def test_a_fixed_step_that_weights_outgrow_is_found():
    (finding,) = train(fogzo.fixed(2, surrogate="identity_unmasked"), lr=0.005)
    assert finding.kind == "outgrown"
    assert min(ratio for _, ratio in finding.layers) >= THRESHOLDS["outgrown"]


def test_a_fixed_step_that_masks_is_found():
    first = train(fogzo.fixed(2, step_size=0.05, surrogate="identity"))[0]
    assert first.kind == "masked"
    assert "masked and frozen" in first.message
    assert first.code == 'surrogate="identity_unmasked", or fogzo.lsq(bits)'
    assert min(share for _, share in first.layers) >= THRESHOLDS["masked"]
    assert {name for name, _ in first.layers} <= {"0", "2"}


def test_a_sign_that_masks_is_advised_to_learn_one_bit():
    first = train(fogzo.sign(), lr=0.005)[0]
    assert first.kind == "masked"
    assert first.code == 'surrogate="identity_unmasked", or fogzo.lsq(1)'
    assert first.options.endswith(", or --quantizer.preset lsq --quantizer.bits 1")
    assert "masked" not in [finding.kind for finding in train(fogzo.lsq(1), lr=0.005)]


def test_dead_channels_are_found():
    first = train(fogzo.lsq(2), kill=12)[0]
    assert first.kind == "dead"
    assert [(name, round(share, 2)) for name, share in first.layers] == [("0", 0.25)]
    assert "25% of '0'" in first.message


def test_a_single_channel_of_zeros_is_found():
    (finding,) = train(fogzo.ternary(), empty=1)
    assert finding.kind == "dead"
    assert [(name, round(share, 2)) for name, share in finding.layers] == [("0", 0.02)]


def test_a_learning_rate_that_is_too_large_is_found():
    first = train(fogzo.lsq(2), lr=3.0)[0]
    assert first.kind == "learning_rate"
    assert "times smaller" in first.code


def test_a_learning_rate_that_changes_no_code_is_found():
    (finding,) = train(fogzo.lsq(2), lr=1e-8)
    assert finding.kind == "still"


def test_a_warm_up_is_not_said_to_train_nothing_until_it_ends():
    model = one_layer(*[0.5] * 8)
    watch, position = fogzo.Watch(model, every=20, window=5), 0.5
    for step in range(120):
        position -= 2e-5 * min(step, 80)  # which crosses no threshold
        move(model, *[position] * 8)
        watch.update()
    assert all(found.layers[0].flips == 0 for found in watch.history)
    kinds = [[finding.kind for finding in found.findings] for found in watch.history]
    assert ["still" in found for found in kinds] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_a_network_that_a_float_phase_has_trained_is_not_said_to_be_untrained(start):
    model = fogzo.quantize_(fill(nn.Linear(16, 64), 0.05), fogzo.fixed(2), everything)
    switch = fogzo.methods.quantize_from(model, start, total_steps=40) if start else None
    watch = fogzo.Watch(model, every=10, window=5)
    for step in range(40):
        with torch.no_grad():
            model.weight.add_(draw(64, 16, seed=step), alpha=0.05 if step < 40 * start else 1e-6)
        watch.update()
        if switch is not None:
            switch.advance_()
    kinds = [finding.kind for finding in watch.history[-1].findings]
    assert ("still" in kinds) == (not start)


@pytest.mark.parametrize("flips", [True, False])
def test_a_frozen_base_does_not_hide_whether_the_rest_trains(flips):
    layers = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(64, 64))
    model = fogzo.quantize_(layers, fogzo.fixed(2, step_size=1.0), everything)
    model[1].requires_grad_(False)
    watch = fogzo.Watch(model, every=2)
    for size in (0.2, -0.2 if flips else 0.3) * 2:
        move(model, *4 * [size])
        found = watch.update()
    assert [finding.kind for finding in found.findings].count("still") == (not flips)
    assert [layer.trained for layer in found.layers] == [True, False]


@pytest.mark.parametrize("window", [1, 5])
def test_step_sizes_that_are_measured_anew_are_no_movement(window):
    layers = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    model = fogzo.quantize_(fill(layers, 0.05), fogzo.fixed(2), everything)
    switch = fogzo.methods.quantize_from(model, 0.45, total_steps=40)
    watch = fogzo.Watch(model, every=10, window=window)
    for step in range(40):
        move_by = draw(64, 16, seed=step)
        with torch.no_grad():  # grow, so that step sizes do at the switch
            model[0].weight.add_(move_by, alpha=0.05 if step < 18 else 1e-5)
        watch.update()
        switch.advance_()
    moved = [inspection.layers[0].moved for inspection in watch.history]
    assert all(distance is None or distance < 0.01 for distance in moved[1:])
    assert "learning_rate" not in [f.kind for f in watch.history[-1].findings]


@pytest.mark.parametrize("quantizer", [OSCILLATING, fogzo.bbq(2)], ids=["fixed", "bbq"])
def test_oscillating_codes_are_found(quantizer):
    model = fogzo.quantize_(nn.Linear(32, 32, bias=False), quantizer, everything)
    target = 0.1 * draw(32, 32)
    with torch.no_grad():
        model.weight.copy_(0.1 * draw(32, 32, seed=1))
    watch = fogzo.Watch(model, every=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(100):
        x = draw(64, 32, seed=step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x @ target.T).backward()
        watch.update()
        optimizer.step()
    (finding,) = [f for f in watch.history[-1].findings if f.kind == "oscillating"]
    # Pulls need levels that are evenly spaced.
    assert ("fogzo.methods.dampening(model" in finding.code) == (quantizer is OSCILLATING)
    assert "a learning rate that decays to zero" in finding.code
    assert "undo the last one" in finding.message
