"""The projection onto the range: what it clamps, what it leaves alone, and where it is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fogzo
from fogzo.methods import project_, quantize_from
from fogzo.quantizers import Grid, Hadamard, Quantizer, fixed_scale, uniform
from toolbox import draw, everything

FIXED = {
    "half": fogzo.fixed(2, step_size=0.3),
    "integer": fogzo.fixed(3, step_size=0.1),
    "per channel": fogzo.fixed(2, granularity="channel"),
    "per group": fogzo.fixed(2, granularity=4),
    "rotated": Quantizer(uniform(2, "half"), fixed_scale(0.3), rotation=Hadamard(8)),
}


def layer(quantizer, dtype=torch.float32, seed=0):
    made = nn.Linear(16, 8).to(dtype)
    with torch.no_grad():
        made.weight.copy_(draw(8, 16, seed=seed))
    return fogzo.quantize_(made, quantizer, everything)


@pytest.mark.parametrize("name", FIXED)
def test_weights_are_clamped_where_they_are_rounded(name):
    made = layer(FIXED[name])
    (weight,) = fogzo.quantized_weights(made)
    codes, before = made.codes(), made.weight.detach().clone()
    rotate = weight.rotate or (lambda tensor: tensor)
    x = rotate(before) / weight.step_size()
    assert ((x < weight.grid.low) | (x > weight.grid.high)).any()
    project_(made)
    expected = x.clamp(weight.grid.low, weight.grid.high) * weight.step_size()
    room = 1e-6 if weight.rotate is None else 3e-4
    torch.testing.assert_close(rotate(made.weight.detach()), expected, rtol=room, atol=1e-6)
    assert torch.equal(made.codes(), codes) and made.weight.requires_grad
    once = made.weight.detach().clone()
    project_([weight])
    torch.testing.assert_close(made.weight.detach(), once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_no_mask_holds_a_weight_at_the_end_of_the_range(dtype):
    for seed, step in enumerate([0.0713, 0.21, 0.3331]):
        made = layer(fogzo.fixed(2, step_size=step), dtype, seed)
        project_(made)
        made.quantized_weight().sum().backward()
        assert (made.weight.grad == 1).all()


def test_no_mask_holds_a_weight_that_was_rotated_back():
    masked = Quantizer(uniform(2, "half"), fixed_scale(0.3), rotation=Hadamard(128))
    made = nn.Linear(128, 64)
    with torch.no_grad():
        made.weight.copy_(draw(64, 128))
    fogzo.quantize_(made, masked, everything)
    project_(made)
    assert fogzo.inspect(made).layers[0].masked == 0
    once = made.weight.detach().clone()
    project_(made)
    assert torch.equal(made.weight, once)


@pytest.mark.parametrize("grid", [uniform(1, "integer"), uniform(2), uniform(3)])
@pytest.mark.parametrize("dtype, left", [(torch.float32, 0), (torch.bfloat16, 2e-3)])
def test_rotated_weights_stop_short_of_the_ends_by_what_their_dtype_rounds(grid, dtype, left):
    made = nn.Linear(64, 64).to(dtype)
    with torch.no_grad():
        made.weight.copy_(draw(64, 64) / 5)
    masked = Quantizer(grid, fixed_scale(0.1), rotation=Hadamard(64))
    fogzo.quantize_(made, masked, everything)
    codes, before = made.codes(), fogzo.inspect(made).layers[0].masked
    project_(made)
    assert fogzo.inspect(made).layers[0].masked <= left < before
    assert (made.codes() != codes).double().mean() <= 5 * left


def test_what_is_frozen_or_held_stays():
    model = nn.Sequential(nn.Embedding(6, 8, padding_idx=2), nn.Linear(8, 4))
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            param.copy_(3 * draw(*param.shape, seed=index))
    fogzo.quantize_(model, fogzo.fixed(2, step_size=0.1), everything)
    model[1].weight.requires_grad_(False)
    before = [model[i].weight.detach().clone() for i in (0, 1)]
    project_(model)
    stays = (model[0].weight == before[0]).all(1)
    assert stays.tolist() == [False, False, True, False, False, False]
    assert torch.equal(model[1].weight, before[1])


REFUSED = [fogzo.lsq(2), fogzo.quest(2), fogzo.ternary(), fogzo.sign()]


@pytest.mark.parametrize("quantizer", REFUSED, ids=lambda q: f"{q.grid.name}, {q.scale.kind}")
def test_a_range_that_moves_is_refused_and_nothing_is_changed(quantizer):
    model = nn.Sequential(layer(fogzo.fixed(2, step_size=0.1)), layer(quantizer))
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"the range of '1\.weight' moves .*identity_unmasked"):
        project_(model)
    assert torch.equal(model[0].weight, before)


def test_levels_must_be_known():
    param = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="levels of 'w' are not known"):
        project_([("w", param, 0.1)])
    record = fogzo.QuantizedWeight("w", param, lambda: torch.tensor(0.5), grid=Grid("own", -1, 1))
    project_([record])
    assert (param == 0.5).all()
    with pytest.raises(ValueError, match="moves with its step size"):
        project_([replace(record, has_constant_step_size=False)])


def test_weights_in_a_float_phase_stay():
    made = layer(fogzo.fixed(2, step_size=0.1))
    switch, before = quantize_from(made, 1.0, total_steps=1), made.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match=r"'weight' are still in float"):
        project_(made)
    assert torch.equal(made.weight, before)
    switch.advance_()
    project_(made)
    assert not torch.equal(made.weight, before)


def test_a_masked_weight_that_is_brought_back_trains_again():
    weights = []
    for projects in (False, True):
        made = layer(fogzo.fixed(2, step_size=0.1, surrogate="identity"))
        optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            (made(draw(4, 16, seed=step)) - 1).square().mean().backward()
            optimizer.step()
            if projects:
                project_(made)
        weights.append(made.weight.grad.ne(0).float().mean().item())
    assert weights[0] < 0.2 and weights[1] == 1
