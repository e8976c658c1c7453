"""Forgetting reaches its target on the quantized loss, keeps the rest and gives back the others."""

import math
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.testing._internal.distributed.fake_pg import FakeStore

import fogzo
from fogzo.methods import forget_
from fogzo.methods.forgetting import shortest
from toolbox import (
    EVERY_PRESET,
    PRESETS,
    Snapshot,
    Vandal,
    assert_bits_equal,
    batch,
    draw,
    everything,
    fill,
    pairwise,
    quantized_net,
)


@pytest.fixture(scope="module")
def experiment():
    folder = str(Path(__file__).parents[2] / "experiments")
    sys.path.insert(0, folder)
    try:
        import forgetting
    finally:
        sys.path.remove(folder)
    return forgetting


# What it is for


@pytest.fixture(scope="module")
def graphs(experiment):
    """Small 4-bit graphs with canaries: the problem, its scores before, and three edits."""
    task = experiment.Task(
        name="graph", bits=4, forgotten=30, steps=100, learning_rate=0.03, entities=240,
        relations=2, dims=24,
    )  # fmt: skip
    found = []
    for seed in range(3):
        problem = experiment.PROBLEMS["graph"](task, seed)
        data = experiment.Examples(*map(torch.cat, zip(problem.keep, problem.forget, strict=True)))
        before = experiment.trained(task, problem, data, seed)
        target = experiment.loss_of(before, problem.unseen).item()
        after, by_chance = deepcopy(before), deepcopy(before)
        report = forget_(after, *closures(experiment, after, problem), target=target)
        experiment.random_move(by_chance, report.flipped, seed)
        found.append((problem, target, before, after, by_chance, report))
    return found


def closures(experiment, model, problem):
    batches = problem.keep.split(32)
    keep = [lambda batch=batch: experiment.loss_of(model, batch) for batch in batches]
    return lambda: experiment.loss_of(model, problem.forget), keep


def mean_score(graphs, which, name):
    scores = [graph[0].score(graph[which], getattr(graph[0], name)) for graph in graphs]
    return sum(scores) / len(scores)


BEFORE, AFTER, BY_CHANCE = 2, 3, 4


def test_canaries_of_a_graph_are_forgotten_and_its_facts_kept(graphs):
    assert mean_score(graphs, BEFORE, "forget") > 0.9
    assert mean_score(graphs, AFTER, "forget") < 0.1
    assert mean_score(graphs, AFTER, "keep") > 0.93
    assert mean_score(graphs, AFTER, "test") > 0.9 * mean_score(graphs, BEFORE, "test")


def test_a_random_move_that_changes_as_many_codes_does_worse(experiment, graphs):
    assert mean_score(graphs, BY_CHANCE, "forget") > 0.7
    for problem, target, _, _, by_chance, _ in graphs:
        assert experiment.loss_of(by_chance, problem.forget) < target / 2


def test_the_attack_comes_near_to_chance(experiment, graphs):
    for which, near in ((BEFORE, False), (AFTER, True)):
        areas = [experiment.attack(g[which], g[0].forget, g[0].attack) for g in graphs]
        assert (abs(sum(areas) / len(areas) - 0.5) < 0.15) is near


def test_the_report_says_what_happened(experiment, graphs):
    for problem, target, before, after, _, report in graphs:
        assert report.reached and target <= report.forget_after < 1.05 * target
        for model, forget, keep in (
            (before, report.forget_before, report.keep_before),
            (after, report.forget_after, report.keep_after),
        ):
            own = closures(experiment, model, problem)
            assert forget == own[0]().item()
            assert keep == pytest.approx(sum(f().item() for f in own[1]) / len(own[1]))
        codes = [[w.codes() for w in fogzo.quantized_weights(model)] for model in (before, after)]
        changed = sum((a != b).sum() for a, b in zip(*codes, strict=True))
        assert report.flipped == changed / sum(c.numel() for c in codes[0])
        assert 10 < report.probes < 25


# All quantizers


def problem_of(model, dtype=torch.float32):
    """Closures of `Net`: an output to move away from, and batches of others to keep."""
    x, y = batch(dtype=dtype)
    others = [batch(rows=4, dtype=dtype, seed=seed) for seed in (11, 21, 31)]
    keep = [lambda x=x: model(x).square().mean() for x, _ in others]
    return (lambda: mse_loss(model(x), y)), keep


@pairwise(preset=PRESETS, dtype=[torch.float32, torch.float64, torch.bfloat16])
def test_every_quantizer_reaches_the_target_in_its_own_precision(preset, dtype):
    model = quantized_net(preset).to(dtype).eval()
    forget, keep = problem_of(model, dtype)
    start = model.state_dict()
    start = {name: value.clone() for name, value in start.items()}
    target = 1.15 * forget().item()
    report = forget_(model, forget, keep, target=target)
    assert report.reached and report.forget_after >= target and report.flipped > 0
    assert forget().item() == report.forget_after  # dynamic step sizes have followed
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, start[n])}
    assert changed == {"first.weight", "second.weight"}
    # From a checkpoint in another network: the same edit, to the bit.
    other = quantized_net(preset).to(dtype).eval()
    other.load_state_dict(start)
    assert forget_(other, *problem_of(other, dtype), target=target) == report
    for name, value in other.state_dict().items():
        assert_bits_equal(value, model.state_dict()[name])


# What is given back


@EVERY_PRESET
def test_weights_are_as_they_were_if_no_step_reaches_the_target(preset):
    model = quantized_net(preset)  # in training mode, with dropout and batch statistics
    forget, keep = problem_of(model)
    forget().backward()
    before = Snapshot(model)
    with pytest.warns(RuntimeWarning, match="no step along the gradient raises the loss"):
        report = forget_(model, Vandal(model, forget), keep, target=1e9)
    before.assert_same()
    assert not report.reached and report.step == 0 and report.flipped == 0
    assert report.forget_after == report.forget_before < 1e9 and report.probes == 16


@pytest.mark.parametrize("at", [0, 1, 3])  # before, at the gradient, in the search
@pytest.mark.parametrize("ending", ["raises", "is interrupted", "returns NaN"])
def test_everything_is_as_it_was_if_a_closure_fails(ending, at):
    model = quantized_net()
    forget, keep = problem_of(model)
    forget().backward()
    before = Snapshot(model)
    errors = {"raises": OSError, "is interrupted": KeyboardInterrupt, "returns NaN": ValueError}
    vandal = Vandal(model, forget, ending, at)
    if ending == "returns NaN" and at == 3:
        with pytest.warns(RuntimeWarning, match="no step"):
            assert not forget_(model, vandal, keep, target=1e9).reached
    else:
        with pytest.raises(errors[ending]):
            forget_(model, vandal, keep, target=1e9)
    before.assert_same()


def test_nothing_happens_above_the_target():
    model = quantized_net()
    forget, keep = problem_of(model)
    before = Snapshot(model)
    report = forget_(model, forget, keep, target=0.0)
    before.assert_same()
    assert report.reached and (report.step, report.probes, report.flipped) == (0, 0, 0)


def test_modes_buffers_streams_and_gradients_are_given_back_after_an_edit():
    model = quantized_net()
    forget, keep = problem_of(model)
    forget().backward()
    target, before = 1.1 * forget().item(), Snapshot(model)
    assert forget_(model, Vandal(model, forget), keep, target=target).reached
    with torch.no_grad():
        for name in ("first", "second"):
            getattr(model, name).weight.copy_(before.values[f"{name}.weight"])
    before.assert_same()


def test_frozen_weights_and_padding_rows_stay():
    model = nn.ModuleDict({"table": nn.Embedding(6, 4, padding_idx=2), "out": nn.Linear(4, 3)})
    fogzo.quantize_(fill(model), fogzo.fixed(4), everything)
    model["out"].weight.requires_grad_(False)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    index = torch.arange(6)
    forget = lambda: model["out"](model["table"](index)).square().mean()  # noqa: E731
    assert forget_(model, forget, [forget], target=2 * forget().item()).reached
    assert torch.equal(model["out"].weight, before["out.weight"])
    moved = (model["table"].weight != before["table.weight"]).any(1)
    assert moved.tolist() == [True, True, False, True, True, True]


def test_a_quantizer_of_ones_own_is_edited_without_counting_codes():
    weight, step = nn.Parameter(draw(6, 4)), 0.25

    def loss(x):
        hard = step * (weight / step).round()
        return (x @ (weight + (hard - weight).detach())).square().mean()

    x, other = draw(5, 6, seed=1), draw(5, 6, seed=2)
    start = loss(x).item()
    report = forget_(
        [("w", weight, step)], lambda: loss(x), [lambda: loss(other)], target=2 * start
    )
    assert report.reached and report.flipped is None
    assert report.forget_before == start and report.forget_after == loss(x).item() >= 2 * start


# The length


def test_the_shortest_length_on_a_staircase():
    length, loss, probes = shortest(lambda t: math.floor(4 * t), 3.0)
    assert loss == 3 and 0.75 <= length < 0.76 and probes == 15
    assert shortest(lambda t: 1.0, 3.0) == (None, 1.0, 16)
    assert shortest(lambda t: math.nan, 3.0)[0] is None
    for end in (math.inf, math.nan):  # where the loss ends, but not before the target
        length, loss, _ = shortest(lambda t, end=end: t if t < 1 else end, 0.9)
        assert 0.9 <= length == loss < 0.91


# Mistakes


@pytest.fixture(scope="module")
def net():
    return quantized_net().eval()


def forget_with(net, **changed):
    forget, keep = problem_of(net)
    given = {"weights": net, "forget": forget, "keep": keep, "target": 1e9} | changed
    return forget_(given.pop("weights"), given.pop("forget"), given.pop("keep"), **given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep": []}, "keep must be a list of functions.*got an empty list"),
        ({"keep": lambda: 1.0}, "keep must be a list of functions"),
        ({"keep": [1.0]}, r"keep must be a list of functions.*got \[1.0\]"),
        ({"forget": 1.0}, "forget must be a function that returns a loss, got float"),
        ({"target": math.nan}, "target must be a finite number, got nan"),
        ({"target": math.inf}, "target must be a finite number, got inf"),
        ({"target": None}, "target must be a finite number, got None"),
        ({"damping": 0}, "damping must be a positive, finite number"),
        ({"forget": lambda: 1.0}, "has no history to differentiate"),
        ({"forget": lambda: torch.ones(3)}, r"scalar loss .* got a tensor of shape \(3,\)"),
        ({"forget": lambda: torch.tensor(math.nan)}, "the loss of forget is nan"),
        ({"keep": [lambda: math.inf]}, "the loss of keep is nan|the loss of keep is inf"),
        ({"weights": []}, "got no quantized weights"),
    ],
)
def test_a_mistake_is_explained_and_changes_nothing(net, changed, message):
    before = Snapshot(net)
    with pytest.raises(ValueError, match=message):
        forget_with(net, **changed)
    before.assert_same()


def test_a_loss_of_another_model_is_told_from_one_without_a_slope(net):
    other = quantized_net()
    with pytest.raises(ValueError, match="weights of another model than the closure's"):
        forget_with(net, forget=problem_of(other)[0])


def test_a_gradient_that_is_not_finite_is_refused(net):
    weight = net.first.weight
    forget = lambda: (weight * 0).abs().sum().sqrt()  # noqa: E731
    with pytest.raises(ValueError, match=r"of forget at 'first\.weight' is not finite"):
        forget_with(net, forget=forget)


def test_frozen_networks_are_refused():
    net = quantized_net().requires_grad_(False)
    with pytest.raises(ValueError, match="all frozen"):
        forget_with(net)


def test_a_network_that_is_still_in_float_is_refused():
    net = quantized_net().eval()
    switch = fogzo.methods.quantize_from(net, 0.5, total_steps=2)
    before = Snapshot(net)
    with pytest.raises(ValueError, match=r"are still in float.*switch\.advance_\(\)"):
        forget_with(net)
    before.assert_same()
    switch.advance_()  # as the message says
    forget_with(net, target=-1.0)


def test_several_ranks_are_refused(net):
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ValueError, match="weights of one process"):
            forget_with(net)
    finally:
        dist.destroy_process_group()
