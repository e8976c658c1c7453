"""Layers of brevitas under an estimator."""

import pytest
import torch
from tiny import audit_every_step
from torch import nn
from torch.nn.functional import mse_loss

import fogzo
from toolbox import assert_bits_equal, streams_put_back

pytest.importorskip("brevitas", reason="brevitas is not installed")

import brevitas.nn as qnn
from brevitas import quant
from brevitas.core.function_wrapper import TensorClamp
from brevitas.inject.enum import FloatToIntImplType, LearnedRoundImplType

quantized_weights = fogzo.integrations.brevitas.quantized_weights

RULES = {
    "tensor": quant.Int8WeightPerTensorFloat,
    "channel": quant.Int8WeightPerChannelFloat,
    "power of two": quant.Int8WeightPerTensorFixedPoint,
    "asymmetric": quant.ShiftedUint8WeightPerChannelFloat,
    "learned": quant.Int8WeightPerTensorFloatMSE,
    "groups": quant.MXInt8Weight,
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@pytest.fixture(autouse=True)
def _streams():
    with streams_put_back(0):
        yield


def linear(rule=quant.Int8WeightPerChannelFloat, inputs=32, outputs=16, bits=4, **options):
    return qnn.QuantLinear(
        inputs, outputs, bias=True, weight_quant=rule, weight_bit_width=bits, **options
    )


@every_rule
def test_only_scales_that_stay_are_called_constant(rule):
    (weight,) = quantized_weights(linear(rule))
    assert not weight.has_constant_step_size


def test_a_scale_that_was_given_is_constant():
    layer = linear(RULES["tensor"], weight_scaling_impl_type="const", weight_scaling_init=0.5)
    (weight,) = quantized_weights(layer)
    assert weight.has_constant_step_size


def network(rule=quant.Int8WeightPerChannelFloat, collect_stats_steps=4):
    model = nn.Sequential(
        linear(rule),
        qnn.QuantReLU(bit_width=4, collect_stats_steps=collect_stats_steps),
        linear(rule, 16, 4),
    )
    return model, torch.randn(32, 32), torch.randn(32, 4)


def train(model, x, y, steps, after=lambda stats: None, **options):
    estimator = fogzo.FogzoEstimator(quantized_weights(model), **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = estimator.record(lambda: mse_loss(model(x), y))
        loss.backward()
        after(estimator.refine_grads_())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@every_rule
def test_records_say_how_weights_are_rounded(rule):
    layer = linear(rule)
    (record,) = quantized_weights(nn.Sequential(layer))
    assert record.name == "0.weight"
    ours = record.step_size(), record.codes()
    rounded = layer.quant_weight()
    assert_bits_equal(ours[0].expand_as(layer.weight), rounded.scale.expand_as(layer.weight))
    torch.testing.assert_close(
        rounded.value, (ours[1] - rounded.zero_point) * ours[0], check_dtype=False
    )
    if rule is RULES["asymmetric"]:
        assert record.grid is None
    else:
        assert record.grid.low_code <= ours[1].min() < ours[1].max() <= record.grid.high_code == 7


@every_rule
def test_scales_are_held_while_weights_move_and_all_is_put_back(rule):
    layer = linear(rule)
    layer.quant_weight()  # a learned scale begins with the first forward pass
    (record,) = quantized_weights(nn.Sequential(layer))
    saved, rounded, step = layer.weight.detach().clone(), layer.quant_weight(), record.step_size()
    held = {name: dict(vars(module)) for name, module in layer.named_modules()}
    with torch.no_grad():
        with record.hold_step_size():
            assert_bits_equal(layer.quant_weight().value, rounded.value.detach())
            layer.weight.mul_(0.5)
            assert_bits_equal(layer.quant_weight().scale, rounded.scale.detach())
            assert_bits_equal(record.step_size(), step)
        assert torch.equal(record.step_size(), step) == (rule is RULES["learned"])
        layer.weight.copy_(saved)
    for name, module in layer.named_modules():
        assert all(vars(module)[key] is value for key, value in held[name].items())
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_records_count_the_inputs_of_an_output():
    transposed = [
        qnn.QuantConvTranspose1d(16, 4, 3, groups=groups, weight_bit_width=4) for groups in (1, 2)
    ]
    model = nn.Sequential(*transposed, linear(inputs=8))
    records = quantized_weights(model)
    assert [record.fan_in for record in records] == [48, 24, 8]


def test_listing_begins_no_scale_that_would_begin_with_the_first_forward_pass():
    layer = linear(RULES["learned"])
    scaling = layer.weight_quant.tensor_quant.scaling_impl
    (record,) = quantized_weights(nn.Sequential(layer))
    step = record.step_size()
    assert not scaling.init_done
    assert scaling.value.item() == 1
    assert_bits_equal(layer.quant_weight().scale.detach(), step)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_size_of_a_step_has_no_sign(sign):
    layer = linear(RULES["learned"])
    layer.quant_weight()
    with torch.no_grad():
        layer.weight_quant.tensor_quant.scaling_impl.value.mul_(sign)
    (record,) = quantized_weights(nn.Sequential(layer))
    assert record.step_size() > 0
    fogzo.FogzoEstimator([record])


@pytest.mark.parametrize(("clamp", "slope"), [(None, [1, 1, 1, 1]), (TensorClamp, [0, 1, 1, 0])])
def test_gradients_pass_where_the_surrogate_says(clamp, slope):
    options = {} if clamp is None else {"weight_tensor_clamp_impl": clamp}
    layer = linear(quant.SignedTernaryWeightPerTensorConst, 4, 1, bits=2, **options)
    with torch.no_grad():
        layer.weight.copy_(0.1 * torch.tensor([[-1.6, -1.4, 1.4, 1.6]]))
    layer.quant_weight().value.sum().backward()
    (record,) = quantized_weights(nn.Sequential(layer))
    x = layer.weight.detach() / record.step_size()
    assert (record.grid.low_code, record.grid.high_code) == (-1, 1)
    assert record.surrogate.slope(x, record.grid).float().tolist() == [slope]
    torch.testing.assert_close(layer.weight.grad, torch.tensor([slope]).float())


def test_runtime_counters_count_steps_and_no_probe(monkeypatch):
    # The audit of every step compares what probes run with what was recorded, also where the
    # collection of statistics ends.
    audit_every_step(monkeypatch)
    model, x, y = network(collect_stats_steps=4)
    scaling = model[1].act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl
    seen = []
    losses = train(model, x, y, 7, after=lambda stats: seen.append(scaling.counter))
    assert seen == [1, 2, 3, 4, 5, 5, 5]
    assert losses[-1] < losses[0]


def test_export_and_checkpoints_are_those_of_brevitas():
    model, x, y = network(collect_stats_steps=2)
    keys = list(model.state_dict())
    train(model, x, y, 4)
    model.eval()
    trained = model(x)
    other, *_ = network(collect_stats_steps=2)
    assert set(model.state_dict()) >= set(keys)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), trained)


def delayed():
    return nn.Sequential(linear(weight_quant_delay_steps=3))


def switched_off():
    layer = linear()
    layer.weight_quant.disable_quant = True
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: nn.Linear(4, 4), "found no layer"),
        (
            lambda: linear(quant.SignedBinaryWeightPerTensorConst, bits=1),
            r"ClampedBinaryQuant .* layers, nn\.Linear, without brevitas, and then fogzo",
        ),
        (lambda: linear(quant.Fp8e4m3WeightPerTensorFloat, bits=8), "FloatQuant"),
        (lambda: linear(quant.Int8WeightNormL2PerChannelFixedPoint), "DecoupledRescalingIntQuant"),
        (lambda: linear(quant.Int8AccumulatorAwareWeightQuant), "WithInput"),
        (
            lambda: linear(
                weight_float_to_int_impl_type=FloatToIntImplType.LEARNED_ROUND,
                weight_learned_round_impl_type=LearnedRoundImplType.HARD_SIGMOID,
            ),
            "learns how to round",
        ),
        (delayed, "after the delay"),
        (switched_off, "disable_quant = False"),
    ],
)
def test_what_is_no_rounding_to_integers_is_refused_by_name(model, says):
    with pytest.raises(ValueError, match=says):
        quantized_weights(nn.Sequential(model()))
