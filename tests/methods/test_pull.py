"""The pull to the grid: what CAGE, WinQ and dampening do to weights, and what they leave alone."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from transformers.optimization import Adafactor
from transformers.pytorch_utils import Conv1D

import fogzo
from fogzo.methods import GridPenalty, GridPull, cage, dampening, winq
from fogzo.methods.ramps import CosineRamp, LinearRamp, Periodic
from fogzo.quantizers import Grid, uniform

PRESETS = {
    "fixed": fogzo.fixed(2),
    "fixed, integer levels": fogzo.fixed(3),
    "per channel": fogzo.fixed(2, granularity="channel"),
    "per group": fogzo.lsq(2, granularity=4),
    "lsq": fogzo.lsq(2),
    "quest": fogzo.quest(2),
    "ternary": fogzo.ternary(),
    "sign": fogzo.sign(),
}
EVERYTHING = lambda module, name: True  # noqa: E731


def network(quantizer, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    return fogzo.quantize_(model, quantizer, EVERYTHING)


def train(model, steps, before=None, after=None, lr=0.01, optimizer=torch.optim.AdamW):
    generator = torch.Generator().manual_seed(1)
    optimizer = optimizer(model.parameters(), lr=lr)
    before, after = before and before(optimizer), after and after(optimizer)
    for _ in range(steps):
        x = torch.randn(32, 16, generator=generator)
        optimizer.zero_grad()
        mse_loss(model(x), x[:, :4]).backward()
        if before:
            before.add_grads_()
        optimizer.step()
        if after:
            after.pull_()
    return [param.detach().clone() for param in model.parameters()]


def distances(model):
    found = []
    for weight in fogzo.quantized_weights(model):
        w = weight.param if weight.rotate is None else weight.rotate(weight.param)
        found.append(w - weight.grid.round(w / weight.step_size()) * weight.step_size())
    return [distance.detach() for distance in found]


def same(left, right):
    return all(map(torch.equal, left, right))


# What a pull does


@pytest.mark.parametrize("name", PRESETS)
def test_a_pull_takes_its_share_of_the_distance(name):
    model = network(PRESETS[name])
    before, codes = distances(model), [w.codes() for w in fogzo.quantized_weights(model)]
    steps = [w.step_size().clone() for w in fogzo.quantized_weights(model)]
    GridPull(model, 0.25).pull_()
    weights = fogzo.quantized_weights(model)
    assert same(codes, [w.codes() for w in weights])
    kept = PRESETS[name].scale.has_state
    for index, weight in enumerate(weights):
        step = steps[index]
        w = weight.param if weight.rotate is None else weight.rotate(weight.param)
        left = w - weight.grid.round(w / step) * step
        torch.testing.assert_close(left, 0.75 * before[index], atol=1e-6, rtol=0)
        assert not kept or torch.equal(weight.step_size(), step)


@pytest.mark.parametrize("name", ["fixed", "per group", "lsq"])
def test_a_whole_pull_ends_on_the_levels_exactly(name):
    model = network(PRESETS[name])
    levels = [layer.quantized_weight().detach() for layer in model if isinstance(layer, nn.Linear)]
    GridPull(model, 1.0).pull_()
    assert same(levels, [w.param for w in fogzo.quantized_weights(model)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_pull_in_other_dtypes(dtype):
    model = network(fogzo.fixed(2), dtype)
    before = [distance.abs().mean().item() for distance in distances(model)]
    GridPull(model, 0.5).pull_()
    after = [distance.abs().mean().item() for distance in distances(model)]
    assert after == pytest.approx([d / 2 for d in before], rel=0.02)
    assert all(w.param.dtype == dtype for w in fogzo.quantized_weights(model))


def test_weights_beyond_the_range_are_pulled_in():
    model = network(fogzo.fixed(2, step_size=0.01))
    GridPull(model, 1.0).pull_()
    for weight in fogzo.quantized_weights(model):
        assert weight.param.abs().max().item() == pytest.approx(0.015)


def test_beside_a_step_size_of_zero_the_level_is_zero():
    weight = nn.Parameter(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        weight[0] = 0.0
    before, step = weight.detach().clone(), torch.tensor([[0.0], [0.0], [0.5]])
    record = fogzo.QuantizedWeight("weight", weight, lambda: step, grid=uniform(2))
    weight.grad = torch.zeros_like(weight)
    GridPenalty([record], 0.5).add_grads_()
    assert weight.grad[:2].eq(0).all() and weight.grad[2].any()
    GridPull([record], 0.5).pull_()
    assert torch.equal(weight[:2], before[:2] / 2) and weight.isfinite().all()


def test_padding_rows_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 8, padding_idx=2), nn.Linear(8, 4))
    fogzo.quantize_(model, fogzo.quest(2), EVERYTHING)
    before = model[0].weight.detach().clone()
    GridPull(model, 0.5).pull_()
    changed = (model[0].weight != before).any(1)
    assert changed.tolist() == [True, True, False, True, True, True]


def test_frozen_weights_stay():
    model = network(fogzo.fixed(2))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    GridPull(model, 0.5).pull_()
    assert torch.equal(model[0].weight, before)


# CAGE


def test_cage_leaves_what_its_authors_recipe_leaves():
    # 30M parameters: 11,444 steps, learning rate .0012 by OneCycle, no other gradient.
    steps, param = 11_444, nn.Parameter(torch.full((1, 1), 0.4))
    weight = fogzo.QuantizedWeight("w", param, lambda: torch.tensor(1.0), grid=Grid("int", -4, 3))
    for strength, start, left in ((10.0, 0.8, 0.1975), (2.5, 0.9, 0.8355)):
        with torch.no_grad():
            param.fill_(0.4)
        optimizer = torch.optim.SGD([param], lr=0.0012, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            0.0012,
            total_steps=steps,
            pct_start=0.1,
            div_factor=100,
            final_div_factor=0.1,
        )
        pull = cage([weight], optimizer, total_steps=steps, strength=strength, start=start)
        param.grad = torch.zeros_like(param)
        optimizer.step()  # of a zero gradient, as schedules want to come after a step
        for step in range(steps):
            pull.pull_()
            if step < steps - 1:
                schedule.step()
        assert param.item() / 0.4 == pytest.approx(left, abs=2e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_cage_is_bitwise_off_at_strength_zero_and_before_its_start(name):
    plain = train(network(PRESETS[name]), 4)
    model = network(PRESETS[name])
    off = train(model, 4, after=lambda o: cage(model, o, total_steps=4, strength=0.0))
    model = network(PRESETS[name])
    early = train(model, 4, after=lambda o: cage(model, o, total_steps=40))
    assert same(plain, off) and same(plain, early)
    model = network(PRESETS[name])
    on = train(model, 4, after=lambda o: cage(model, o, total_steps=4, start=0.0))
    assert not same(plain, on)


def test_cage_uses_the_present_learning_rate_of_each_group():
    model = network(fogzo.fixed(2))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], lr=0.2
    )
    pull = GridPull(model, 1.0, optimizer)
    before = [distance.norm() for distance in distances(model)]
    pull.pull_()
    optimizer.load_state_dict(optimizer.state_dict())  # makes new groups
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[1]["lr"] = torch.tensor(0.5)
    pull.pull_()
    after = [distance.norm() for distance in distances(model)]
    ratios = [(a / b).item() for a, b in zip(after, before, strict=True)]
    assert ratios == pytest.approx([0.9, 0.8 * 0.5], abs=1e-5)


def test_two_optimizers_share_a_model():
    model = network(fogzo.fixed(2))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.AdamW(model[2].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'2.weight' is in no group .*\[muon, adamw\]"):
        cage(model, first, total_steps=10)
    GridPull(model, 1.0, [first, second]).pull_()


def test_a_share_above_one_ends_on_the_level_and_warns_once():
    model = network(fogzo.fixed(2))
    pull = GridPull(model, 10.0, torch.optim.SGD(model.parameters(), lr=0.5))
    with pytest.warns(RuntimeWarning, match=r"learning rate times strength is 5 .* on its level"):
        pull.pull_()
    assert max(distance.abs().max() for distance in distances(model)) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pull.pull_()


# WinQ


def test_winq_leaves_a_power_of_alpha_and_the_codes():
    model = network(fogzo.fixed(2))
    before, codes = distances(model), [w.codes() for w in fogzo.quantized_weights(model)]
    pull = winq(model, every=5, keep=0.6)
    for _ in range(14):
        pull.pull_()
    assert pull.step == 14
    for old, new in zip(before, distances(model), strict=True):
        torch.testing.assert_close(new, 0.6**2 * old, atol=1e-6, rtol=1e-4)
    assert same(codes, [w.codes() for w in fogzo.quantized_weights(model)])


def test_winq_that_keeps_all_is_bitwise_off():
    model = network(fogzo.quest(2))
    off = train(model, 4, after=lambda _: winq(model, every=1, keep=1.0))
    assert same(train(network(fogzo.quest(2)), 4), off)


# Dampening


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_dampening_adds_the_gradient_of_its_penalty(name, mean):
    model = network(PRESETS[name])
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.5)
    GridPenalty(model, 0.3, mean_over_inputs=mean).add_grads_(grad_scale=8.0)
    for weight in fogzo.quantized_weights(model):
        rotate = weight.rotate or (lambda x: x)
        latent = weight.param.detach().clone().requires_grad_()
        step = weight.step_size().detach()
        w = rotate(latent)
        level = weight.grid.round(w.detach() / step) * step
        inside = torch.minimum(torch.maximum(w, weight.grid.low * step), weight.grid.high * step)
        penalty = 0.3 * (level - inside).square()
        (penalty.mean(1) if mean else penalty).sum().backward()
        torch.testing.assert_close(weight.param.grad, 0.5 + 8 * latent.grad, atol=1e-6, rtol=1e-5)


def test_dampening_is_zero_at_levels_and_beyond_the_range():
    param = nn.Parameter(torch.tensor([[0.5, -1.5, 4.0, -9.0, 0.75]]))
    weight = fogzo.QuantizedWeight("w", param, lambda: torch.tensor(1.0), grid=uniform(2))
    param.grad = torch.zeros_like(param)
    GridPenalty([weight], 1.0).add_grads_()
    assert param.grad.tolist() == [[0, 0, 0, 0, 0.5]]


class Experts(nn.Module):
    """Six matrices of 5 outputs and 3 inputs, by the protocol of transformers."""

    def __init__(self, transposed):
        super().__init__()
        self.num_experts, self.is_transposed = 6, transposed
        self.up = nn.Parameter(torch.randn(6, *((3, 5) if transposed else (5, 3))))


LAYERS = {
    "linear": (lambda: nn.Linear(8, 32), 8),
    "conv": (lambda: nn.Conv2d(8, 4, 3, groups=2), 4 * 9),
    "transposed conv": (lambda: nn.ConvTranspose1d(16, 4, 3), 16 * 3),
    "transposed conv of groups": (lambda: nn.ConvTranspose1d(16, 4, 3, groups=2), 8 * 3),
    "transformers conv1d": (lambda: Conv1D(32, 8), 8),
    "experts": (lambda: Experts(False), 3),
    "transposed experts": (lambda: Experts(True), 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_is_over_the_inputs_of_an_output(name):
    make, inputs = LAYERS[name]
    torch.manual_seed(0)
    (weight,) = fogzo.quantized_weights(fogzo.quantize_(make(), fogzo.fixed(2), EVERYTHING))
    assert weight.fan_in == inputs
    found = []
    for mean in (False, True):
        weight.param.grad = torch.zeros_like(weight.param)
        GridPenalty([weight], 0.3, mean_over_inputs=mean).add_grads_()
        found.append(weight.param.grad)
    assert found[0].any()
    torch.testing.assert_close(found[1] * inputs, found[0])


def test_a_record_that_does_not_say_its_inputs_has_outputs_first():
    param = nn.Parameter(torch.full((2, 3, 5), 0.75))
    param.grad = torch.zeros_like(param)
    weight = fogzo.QuantizedWeight("w", param, lambda: torch.tensor(1.0), grid=uniform(2))
    GridPenalty([weight], 1.0, mean_over_inputs=True).add_grads_()
    torch.testing.assert_close(param.grad, torch.full_like(param, 0.5 / 15))


@pytest.mark.parametrize("name", ["lsq", "quest"])
def test_dampening_is_bitwise_off_before_its_start_and_never_trains_steps(name):
    plain = train(network(PRESETS[name]), 4)
    model = network(PRESETS[name])
    early = train(model, 4, before=lambda _: dampening(model, total_steps=40))
    assert same(plain, early)
    model = network(PRESETS[name])
    penalty = GridPenalty(model, 1.0)
    for weight in penalty.weights:
        weight.param.grad = torch.zeros_like(weight.param)
    penalty.add_grads_()
    assert all(p.grad is None for n, p in model.named_parameters() if n.endswith("weight_step"))


def test_dampening_without_gradients_says_where_it_belongs():
    with pytest.raises(ValueError, match="after backward and before zero_grad"):
        dampening(network(fogzo.fixed(2)), total_steps=10).add_grads_()


# Checkpoints, arguments


@pytest.mark.parametrize("kind", ["cage", "winq", "dampening"])
def test_a_resumed_run_is_the_same_bit_for_bit(kind):
    makers = {
        "cage": lambda model, o: cage(model, o, total_steps=8, start=0.25),
        "winq": lambda model, o: winq(model, every=3),
        "dampening": lambda model, o: dampening(model, total_steps=8),
    }

    def run(model, pull, optimizer, steps):
        for step in steps:
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            mse_loss(model(x), x[:, :4]).backward()
            if isinstance(pull, GridPenalty):
                pull.add_grads_()
            optimizer.step()
            if isinstance(pull, GridPull):
                pull.pull_()

    model = network(fogzo.lsq(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pull = makers[kind](model, optimizer)
    run(model, pull, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pull.state_dict()))
    run(model, pull, optimizer, range(4, 8))

    again = network(fogzo.lsq(2))
    other = torch.optim.AdamW(again.parameters(), lr=0.01)
    resumed = makers[kind](again, other)
    for part, state in zip((again, other, resumed), saved, strict=True):
        part.load_state_dict(state)
    run(again, resumed, other, range(4, 8))
    assert same(list(model.parameters()), list(again.parameters()))


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -1.0, "1", None, torch.tensor(-1.0), torch.ones(2)], ids=repr
)
@pytest.mark.parametrize("kind", [GridPull, GridPenalty])
def test_each_value_of_a_function_is_checked_before_anything_is_changed(kind, value):
    model = network(fogzo.fixed(2))
    made = kind(model, lambda step: value if step == 1 else 0.5)
    act = made.pull_ if kind is GridPull else made.add_grads_
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    act()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    with pytest.raises(ValueError, match=r"0 or more, at every step, got .* at step 1: strength="):
        act()
    assert made.step == 1
    for (weight, grad), param in zip(before, model.parameters(), strict=True):
        assert torch.equal(weight, param) and torch.equal(grad, param.grad)


def test_a_function_may_return_a_tensor():
    model, same_model = network(fogzo.fixed(2)), network(fogzo.fixed(2))
    GridPull(model, lambda step: torch.tensor(0.5)).pull_()
    GridPull(same_model, 0.5).pull_()
    assert same(list(model.parameters()), list(same_model.parameters()))


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0.0, -1.0, "2", torch.ones(2)])
def test_a_scale_of_gradients_is_checked_before_anything_is_changed(scale):
    model = network(fogzo.fixed(2))
    model(torch.ones(1, 16)).sum().backward()
    before = [param.grad.clone() for param in model.parameters()]
    penalty = GridPenalty(model, 1.0)
    with pytest.raises(ValueError, match=r"grad_scale must be a positive.*scaler\.get_scale\(\)"):
        penalty.add_grads_(grad_scale=scale)
    assert same(before, [param.grad for param in model.parameters()]) and penalty.step == 0
    penalty.add_grads_(grad_scale=torch.tensor(2.0))


@pytest.mark.parametrize("rate", [math.nan, math.inf, -0.1])
def test_learning_rate_times_strength_is_checked_before_anything_is_changed(rate):
    model = network(fogzo.fixed(2))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    pull = GridPull(model, 2.0, optimizer)
    optimizer.param_groups[1]["lr"] = rate
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match=rf"got {rate:g} \* 2 for '2\.weight' at step 0: mind"):
        pull.pull_()
    assert same(before, list(model.parameters())) and pull.step == 0


@pytest.mark.parametrize("made_by", [cage, fogzo.methods.cewt])
def test_an_optimizer_without_learning_rates_is_refused_before_anything_is_changed(made_by):
    model = network(fogzo.fixed(2))
    options = {"total_steps": 9} if made_by is cage else {}
    without = torch.optim.Optimizer(model.parameters(), {})
    relative = Adafactor(model.parameters())  # its lr is None
    for optimizer in (without, relative):
        with pytest.raises(ValueError, match=r"'0\.weight' is in a group .* no learning rate"):
            made_by(model, optimizer, **options)
    made_by(model, Adafactor(model.parameters(), lr=1e-3, relative_step=False), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made_by(model, optimizer, **options)
    optimizer.param_groups[0]["lr"] = None
    before = [param.detach().clone() for param in model.parameters()]
    if made_by is not cage:
        with pytest.raises(ValueError, match="no learning rate"):
            optimizer.step()
    assert same(before, list(model.parameters()))


@pytest.mark.parametrize("quantizer", [fogzo.fixed(2), fogzo.quest(2)])
def test_a_network_that_was_baked_in_is_not_pulled(quantizer):
    model = network(quantizer)
    model(torch.ones(1, 16)).sum().backward()
    pull, penalty = GridPull(model, 0.5), GridPenalty(model, 0.5)
    weights = fogzo.quantized_weights(model)
    fogzo.dequantize_(copy.deepcopy(model))  # as the message says
    pull.pull_()
    fogzo.dequantize_(model)
    for call in (pull.pull_, penalty.add_grads_, lambda: GridPull(weights, 0.5)):
        with pytest.raises(ValueError, match=r"a Linear has no step sizes since fogzo\."):
            call()


@pytest.mark.parametrize("state", [None, {}, {"step": -1}, {"step": 1.5}, {"step": 1, "seed": 2}])
def test_other_states_are_refused(state):
    with pytest.raises(ValueError, match="expected one integer, step"):
        winq(network(fogzo.fixed(2)), every=2).load_state_dict(state)


def test_a_weight_without_known_levels_is_refused():
    param = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"levels of 'w' are not known.*grid=fogzo.quantizers"):
        GridPull([("w", param, 0.1)], 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GridPull(network(fogzo.fixed(2)), -1.0), "strength must be 0 or more"),
        (lambda: GridPull(network(fogzo.fixed(2)), math.nan), "strength must be 0 or more"),
        (lambda: winq(network(fogzo.fixed(2)), every=0), "every must be a positive integer"),
        (lambda: winq(network(fogzo.fixed(2)), every=9, keep=1.2), "keep must be from 0 to 1"),
        (lambda: winq(network(fogzo.fixed(2)), every=9, keep="0.2"), "keep must be from 0 to 1"),
        (
            lambda: cage(network(fogzo.fixed(2)), torch.optim.SGD, total_steps=9),
            r"got <class 'torch\.optim\.sgd\.SGD'>: fogzo\.methods\.cage",
        ),
        (lambda: cage(network(fogzo.fixed(2)), None, total_steps=9), "list of some, got None"),
        (lambda: GridPull(network(fogzo.fixed(2)), 1.0, [3]), r"list of some, got \[3\]"),
        (lambda: LinearRamp(1.0, 0), "total_steps must be a positive integer"),
        (lambda: LinearRamp(1.0, 10, 1.5), "start must be a fraction"),
        (lambda: CosineRamp(1.0, 10, 1), "start=1, at which the run is over"),
        (lambda: Periodic(1.0, True), "every must be a positive integer"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
