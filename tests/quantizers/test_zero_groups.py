"""Groups of zeros, or of next to nothing, get a step size that they can be trained with."""

import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fogzo
from toolbox import everything, pairwise

KEPT = {
    "fixed": lambda **options: fogzo.fixed(2, **options),
    "fixed, rms": lambda **options: fogzo.fixed(2, init="rms", **options),
    "fixed, max": lambda **options: fogzo.fixed(4, init="max", **options),
    "lsq": lambda **options: fogzo.lsq(2, **options),
    "lsq, 8 bits": lambda **options: fogzo.lsq(8, **options),
}
DYNAMIC = {
    "quest": lambda **options: fogzo.quest(2, **options),
    "ternary": lambda **options: fogzo.ternary(**options),
    "sign": lambda **options: fogzo.sign(**options),
    "abs_max": lambda **options: fogzo.abs_max(4, **options),
}


def _layer(rows, factor=0.0, inputs=16, outputs=8, dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight[rows] *= factor
    return layer.to(dtype)


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("factor", [0.0, 1e-40, 1e-20, 1e-6])
def test_such_a_group_gets_the_median_step_of_the_others(kind, factor):
    quantizer = KEPT[kind](granularity="channel")
    layer = _layer([1, 5], factor)
    own = quantizer.initial_step_size(_layer([]).weight)
    with pytest.warns(UserWarning, match=r"'' \(2 of 8 groups\)"):
        fogzo.quantize_(layer, quantizer, everything)
    others = [0, 2, 3, 4, 6, 7]
    assert torch.equal(layer.weight_step[others], own[others])
    assert (layer.weight_step[[1, 5]] == own[others].median()).all()


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_so_it_does_in_half_precision(kind, dtype):
    layer = _layer([1], 1e-6, dtype=dtype)
    with pytest.warns(UserWarning, match="1 of 8 groups"):
        fogzo.quantize_(layer, KEPT[kind](granularity="channel"), everything)
    assert layer.weight_step.dtype == dtype
    assert layer.weight_step.max() < 4 * layer.weight_step.min()


@pytest.mark.parametrize("kind", KEPT)
def test_groups_of_inputs_are_counted_as_groups(kind):
    layer = _layer([])
    with torch.no_grad():
        layer.weight[2, 8:] = 0
    with pytest.warns(UserWarning, match="1 of 16 groups"):
        fogzo.quantize_(layer, KEPT[kind](granularity=8), everything)
    assert layer.weight_step.min() > 1e-3


@pairwise(kind=KEPT, granularity=["tensor", "channel", 8], factor=[0.0, 1e-12])
def test_a_layer_of_zeros_gets_the_steps_of_a_new_layer(kind, granularity, factor):
    quantizer = KEPT[kind](granularity=granularity)
    layer = _layer(slice(None), factor, inputs=64, outputs=64)
    with pytest.warns(UserWarning, match="zero, or next to nothing"):
        fogzo.quantize_(layer, quantizer, everything)
    torch.manual_seed(1)
    usual = quantizer.initial_step_size(nn.Linear(64, 64).weight)
    assert layer.weight_step.mean().item() == pytest.approx(usual.mean().item(), rel=0.2)


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("factor", [1e-3, 0.1, 1e3])
def test_a_group_that_is_only_small_keeps_its_own_step(kind, factor):
    quantizer = KEPT[kind](granularity="channel")
    layer = _layer([1], factor)
    expected = quantizer.initial_step_size(_layer([]).weight)[1] * factor
    fogzo.quantize_(layer, quantizer, everything)  # without a warning, which would be an error
    torch.testing.assert_close(layer.weight_step[1], expected, rtol=1e-3, atol=0)


def test_a_small_layer_as_a_whole_keeps_its_steps():
    layer = _layer(slice(None), 1e-6)
    fogzo.quantize_(layer, fogzo.lsq(2, granularity="channel"), everything)
    assert layer.weight_step.max() < 1e-6


def test_a_step_that_was_given_is_kept():
    layer = _layer(slice(None))
    fogzo.quantize_(layer, fogzo.fixed(2, step_size=0.25), everything)
    assert layer.weight_step.item() == 0.25


@pytest.mark.parametrize("kind", DYNAMIC)
def test_what_is_measured_in_every_forward_needs_no_warning(kind):
    layer = _layer([1])
    fogzo.quantize_(layer, DYNAMIC[kind](), everything)
    assert layer.quantized_weight().isfinite().all()


def test_one_warning_names_all_layers_and_the_way_out():
    model = nn.ModuleDict({name: _layer([0]) for name in ("up", "down")})
    model["whole"] = _layer(slice(None))
    with pytest.warns(UserWarning) as caught:
        fogzo.quantize_(model, fogzo.lsq(2, granularity="channel"), everything)
    (warning,) = caught
    text = str(warning.message)
    assert "'up' (1 of 8 groups), 'down' (1 of 8 groups), 'whole' (8 of 8 groups)" in text
    assert "filter_fn" in text and 'levels="integer"' in text
    assert warning.filename == __file__


def test_zeros_stay_zero_where_the_grid_has_a_zero():
    layer = _layer([3])
    with pytest.warns(UserWarning, match="stay zero on the grid uniform2-integer"):
        fogzo.quantize_(layer, fogzo.lsq(2, levels="integer", granularity="channel"), everything)
    assert not layer.quantized_weight()[3].any()


@pytest.mark.parametrize(
    "quantizer",
    [fogzo.fixed(2), fogzo.bbq(2, granularity="tensor"), fogzo.sign(granularity="tensor")],
)
def test_padding_that_does_not_stay_zero_is_named_once(quantizer):
    model = nn.Sequential(nn.Embedding(10, 16, padding_idx=0), nn.Linear(16, 4))
    with pytest.warns(UserWarning, match=r"padding row of '0' is zero.*levels=\"integer\"") as said:
        fogzo.quantize_(model, quantizer, everything)
    assert len(said) == 1 and said[0].filename == __file__
    assert model[0](torch.tensor([0])).abs().mean() > 0.1


def test_padding_is_not_named_again_among_groups_of_zeros():
    with pytest.warns(UserWarning, match="do not stay zero") as said:
        quantizer = fogzo.lsq(2, granularity="channel")
        fogzo.quantize_(nn.Embedding(10, 16, padding_idx=0), quantizer, everything)
    assert len(said) == 1


@pytest.mark.parametrize(
    "quantizer", [fogzo.lsq(2, levels="integer"), fogzo.ternary(), fogzo.quest(2)]
)
def test_padding_that_stays_zero_needs_no_warning(quantizer):
    layer = nn.Embedding(10, 16, padding_idx=0)
    fogzo.quantize_(layer, quantizer, everything)  # without a warning, which would be an error
    assert layer(torch.tensor([0])).abs().max() < 1e-7


def test_a_float_checkpoint_with_zeros_gets_usable_steps_too():
    model = nn.Sequential(_layer([]))
    fogzo.quantize_(model, fogzo.lsq(2, granularity="channel"), everything)
    with pytest.warns(UserWarning, match=re.escape("'0' (1 of 8 groups)")):
        model.load_state_dict(nn.Sequential(_layer([4])).state_dict())
    assert model[0].weight_step.min() > 1e-3


def test_an_input_of_next_to_nothing_measures_nothing(caplog):
    model = nn.Sequential(_layer([]))
    fogzo.quantize_(model, fogzo.lsq(2), everything, activations=fogzo.lsq(2))
    with torch.no_grad(), fogzo.calibrate_(model):
        model(torch.full((4, 16), 1e-20))
    assert "saw no input" in caplog.text
    assert model[0].input_state.item() == 0


# Training


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.middle(h)))


def _losses(quantizer, optimizer, zeros):
    torch.manual_seed(0)
    model, teacher = Net(), Net()
    if zeros:
        with torch.no_grad():
            model.first.weight[:3] = 0
            model.middle.weight.zero_()
            model.last.weight[1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fogzo.quantize_(model, quantizer, everything)
    x = torch.randn(128, 16)
    y = teacher(x).argmax(1)
    if optimizer == "sgd":
        trained = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    else:
        trained = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = cross_entropy(model(x), y)
        trained.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trained.step()
        losses.append(loss.item())
    return losses


@pairwise(
    kind=["fixed", "lsq", *DYNAMIC],
    granularity=["tensor", "channel", 8],
    optimizer=["sgd", "adamw"],
)
def test_a_network_with_zeros_trains_as_one_without(kind, granularity, optimizer):
    quantizer = (KEPT | DYNAMIC)[kind](granularity=granularity)
    without, losses = (_losses(quantizer, optimizer, zeros) for zeros in (False, True))
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < 1.2 * sum(without[-5:]) + 0.25
