"""Kept norm and Gaussian weights: the projection, and the constrained steps of optimizers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo
from fogzo.methods import cewt, project_to_gaussian

EVERYTHING = lambda module, name: True  # noqa: E731


def sample(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def network(quantizer=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    return fogzo.quantize_(model, quantizer or fogzo.fixed(2), EVERYTHING)


def adamw(model, lr=0.05):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def train(model, optimizer, steps):
    for step in steps:
        x = sample(32, 16, seed=step)
        optimizer.zero_grad()
        mse_loss(model(x), x[:, :4]).backward()
        optimizer.step()


# The projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_projection_keeps_norm_and_order_and_is_idempotent(dtype):
    w = sample(64, 100, dtype=dtype) ** 3
    projected = project_to_gaussian(w)
    exact = torch.linalg.vector_norm(w, dtype=torch.float64)
    norm = torch.linalg.vector_norm(projected, dtype=torch.float64)
    assert (norm / exact).item() == pytest.approx(1, abs=1e-6 if dtype != torch.bfloat16 else 0.01)
    order = w.flatten().argsort(stable=True)
    assert (projected.flatten()[order].diff() >= 0).all()
    norm = float(norm)
    once = project_to_gaussian(w, norm)
    assert torch.equal(project_to_gaussian(once, norm), once)


def test_a_gaussian_hardly_changes_and_a_uniform_does():
    w = sample(500, 500)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(project_to_gaussian(w).flatten(), w.flatten(), 0).item() > 0.99998
    w = torch.rand(500, 500, generator=torch.Generator().manual_seed(0)) - 0.5
    assert cosine(project_to_gaussian(w).flatten(), w.flatten(), 0).item() == pytest.approx(
        0.977, abs=1e-3
    )


def test_the_density_at_thresholds_is_the_gaussians():
    # Within .005 steps of a threshold, thresholds one rms apart: .01 whatever the weights were.
    w = project_to_gaussian(sample(1024, 1024) ** 5, norm=1024.0)
    near = (w - (w.floor() + 0.5)).abs() < 0.005
    assert near.double().mean().item() == pytest.approx(0.0100, abs=2e-5)


def test_equal_weights_keep_the_order_of_their_places():
    assert torch.equal(
        project_to_gaussian(torch.zeros(3), 1.0).sort().values,
        project_to_gaussian(torch.tensor([1.0, 2.0, 3.0]), 1.0),
    )


@pytest.mark.parametrize("value", [3.0, -3.0, 0.0])
def test_a_single_weight_has_no_quantile_and_keeps_its_sign(value):
    single = torch.tensor([[value]])
    assert torch.equal(project_to_gaussian(single), single)
    assert project_to_gaussian(single, 2.0).item() == math.copysign(2.0, value)


# Constrained steps


@pytest.mark.parametrize("name", ["fixed", "quest", "bbq"])
def test_a_step_has_the_length_of_the_learning_rate_and_ends_on_a_gaussian(name):
    quantizer = {"fixed": fogzo.fixed(2), "quest": fogzo.quest(2), "bbq": fogzo.bbq(2)}[name]
    model = network(quantizer)
    optimizer = adamw(model)
    constraint = cewt(model, optimizer)
    before = {w.name: w.param.detach().clone() for w in constraint.weights}
    train(model, optimizer, range(1))
    plain = network(quantizer)
    train(plain, adamw(plain), range(1))
    for weight, free in zip(constraint.weights, fogzo.quantized_weights(plain), strict=True):
        rotate = weight.rotate or (lambda x: x)
        change = free.param.detach() - before[weight.name]
        norm = before[weight.name].norm()
        moved = before[weight.name] + 0.05 * norm * change / change.norm()
        expected = rotate(project_to_gaussian(rotate(moved), float(norm)))
        torch.testing.assert_close(weight.param.detach(), expected, atol=1e-5, rtol=1e-4)
        assert weight.param.norm().item() == pytest.approx(norm.item(), rel=1e-6)
    assert torch.equal(model[0].bias, plain[0].bias)  # not a quantized weight


def test_the_norm_alone():
    model = network()
    optimizer = adamw(model)
    constraint = cewt(model, optimizer, project=False)
    norms = dict(constraint.norms)
    train(model, optimizer, range(3))
    for weight in constraint.weights:
        assert weight.param.norm().item() == pytest.approx(norms[weight.name], rel=1e-6)
        gaussian = project_to_gaussian(weight.param.detach())
        assert (gaussian - weight.param).abs().max() > 1e-3


def test_gradients_that_come_in_a_closure_are_constrained_from_the_first_step_on():
    found = []
    for in_closure in (False, True):
        model = network()
        optimizer = adamw(model)
        cewt(model, optimizer)
        loss = model(sample(8, 16)).square().mean()
        loss.backward(retain_graph=True)
        if in_closure:
            optimizer.zero_grad()
            optimizer.step(lambda loss=loss: loss.backward())
        else:
            optimizer.step()
        found.append([weight.param.detach() for weight in fogzo.quantized_weights(model)])
    assert all(map(torch.equal, *found))


def test_a_learning_rate_of_zero_and_no_gradient_leave_the_order():
    model = network()
    optimizer = adamw(model)
    cewt(model, optimizer)
    train(model, optimizer, range(2))
    before = [w.param.detach().clone() for w in fogzo.quantized_weights(model)]
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient
    assert all(map(torch.equal, before, [w.param for w in fogzo.quantized_weights(model)]))
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, range(2, 3))
    for old, weight in zip(before, fogzo.quantized_weights(model), strict=True):
        torch.testing.assert_close(weight.param.detach(), old, atol=1e-6, rtol=0)


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weight_that_the_optimizer_does_not_move_stays_whatever_the_rate(dtype, project):
    model = network().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    cewt(model, optimizer, project=project)
    before = [weight.detach().clone() for weight in (model[0].weight, model[2].weight)]
    model[0].weight.grad = torch.zeros_like(before[0])
    model[2].weight.grad = torch.ones_like(before[1])
    optimizer.step()
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[2].weight, before[1]) and model[2].weight.isfinite().all()


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_norm_that_no_weight_should_keep_is_refused(value):
    model = network(fogzo.fixed(2, step_size=0.3))
    with torch.no_grad():
        model[2].weight.fill_(value)
    with pytest.raises(ValueError, match=rf"norm of '2\.weight' is {value:g} .*nn\.init\.normal_"):
        cewt(model, adamw(model))


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_taken_back_and_said_once(wrong, project):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    constraint = cewt(model, optimizer, project=project)
    train(model, optimizer, range(1))
    first, last = (weight.detach().clone() for weight in (model[0].weight, model[2].weight))

    def step():
        optimizer.zero_grad()
        mse_loss(model(sample(32, 16)), sample(32, 4)).backward()
        model[0].weight.grad[3, 5] = wrong
        optimizer.step()

    with pytest.warns(RuntimeWarning, match=r"update of '0\.weight' is not finite.*taken back"):
        step()
    assert torch.equal(model[0].weight, first)
    step()
    assert torch.equal(model[0].weight, first)
    assert not torch.equal(model[2].weight, last) and model[2].weight.isfinite().all()
    train(model, optimizer, range(1, 2))
    assert not torch.equal(model[0].weight, first)
    assert model[0].weight.norm().item() == pytest.approx(constraint.norms["0.weight"], rel=1e-6)


@pytest.mark.parametrize("project", [True, False])
def test_networks_whose_weights_share_names_train_as_each_does_alone(project):
    def pair():
        models = network(fogzo.quest(2)), network(fogzo.quest(2))
        with torch.no_grad():
            models[1][0].weight.mul_(-2)
        params = [*models[0].parameters(), *models[1].parameters()]
        optimizer = torch.optim.AdamW(params, lr=0.05, weight_decay=0.0)
        records = [weight for model in models for weight in fogzo.quantized_weights(model)]
        return models, optimizer, cewt(records, optimizer, project=project)

    models, optimizer, constraint = pair()
    for seed in range(2):
        optimizer.zero_grad()
        x = sample(32, 16, seed=seed)
        for model in models:
            mse_loss(model(x), x[:, :4]).backward()
        optimizer.step()
    for index, model in enumerate(models):
        alone = pair()[0][index]
        own = adamw(alone)
        cewt(alone, own, project=project)
        train(alone, own, range(2))
        assert all(map(torch.equal, model.parameters(), alone.parameters()))
    assert list(constraint.norms) == ["0.weight", "2.weight", "0.weight (2)", "2.weight (2)"]
    assert len(set(constraint.norms.values())) == 3  # the last layers began alike
    again = pair()[2]
    again.norms = dict.fromkeys(again.norms, 0.0)
    again.load_state_dict(constraint.state_dict())
    assert again.norms == constraint.norms


def test_norms_are_loaded_by_name_in_whichever_order():
    model = network()
    constraint = cewt(model, adamw(model))
    norms = {"2.weight": 2, "0.weight": 1}
    constraint.load_state_dict({"norms": norms})
    assert list(constraint.norms.items()) == [("0.weight", 1.0), ("2.weight", 2.0)]


def test_a_gradient_scaler_that_skips_a_step_skips_the_constraint():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cewt(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = model[0].weight.detach().clone()
    scaler.scale(mse_loss(model(sample(8, 16)), sample(8, 4))).backward()
    model[0].weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model[0].weight, before)


def test_removed_it_leaves_the_optimizer_alone():
    model, plain = network(), network()
    optimizer = adamw(model)
    cewt(model, optimizer).remove()
    train(model, optimizer, range(3))
    train(plain, adamw(plain), range(3))
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_a_resumed_run_is_the_same_bit_for_bit():
    model = network()
    optimizer = adamw(model)
    constraint = cewt(model, optimizer)
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), constraint.state_dict()))
    train(model, optimizer, range(3, 6))
    again = network(fogzo.fixed(2))
    with torch.no_grad():
        again[0].weight.mul_(3)
    other = adamw(again)
    resumed = cewt(again, other)
    for part, state in zip((again, other, resumed), saved, strict=True):
        part.load_state_dict(state)
    train(again, other, range(3, 6))
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_a_weight_that_was_frozen_is_listed_anew_before_it_trains():
    model = network()
    model[0].requires_grad_(False)
    optimizer = adamw(model)
    constraint = cewt(model, optimizer)
    train(model, optimizer, range(2))
    model[0].requires_grad_(True)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match=r"'0\.weight' was frozen.*constraint\.remove\(\)"):
        train(model, optimizer, [2])
    assert all(map(torch.equal, before, model.parameters()))
    constraint.remove()  # as the message says
    constraint = cewt(model, optimizer)
    train(model, optimizer, [2])
    norm = torch.linalg.vector_norm(model[0].weight.detach()).item()
    assert norm == pytest.approx(constraint.norms["0.weight"])
    assert not torch.equal(before[0], model[0].weight)


def test_impossible_calls_are_refused():
    model = network()
    with pytest.raises(ValueError, match="optimizer must be of type Optimizer, got None"):
        cewt(model, None)
    with pytest.raises(ValueError, match=r"weight decay of 0\.01.*\"weight_decay\": 0\.0"):
        cewt(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"'2\.weight' is in no group of the optimizer"):
        cewt(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"expected the norms of 0\.weight, 2\.weight"):
        cewt(model, adamw(model)).load_state_dict({"norms": {"0.weight": 1.0}})
    constraint = cewt(model, adamw(model))
    norms = dict(constraint.norms)
    for norm in (math.nan, math.inf, 0.0, None):
        with pytest.raises(ValueError, match=r"norm of '2\.weight' must be a positive, finite"):
            constraint.load_state_dict({"norms": norms | {"2.weight": norm}})
    assert constraint.norms == norms
    padded = nn.Sequential(nn.Embedding(4, 8, padding_idx=0), nn.Linear(8, 2))
    fogzo.quantize_(padded, fogzo.ternary(), EVERYTHING)
    with pytest.raises(ValueError, match="must not move"):
        cewt(padded, adamw(padded))
