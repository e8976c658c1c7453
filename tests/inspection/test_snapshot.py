"""One look: its numbers in closed form, for every quantizer, and with nothing changed."""

import json
import math
import re
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import fogzo
from fogzo.inspection import Inspection, diagnose
from toolbox import EVERY_PRESET, Snapshot, backward, batch, draw, everything, fill, quantized_net


def layer_of(weight, quantizer, **options):
    """The inspection of one layer with this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    model = fogzo.quantize_(nn.Sequential(layer), quantizer, everything)
    return fogzo.inspect(model, **options).layers[0]


def test_masks_and_levels_are_counted_exactly():
    # in steps of 1: levels -1.5 .. 1.5, of which the end ones mask beyond them
    weight = torch.tensor([[-3.0, -1.2, -0.2, 0.2], [0.7, 1.2, 1.4, 2.0]])
    found = layer_of(weight, fogzo.fixed(2, step_size=1.0, surrogate="identity"))
    assert (found.masked, found.weights, found.levels) == (2 / 8, 8, 4)
    shares = [2 / 8, 1 / 8, 2 / 8, 3 / 8]
    assert found.levels_used == pytest.approx(math.prod(p**-p for p in shares))
    assert found.stuck == found.masked  # a fixed step brings none of them back
    assert layer_of(weight, fogzo.fixed(2, step_size=1.0)).masked == 0


def test_an_even_spread_has_a_tenth_of_its_weights_near_thresholds():
    even = torch.linspace(-1.5, 1.5, 3001).reshape(1, -1)
    found = layer_of(even, fogzo.fixed(2, step_size=1.0))
    assert found.near_thresholds == pytest.approx(0.1, abs=0.002)
    on_levels = torch.tensor([[-1.5, -0.5, 0.5, 1.5]])
    assert layer_of(on_levels, fogzo.fixed(2, step_size=1.0)).near_thresholds == 0


def test_codes_of_equal_frequency_use_all_levels():
    weight = draw(64, 256, seed=3)
    found = layer_of(weight, fogzo.bbq(2))
    assert found.levels_used == pytest.approx(4, abs=0.02)
    assert found.bits_used == pytest.approx(1, abs=0.01)
    quest = layer_of(weight, fogzo.quest(2))
    assert math.log2(quest.levels_used) == pytest.approx(1.9037, abs=0.01)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 16])
def test_a_kept_step_size_is_held_against_what_would_be_measured_now(bits, granularity):
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    quantizer = fogzo.fixed(bits, granularity=granularity)
    fogzo.quantize_(model, quantizer, everything)
    found = fogzo.inspect(model)
    assert [layer.outgrown for layer in found.layers] == pytest.approx([1, 1], rel=0.08)
    with torch.no_grad():
        model[1].weight.mul_(3)
    found = fogzo.inspect(model)
    assert [layer.outgrown for layer in found.layers] == pytest.approx([1, 3], rel=0.08)
    (finding,) = found.findings
    assert (finding.kind, finding.severity) == ("outgrown", "high")
    assert [name for name, _ in finding.layers] == ["1"]
    assert re.search(r"larger, [23][.\d]* times in '1'", finding.message)
    assert "quantize_from" in finding.code
    assert "--quantize-from 0.5" in finding.options
    fogzo.measure_step_sizes_(model)
    assert fogzo.inspect(model).findings == []


def test_weights_that_have_diverged_have_outgrown_their_step_sizes_by_a_finite_number():
    for dtype, size in ((torch.float32, 1e30), (torch.float64, 1e200)):
        model = fogzo.quantize_(
            nn.Sequential(nn.Linear(8, 8).to(dtype)), fogzo.fixed(2), everything
        )
        with torch.no_grad():
            model[0].weight.mul_(size)
        (layer,) = fogzo.inspect(model).layers
        assert layer.outgrown == pytest.approx(size, rel=0.08)


def test_a_channel_that_ran_away_is_not_taken_for_all():
    model = nn.Sequential(nn.Linear(64, 64))
    fogzo.quantize_(model, fogzo.fixed(4, granularity="channel"), everything)
    with torch.no_grad():
        model[0].weight[0] *= 10
    assert fogzo.inspect(model).layers[0].outgrown == pytest.approx(1 + 9 / 64, rel=0.01)


@pytest.mark.filterwarnings("ignore:no step size can be measured")
def test_channels_of_zeros_hide_no_others():
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[::2] = 0
    fogzo.quantize_(model, fogzo.fixed(2, granularity="channel"), everything)
    for size, expected in ((1, 1), (3, 3), (0, 0)):
        with torch.no_grad():
            model[0].weight.mul_(size)
        assert fogzo.inspect(model).layers[0].outgrown == pytest.approx(expected, rel=0.01)


def test_a_step_size_that_was_given_is_not_said_to_be_measured_later():
    model = fogzo.quantize_(
        nn.Sequential(nn.Linear(8, 8)), fogzo.fixed(2, step_size=1e-3), everything
    )
    code = next(f.code for f in fogzo.inspect(model).findings if f.kind == "outgrown")
    assert "quantize_from" in code and "unless a step_size was given" in code
    switch = fogzo.methods.quantize_from(model, 0.5, total_steps=2)
    switch.advance_()
    assert switch.is_quantized and model[0].step_size().unique().item() == pytest.approx(1e-3)


def test_step_sizes_that_follow_the_weights_are_outgrown_by_none():
    for quantizer in (fogzo.lsq(2), fogzo.quest(2), fogzo.bbq(2)):
        assert layer_of(draw(8, 8), quantizer).outgrown is None


def test_steps_are_held_against_float16():
    fine = layer_of(draw(4, 4), fogzo.fixed(2, step_size=0.05))
    assert fine.fp16_error < 2**-11
    tiny = layer_of(draw(4, 4), fogzo.fixed(2, step_size=2e-7))  # subnormal: few bits are left
    assert tiny.fp16_error > 0.05
    assert layer_of(draw(4, 4), fogzo.fixed(2, step_size=2e5)).fp16_error == 1  # infinite
    (finding,) = [
        finding
        for finding in _inspect(fogzo.fixed(2, step_size=2e-7)).findings
        if finding.kind == "fp16"
    ]
    assert 'fogzo.export.export(model, folder, "packed")' in finding.code
    assert finding.options is None


def test_what_no_filter_can_choose_is_not_advised_to_be_chosen():
    layer = nn.TransformerEncoderLayer(32, 4, 8)
    with pytest.warns(UserWarning, match="uses its weights itself"):
        model = fogzo.quantize_(layer, fogzo.lsq(2), everything)
    (finding,) = [f for f in fogzo.inspect(model).findings if f.kind == "in_float"]
    assert "filter_fn" not in finding.code and finding.options is None
    assert "an nn.Linear for each projection" in finding.code


def test_the_step_sizes_of_bbq_are_those_of_its_levels():
    model = fogzo.quantize_(fill(nn.Linear(8, 4)), fogzo.bbq(2), everything)
    model.load_state_dict({"weight_step": torch.full((4, 1), 3e-7)}, strict=False)
    found = fogzo.inspect(model)
    assert found.layers[0].step_size == pytest.approx(3e-7)
    assert "fp16" in [finding.kind for finding in found.findings]


def _inspect(quantizer):
    return fogzo.inspect(fogzo.quantize_(fill(nn.Linear(4, 4)), quantizer, everything))


def test_channels_without_gradient_or_weights_are_dead():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    fill(model)
    with torch.no_grad():
        model[0].bias[2] = -100.0  # its ReLU never fires
        model[2].weight[1] = 0
    with pytest.warns(UserWarning, match="no step size can be measured"):
        fogzo.quantize_(model, fogzo.lsq(2, granularity="channel"), everything)
    before = fogzo.inspect(model)
    assert [layer.dead for layer in before.layers] == [0, 1 / 4]
    backward(lambda: mse_loss(model(draw(64, 8)), draw(64, 4)))
    after = fogzo.inspect(model)
    assert after.layers[0].dead >= 1 / 8
    assert after.layers[1].dead == 1 / 4
    assert [finding.kind for finding in after.findings] == ["dead"]


def test_gradients_set_to_zero_make_no_channel_dead():
    model = fogzo.quantize_(fill(nn.Linear(8, 8)), fogzo.lsq(2), everything)
    backward(lambda: model(draw(4, 8))[:, 1:].sum())
    assert fogzo.inspect(model).layers[0].dead == 1 / 8
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad(set_to_none=False)
    assert fogzo.inspect(model).layers[0].dead == 0


def test_a_channel_that_is_masked_as_a_whole_is_not_dead():
    quantizer = fogzo.fixed(2, step_size=1e-3, surrogate="identity")
    model = fogzo.quantize_(fill(nn.Linear(8, 4)), quantizer, everything)
    backward(lambda: model(draw(4, 8)).sum())
    (layer,) = fogzo.inspect(model).layers
    assert (layer.masked > 0.9, layer.dead) == (True, 0)


@pytest.mark.parametrize("quantizer", [fogzo.quest(2), fogzo.ternary(granularity=4)])
def test_the_padding_of_an_embedding_is_no_illness(quantizer):
    model = nn.Sequential(nn.Embedding(64, 16, padding_idx=0), nn.Linear(16, 4))
    fogzo.quantize_(model, quantizer, lambda module, name: name == "0")
    found = fogzo.inspect(model)
    assert not found.findings and found.layers[0].empty == found.layers[0].dead == 0
    with torch.no_grad():
        model[0].weight[1] = 0.0
    assert [finding.kind for finding in fogzo.inspect(model).findings] == ["dead"]


@EVERY_PRESET
def test_every_quantizer_is_inspected_and_all_that_is_borrowed_comes_back(preset):
    model = quantized_net(preset)
    x, y = batch()
    backward(lambda: mse_loss(model(x), y))
    for module in (model.before, model.dropout):
        module.p = 0.0
    before = Snapshot(model)
    found = fogzo.inspect(
        model,
        forward=lambda: model(x),
        closure=lambda: mse_loss(model(x), y),
        num_samples=2,
    )
    before.assert_same()
    assert [layer.name for layer in found.layers] == ["first", "second"]
    assert found.in_float[0].name == "head.weight"
    for layer, module in zip(found.layers, (model.first, model.second), strict=True):
        assert len(module.codes().unique()) <= layer.levels
        assert 1 <= layer.levels_used <= layer.levels + 1e-9
        assert layer.clipped is None
    text = json.dumps(found.as_dict())
    assert json.dumps(Inspection.from_dict(json.loads(text)).as_dict()) == text
    assert "first" in str(found) and "masked" in str(found)


def test_it_gives_back_what_a_forward_or_closure_that_raises_had_borrowed():
    model = fogzo.quantize_(
        fill(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))),
        fogzo.lsq(2),
        activations=fogzo.lsq(4),
    )
    x = draw(16, 8)
    with fogzo.calibrate_(model):
        model(x)
    backward(lambda: model(x).sum())
    before = Snapshot(model)

    def fails():
        model(x)
        torch.rand(3)
        raise OSError("gone")

    for options in ({"forward": fails}, {"closure": fails}):
        with pytest.raises(OSError, match="gone"):
            fogzo.inspect(model, **options)
        before.assert_same()


@pytest.mark.parametrize("kind", ["lsq", "quest", "abs_max"])
def test_inputs_beyond_the_last_level_are_counted(kind):
    makes = {"lsq": fogzo.lsq(2), "quest": fogzo.quest(2), "abs_max": fogzo.abs_max(4)}
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    fogzo.quantize_(fill(model), fogzo.lsq(2), activations=makes[kind])
    x = draw(512, 16)
    assert fogzo.inspect(model).layers[0].clipped is None
    if kind == "lsq":
        with fogzo.calibrate_(model):
            model(x)
    found = fogzo.inspect(model, forward=lambda: model(x)).layers[0].clipped
    # 2 mean|x| / sqrt(1.5) steps, levels up to 1.5 and half a step more; QuEST's edge likewise.
    edges = {"lsq": 2 * 2 * math.sqrt(2 / math.pi) / math.sqrt(1.5), "quest": 1.4935346 * 4 / 3}
    expected = math.erfc(edges[kind] / math.sqrt(2)) if kind in edges else 0
    assert found == pytest.approx(expected, abs=0.01)
    far = fogzo.inspect(model, forward=lambda: model(100 * x))
    kinds = [finding.kind for finding in far.findings]
    assert ("clipped" in kinds) == (kind == "lsq")  # the others measure each input


def test_convolutions_embeddings_and_tied_layers_are_inspected_once():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3),
            "up": nn.ConvTranspose1d(4, 2, 3),
            "embed": nn.Embedding(10, 8),
            "out": nn.Linear(8, 10, bias=False),
        }
    )
    model["out"].weight = model["embed"].weight
    fogzo.quantize_(fill(model), fogzo.lsq(2), everything)
    found = fogzo.inspect(model)
    assert [layer.name for layer in found.layers] == ["conv", "up", "embed"]
    assert [layer.weights for layer in found.layers] == [108, 24, 80]
    backward(lambda: model["out"](model["embed"](torch.tensor([1, 2]))).sum())
    assert fogzo.inspect(model).layers[2].dead == 0  # tokens that a batch lacks are not


@pytest.mark.parametrize("number", [0, 2])
def test_clipped_inputs_of_any_tied_layer_are_found(number):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    fogzo.quantize_(fill(model), fogzo.lsq(2), everything, activations=fogzo.lsq(2))
    x = draw(64, 16)
    with fogzo.calibrate_(model):
        model(x)
    state = {"input_step": model[number].input_step / 50}
    model[number].load_state_dict(state, strict=False)
    found = fogzo.inspect(model, forward=lambda: model(x))
    assert [layer.clipped > 0.25 for layer in found.layers] == [True]
    assert [finding.kind for finding in found.findings] == ["clipped"]


def test_a_compiled_model_is_looked_at_uncompiled():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    fogzo.quantize_(fill(model), fogzo.lsq(2), everything, activations=fogzo.lsq(2))
    x = draw(32, 8)
    with fogzo.calibrate_(model):
        model(x)
    plain = fogzo.inspect(model, forward=lambda: model(x))
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert fogzo.inspect(compiled, forward=lambda: compiled(x)).layers[1].clipped == (
        plain.layers[1].clipped
    )


def test_the_agreement_of_a_linear_loss_is_one_and_fogzo_cannot_help():
    model = fogzo.quantize_(
        fill(nn.Linear(64, 64, bias=False), std=0.05),
        fogzo.fixed(2, step_size=0.1, surrogate="identity_unmasked"),
        everything,
    ).double()
    x, y = draw(256, 64).double(), draw(256, 64, seed=9).double()

    def loss():
        return (model(x) * y).mean()

    backward(loss)
    found = fogzo.inspect(model, closure=loss, num_samples=96)
    (layer,) = found.layers
    assert abs(layer.agreement - 1) < 3 * layer.agreement_error < 0.3
    notes = [finding for finding in found.findings if finding.kind == "agreement"]
    assert "FOGZO cannot help here: agreement" in notes[0].message
    assert "nothing masked" in notes[0].message
    model.weight.grad *= 2**16
    with pytest.raises(ValueError, match=r"scaler.unscale_\(optimizer\); fogzo.inspect"):
        fogzo.inspect(model, closure=loss, num_samples=96)
    # An error as of a step size of 1e18 says nothing, and ends in no division by zero.
    vague = replace(found, layers=[replace(layer, agreement_error=1e200)])
    assert "agreement" not in [finding.kind for finding in diagnose([vague])]


def test_a_closure_that_does_not_use_the_weights_is_refused():
    model = quantized_net(dropout=0.0)
    x, y = batch()
    loss = backward(lambda: mse_loss(model(x), y))
    with pytest.raises(ValueError, match="does not depend on the quantized weights"):
        fogzo.inspect(model, closure=loss.detach)


@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.bfloat16, 2**-7), (torch.float32, 3e-8)], ids=["an ulp", "near 0"]
)
def test_the_rounding_of_a_loss_is_no_other_loss(dtype, offset):
    model, (x, y) = quantized_net(dropout=0.0), batch()
    base = backward(lambda: mse_loss(model(x), y)).detach()
    calls = []

    def loss():
        calls.append(0)
        value = mse_loss(model(x), y)
        value = value - base if dtype is torch.float32 else value / base
        return (value + offset * (len(calls) % 2)).to(dtype)

    fogzo.inspect(model, closure=loss, num_samples=2)
    assert len(calls) > 2


@pytest.mark.parametrize("samples", [8, 256])
def test_more_samples_than_a_small_layer_has_weights_for_change_no_agreement(samples):
    agreements = []
    for seed in range(12):
        quantizer = fogzo.fixed(8, step_size=0.004)
        model = fogzo.quantize_(
            fill(nn.Linear(16, 16, bias=False), seed=seed), quantizer, everything
        )
        model.double()
        x, y = draw(64, 16, seed=seed).double(), draw(64, 16, seed=seed + 99).double()

        def loss(model=model, x=x, y=y):
            return (model(x) * y).mean()

        backward(loss)
        agreements += [
            layer.agreement
            for layer in fogzo.inspect(model, closure=loss, num_samples=samples).layers
        ]
    error = statistics.stdev(agreements) / 12**0.5
    assert abs(statistics.fmean(agreements) - 1) < 3 * error < 0.3


def test_2_bit_inputs_raise_no_false_alarm():
    layers = [module for _ in range(4) for module in (nn.Linear(32, 32), nn.Tanh())]
    model = fogzo.quantize_(
        fill(nn.Sequential(*layers)), fogzo.quest(2), everything, activations=fogzo.quest(2)
    )
    distances = []
    for seed in range(12):  # probes cross thresholds of inputs, too, by more than of weights
        x, y = draw(64, 32, seed=2 * seed), draw(64, 32, seed=2 * seed + 1).argmax(1)

        def loss(x=x, y=y):
            return cross_entropy(model(x), y)

        model.zero_grad()
        backward(loss)
        found = fogzo.inspect(model, closure=loss)
        assert "agreement" not in [finding.kind for finding in found.findings]
        distances += [(each.agreement - 1) / each.agreement_error for each in found.layers]
    assert len(distances) == 48
    assert sum(abs(distance) > 3 for distance in distances) <= 1
    assert 0.5 < statistics.pstdev(distances, 0) < 1.5


def test_a_closure_that_returns_another_loss_each_time_is_refused():
    model = quantized_net()
    batches = iter([draw(4, 8, seed=seed) for seed in range(3)])

    def loss():
        return model(next(batches)).square().mean()

    backward(loss)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"and then .* for the same weights.*made outside of it"):
        fogzo.inspect(model, closure=loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_inspected_is_refused_with_the_way_out():
    model = quantized_net()
    with pytest.raises(ValueError, match="nothing in this model is quantized: first call"):
        fogzo.inspect(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, got list: fogzo\.inspect"):
        fogzo.inspect([model])
    with pytest.raises(ValueError, match="Call it between backward and zero_grad"):
        fogzo.inspect(model, closure=lambda: 0.0)
    with pytest.raises(ValueError, match="meta device, offloaded"):
        fogzo.inspect(quantized_net().to("meta"))


def test_what_is_no_inspection_is_refused():
    good = fogzo.inspect(quantized_net()).as_dict()
    for bad, says in [
        ([], "expected an object"),
        ({}, "layers is missing"),
        (good | {"more": 1}, "more is unknown"),
        (good | {"layers": 3}, "layers of Inspection is 3"),
        (good | {"layers": [good["layers"][0] | {"masked": "all"}]}, "masked of LayerInspection"),
    ]:
        with pytest.raises(ValueError, match=says):
            Inspection.from_dict(bad)


def test_what_stays_in_float_is_listed_and_reported_if_it_is_most():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4), nn.Linear(4, 4))
    fogzo.quantize_(model, fogzo.lsq(2), lambda module, name: name == "1")
    found = fogzo.inspect(model)
    assert [item.name for item in found.in_float] == ["0.weight", "2.weight"]
    (finding,) = found.findings
    assert finding.kind == "in_float"
    assert "94% of the matrix weights outside embeddings and heads stay in float" in (
        finding.message
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@EVERY_PRESET
def test_weights_that_are_not_finite_come_first(preset, value):
    model = quantized_net(preset)
    with torch.no_grad():
        model.first.weight[0, 0] = value
    found = fogzo.inspect(model)
    (first,) = found.findings
    assert (first.kind, first.severity) == ("not_finite", "high")
    ((name, share),) = first.layers
    assert (name, share > 0, share) == ("first", True, found.layers[0].not_finite)
    assert "weights or step sizes are not finite: " in first.message
    assert "model.load_state_dict(earlier)" in first.code
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert json.dumps(Inspection.from_dict(json.loads(text)).as_dict()) == text
    assert "first" in str(found)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["weight", "weight_step"])
def test_a_layer_of_nothing_finite_is_reported(which, value):
    model = quantized_net("lsq")
    x, y = batch()
    with torch.no_grad():
        getattr(model.first, which).fill_(value)
    backward(lambda: mse_loss(model.eval()(x), y))
    found = fogzo.inspect(
        model, forward=lambda: model(x), closure=lambda: mse_loss(model(x), y), num_samples=2
    )
    assert [finding.kind for finding in found.findings] == ["not_finite"]
    assert found.findings[0].layers == [("first", 1.0)]
    assert json.dumps(found.as_dict(), allow_nan=False)


def test_the_numbers_of_the_finite_weights_are_as_without_the_others():
    quantizer = fogzo.fixed(2, step_size=1.0, surrogate="identity")
    model = fogzo.quantize_(fill(nn.Linear(6, 2, bias=False)), quantizer, everything)
    values = [[-3.0, -1.2, -0.2, 0.2, 0.7, 1.2], [1.4, 2.0, 0.3, 0.2, math.nan, -math.inf]]
    with torch.no_grad():
        model.weight.copy_(torch.tensor(values))
    (layer,) = fogzo.inspect(model).layers
    assert (layer.not_finite, layer.masked) == pytest.approx((2 / 12, 2 / 10))
    shares = [2 / 10, 1 / 10, 4 / 10, 3 / 10]
    assert layer.levels_used == pytest.approx(math.prod(p**-p for p in shares))
    assert (layer.step_size, layer.empty, layer.dead) == (1, 0, 0)


@pytest.mark.parametrize(
    ("quantizer", "code", "options"),
    [
        (
            fogzo.fixed(2, step_size=50.0),
            'learned step sizes, fogzo.lsq(bits), granularity="channel", or fewer bits',
            "--quantizer.preset lsq, or --quantizer.granularity channel",
        ),
        (
            fogzo.lsq(2),
            'granularity="channel", or fewer bits',
            "--quantizer.granularity channel",
        ),
        (fogzo.lsq(2, granularity="channel"), "fewer bits", "--quantizer.bits, fewer"),
        (
            fogzo.fixed(2, step_size=50.0, granularity=8),
            "learned step sizes, fogzo.lsq(bits), or fewer bits",
            "--quantizer.preset lsq",
        ),
        (
            fogzo.sign(),
            "a smaller learning rate or another initialization, for weights of both signs",
            "--learning-rate, smaller",
        ),
    ],
)
def test_wasted_levels_are_advised_what_the_layer_has_not_yet(quantizer, code, options):
    model = fogzo.quantize_(fill(nn.Linear(32, 64)), quantizer, everything)
    with torch.no_grad():
        if quantizer.scale.kind == "learned":
            model.weight_step.mul_(50)
        else:
            model.weight.abs_()  # of one sign, so that of the middle levels there is one
    (finding,) = [f for f in fogzo.inspect(model).findings if f.kind == "levels"]
    assert (finding.code, finding.options) == (code, options)


@pytest.mark.parametrize("kind", ["learned", "fixed"])
def test_clipped_inputs_are_not_advised_to_learn_step_sizes_that_they_learn(kind):
    inputs = fogzo.lsq(2) if kind == "learned" else fogzo.fixed(2)
    model = fogzo.quantize_(fill(nn.Linear(32, 64)), fogzo.lsq(2), everything, activations=inputs)
    x = draw(64, 32)
    with fogzo.calibrate_(model):
        model(x)
    with torch.no_grad():
        model.input_step.mul_(0.02)
    found = fogzo.inspect(model, forward=lambda: model(x))
    (finding,) = [f for f in found.findings if f.kind == "clipped"]
    assert ("lsq" in finding.code) == ("lsq" in finding.options) == (kind == "fixed")
    assert "learned" not in finding.code or kind == "fixed"
    assert finding.options.endswith("abs_max")


def test_a_float_phase_is_no_illness():
    model = quantized_net("lsq")
    fogzo.methods.quantize_from(model, 0.5, total_steps=10)
    (note,) = fogzo.inspect(model).findings
    assert (note.kind, note.severity) == ("float_phase", "note")
    assert "switch.advance_()" in note.code
