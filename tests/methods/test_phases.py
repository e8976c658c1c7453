"""Float first, quantized for the last share of the steps."""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel

import fogzo
from fogzo.methods import GridPenalty, GridPull, cage, dampening, quantize_from, winq

EVERYTHING = lambda module, name: True  # noqa: E731
KINDS = {
    "fixed": {"quantizer": fogzo.fixed(2)},
    "lsq per channel": {"quantizer": fogzo.lsq(2, granularity="channel")},
    "quest": {"quantizer": fogzo.quest(2)},
    "W2A2": {"quantizer": fogzo.lsq(2), "activations": fogzo.lsq(2)},
    "W2A4, dynamic": {"quantizer": fogzo.lsq(2), "activations": fogzo.quest(4)},
}
STEPS = 8


def network(kind=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    if kind is None:
        return model
    return fogzo.quantize_(
        model, KINDS[kind]["quantizer"], EVERYTHING, KINDS[kind].get("activations")
    )


def batch(step):
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4]


def train(model, optimizer, switch=None, steps=range(STEPS)):
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
        if switch is not None:
            switch.advance_()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def same(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("kind", KINDS)
def test_from_zero_is_quantized_training_bit_for_bit(kind):
    plain, switched = network(kind), network(kind)
    train(plain, adamw(plain))
    optimizer = adamw(switched)
    train(switched, optimizer, quantize_from(switched, 0.0, total_steps=STEPS))
    assert same(plain, switched)


@pytest.mark.parametrize("kind", KINDS)
def test_from_one_is_quantization_after_training_bit_for_bit(kind):
    after, switched = network(), network(kind)
    train(after, adamw(after))
    quantizer, activations = KINDS[kind]["quantizer"], KINDS[kind].get("activations")
    fogzo.quantize_(after, quantizer, EVERYTHING, activations)
    switch = quantize_from(switched, 1.0, total_steps=STEPS)
    train(switched, adamw(switched), switch)
    assert switch.is_quantized
    x, _ = batch(100)
    for model in (after, switched):
        if activations is not None and activations.scale.has_state:
            with pytest.raises(ValueError, match="has no step size yet"):
                model.eval()(x)
            with fogzo.calibrate_(model):
                model(x)
    assert same(after, switched)
    assert torch.equal(after.eval()(x), switched.eval()(x))


def test_calibrating_in_float_says_that_nothing_is_measured(caplog):
    model = network("W2A2")
    quantize_from(model, 0.5, total_steps=STEPS)
    with caplog.at_level(logging.WARNING, logger="fogzo"), fogzo.calibrate_(model):
        model(batch(0)[0])
    assert "nothing of 0, 2, which compute in float" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_float_training_before_and_measured_at_the_switch(kind):
    model, plain = network(kind), network()
    switch, optimizer = quantize_from(model, 0.5, total_steps=STEPS), adamw(model)
    train(model, optimizer, switch, range(STEPS // 2 - 1))
    assert not switch.is_quantized
    train(plain, adamw(plain), steps=range(STEPS // 2 - 1))
    assert torch.equal(model[0].weight, plain[0].weight)
    x, _ = batch(100)
    assert torch.equal(model(x), plain(x))
    learned = [n for n, _ in model.named_parameters() if n.endswith("_step")]
    assert all(model.get_parameter(name) not in optimizer.state for name in learned)

    identities = {name: id(param) for name, param in model.named_parameters()}
    train(model, optimizer, switch, [STEPS // 2 - 1])
    assert switch.is_quantized
    for layer in (model[0], model[2]):
        if layer.weight_step is not None:
            measured = layer.quantizer.initial_step_size(layer.weight)
            assert torch.equal(layer.weight_step, measured)
    before = {name: model.get_parameter(name).clone() for name in learned}
    train(model, optimizer, switch, range(STEPS // 2, STEPS))
    assert {name: id(param) for name, param in model.named_parameters()} == identities
    # An optimizer that was made in the float phase trains the learned steps.
    assert all(not torch.equal(model.get_parameter(name), before[name]) for name in learned)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [2, 4, 6])
def test_a_resumed_run_is_the_same_bit_for_bit(kind, at):
    model = network(kind)
    switch, optimizer = quantize_from(model, 0.5, total_steps=STEPS), adamw(model)
    train(model, optimizer, switch, range(at))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), switch.state_dict()))
    train(model, optimizer, switch, range(at, STEPS))

    again = network(kind)
    other, optimizer = quantize_from(again, 0.5, total_steps=STEPS), adamw(again)
    for part, state in zip((again, optimizer, other), saved, strict=True):
        part.load_state_dict(state)
    assert other.is_quantized == (at >= 4)
    train(again, optimizer, other, range(at, STEPS))
    assert same(model, again)


@pytest.mark.parametrize(("saved", "own"), [(1.0, 0.5), (0.5, 1.0)])
def test_a_run_that_switches_at_another_step_is_resumed_only_in_its_own_phase(saved, own):
    switch = quantize_from(network("fixed"), saved, total_steps=STEPS)
    other = quantize_from(network("fixed"), own, total_steps=STEPS)
    switch.load_state_dict({"step": 2})  # of versions that knew no more
    other.load_state_dict(switch.state_dict())
    assert other.step == 2 and not other.is_quantized
    switch.load_state_dict({"step": 5})
    with pytest.raises(ValueError, match=f"switches after {switch.switch_step}, and this one"):
        other.load_state_dict(switch.state_dict())
    assert other.step == 2 and not other.is_quantized
    again = quantize_from(network("fixed"), switch.switch_step / 16, total_steps=16)
    again.load_state_dict(switch.state_dict())  # as the message says
    assert again.is_quantized == switch.is_quantized


def test_an_average_begun_in_float_is_quantized_with_its_model():
    model = network("fixed")
    switch, optimizer = quantize_from(model, 0.5, total_steps=STEPS), adamw(model)
    average = AveragedModel(model, avg_fn=lambda old, new, count: new)
    for step in range(STEPS):
        train(model, optimizer, switch, [step])
        average.update_parameters(model)
    x, _ = batch(100)
    assert torch.equal(average(x), model(x))
    assert len(average.module[0].quantized_weight().unique()) <= 4


def test_the_inputs_of_an_average_begun_in_float_are_measured_before_it_is_used():
    model = network("W2A2")
    switch, optimizer = quantize_from(model, 0.5, total_steps=STEPS), adamw(model)
    average = AveragedModel(model)
    for step in range(STEPS):
        train(model, optimizer, switch, [step])
        average.update_parameters(model)
    with pytest.raises(ValueError, match=r"calibrate_\(averaged\)"):
        average.eval()(batch(0)[0])
    with fogzo.calibrate_(average):
        average(batch(0)[0])
    assert average(batch(0)[0]).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_made_in_float_is_quantized_with_step_sizes_of_its_own_weights(kind):
    model = network(kind)
    switch = quantize_from(model, 0.5, total_steps=2)
    with torch.no_grad():
        model[0].weight.mul_(10)
    best = copy.deepcopy(copy.deepcopy(model))
    with torch.no_grad():
        model[0].weight.mul_(10)
    plain = network()
    plain.load_state_dict(best.state_dict(), strict=False)
    assert torch.equal(best(batch(0)[0]), plain(batch(0)[0]))
    switch.advance_()
    fogzo.quantize_(plain, KINDS[kind]["quantizer"], EVERYTHING, KINDS[kind].get("activations"))
    assert same(best, plain)
    fogzo.dequantize_(best, activations="drop")
    assert torch.equal(best[0].weight, plain[0].quantized_weight())
    assert not torch.equal(best[0].weight, model[0].quantized_weight())


def test_a_pickled_model_stays_in_its_phase():
    model = network("fixed")
    quantize_from(model, 0.5, total_steps=STEPS)
    loaded = pickle.loads(pickle.dumps(model))
    x, _ = batch(0)
    assert loaded[0].is_in_float and torch.equal(loaded(x), model(x))


def test_baking_in_waits_for_the_switch_and_leaves_nothing_behind():
    model = network("W2A2")
    switch = quantize_from(model, 1.0, total_steps=1)
    with pytest.raises(ValueError, match="in float until its quantization begins"):
        fogzo.dequantize_(model)
    switch.advance_()
    fogzo.dequantize_(model)
    assert set(vars(model[0])) == set(vars(nn.Linear(2, 2)))


def test_a_step_that_was_given_stays():
    model = fogzo.quantize_(network(), fogzo.fixed(2, step_size=0.3), EVERYTHING)
    quantize_from(model, 1.0, total_steps=1).advance_()
    assert model[0].weight_step.item() == pytest.approx(0.3)


def test_a_compiled_model_notices_the_switch():
    model = network("lsq per channel")
    switch = quantize_from(model, 1.0, total_steps=1)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    x, _ = batch(0)
    plain = network()
    assert torch.equal(compiled(x), plain(x))
    switch.advance_()
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), plain(x))


def in_float(kind):
    """A network whose weights have grown tenfold in a float phase, which the next step ends."""
    model = network(kind)
    switch = quantize_from(model, 0.1, total_steps=10)
    with torch.no_grad():
        model[0].weight.mul_(10)
    for weight in (model[0].weight, model[2].weight):
        weight.grad = torch.zeros_like(weight)
    return model, switch


def pulled(model, act):
    """Whether a call changes weights or gradients."""
    tensors = [t for weight in (model[0].weight, model[2].weight) for t in (weight, weight.grad)]
    before = [tensor.detach().clone() for tensor in tensors]
    act()
    return not all(map(torch.equal, before, tensors))


@pytest.mark.parametrize("kind", ["fixed", "lsq per channel", "quest"])
@pytest.mark.parametrize("method", ["pull", "winq", "penalty"])
def test_nothing_is_pulled_to_the_levels_of_before_a_float_phase(kind, method):
    model, switch = in_float(kind)
    made = {
        "pull": lambda: GridPull(model, 0.5),
        "winq": lambda: winq(model, every=1),
        "penalty": lambda: GridPenalty(model, 0.5),
    }[method]()
    act = made.add_grads_ if method == "penalty" else made.pull_
    with pytest.warns(RuntimeWarning, match=r"at step 0, where '0\.weight', '2\.weight' are still"):
        assert not pulled(model, act)
    assert not pulled(model, act)  # and nothing is said again
    assert made.step == 2
    switch.advance_()
    assert pulled(model, act) and made.step == 3


@pytest.mark.parametrize("method", ["cage", "dampening"])
def test_a_ramp_that_begins_with_quantization_has_nothing_to_warn_of(method):
    model = network("fixed")
    switch, optimizer = quantize_from(model, 0.5, total_steps=STEPS), adamw(model)
    made = {
        "cage": lambda: cage(model, optimizer, total_steps=STEPS, start=0.5),
        "dampening": lambda: dampening(model, total_steps=STEPS, start=0.5),
    }[method]()
    act = made.add_grads_ if method == "dampening" else made.pull_
    for weight in (model[0].weight, model[2].weight):
        weight.grad = torch.zeros_like(weight)
    moved = []
    for _ in range(STEPS):
        moved.append(pulled(model, act))
        switch.advance_()
    begins = STEPS // 2 + (method == "dampening")
    assert moved == [step >= begins for step in range(STEPS)]


@pytest.mark.parametrize("start", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("steps", [3, 5, 7, 11])
def test_ramps_begin_with_quantization_where_it_begins_between_two_steps(start, steps):
    model = network("fixed")
    switch, optimizer = quantize_from(model, start, total_steps=steps), adamw(model)
    for weight in (model[0].weight, model[2].weight):
        weight.grad = torch.zeros_like(weight)
    pull = cage(model, optimizer, total_steps=steps, start=start)
    penalty = dampening(model, total_steps=steps, start=start)
    moved = []
    for _ in range(steps):  # warnings are errors
        penalty.add_grads_()
        moved.append(pulled(model, pull.pull_))
        switch.advance_()
    assert moved == [step >= switch.switch_step for step in range(steps)]


@pytest.mark.parametrize("way", ["closure", "recorded"])
def test_estimators_leave_the_exact_gradients_of_a_float_phase_alone(way):
    model = network("lsq per channel")
    switch = quantize_from(model, 0.5, total_steps=2)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    spsa = fogzo.SpsaEstimator(fogzo.quantized_weights(model))
    x, y = batch(0)
    calls = []

    def loss_of():
        calls.append(model[0].is_in_float)
        return mse_loss(model(x), y)

    for is_in_float in (True, False):
        model.zero_grad()
        loss = estimator.record(loss_of) if way == "recorded" else loss_of()
        loss.backward()
        grad = model[0].weight.grad.clone()
        calls.clear()
        stats = estimator.refine_grads_(*([loss_of, loss] if way == "closure" else []))
        assert torch.equal(model[0].weight.grad, grad) == is_in_float
        assert (calls == []) == (stats.agreement is None) == is_in_float
        model.zero_grad()
        assert spsa.refine_grads_(loss_of).probe_losses  # it has no other gradient
        switch.advance_()
    assert estimator.step == 2


def test_counts_of_numpy_are_those_of_python():
    model = network("fixed")
    switch = quantize_from(model, 1, total_steps=np.int64(4))
    assert switch.switch_step == 4 and type(switch.switch_step) is int
    optimizer = adamw(model)
    pulls = [cage(model, optimizer, total_steps=count(4), start=0.5) for count in (np.int16, int)]
    assert [pulls[0].strength(step) for step in range(5)] == [0, 0, 5, 10, 10]
    assert [pulls[1].strength(step) for step in range(5)] == [0, 0, 5, 10, 10]
    assert [winq(model, every=np.int64(2)).strength(step) for step in range(3)] == [0, 0.8, 0]


def test_impossible_calls_are_refused():
    with pytest.raises(ValueError, match="nothing in this model is quantized"):
        quantize_from(network(), 0.5, total_steps=10)
    model = network("fixed")
    with pytest.raises(ValueError, match="start must be a fraction of the run"):
        quantize_from(model, 1.5, total_steps=10)
    with pytest.raises(ValueError, match="total_steps must be a positive integer"):
        quantize_from(model, 0.5, total_steps=0)
    switch = quantize_from(model, 0.5, total_steps=10)
    for copied in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="in float already, by an earlier quantize_from"):
            quantize_from(copied, 0.5, total_steps=10)
    fresh = network("fixed")
    fresh.load_state_dict(model.state_dict())
    quantize_from(fresh, 0.5, total_steps=10)  # as the message says
    with pytest.raises(ValueError, match="expected one integer, step"):
        switch.load_state_dict({"steps": 1})
    with pytest.raises(ValueError, match="expected one integer, step"):
        switch.load_state_dict({"step": 1, "switch_step": None})
