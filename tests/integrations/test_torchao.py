"""Layers of torchao's QAT under an estimator."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo
from toolbox import assert_bits_equal, streams_put_back

pytest.importorskip("torchao", reason="torchao is not installed")

from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.qat import (
    FakeQuantizedEmbedding,
    FakeQuantizedLinear,
    Float8FakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    QATConfig,
)
from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig
from torchao.quantization.quant_primitives import ZeroPointDomain

quantized_weights = fogzo.integrations.torchao.quantized_weights

ACTIVATIONS = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
CONFIGS = {
    "groups": IntxFakeQuantizeConfig(torch.int4, group_size=8),
    "rows": IntxFakeQuantizeConfig(torch.int2, "per_channel"),
    "asymmetric": IntxFakeQuantizeConfig(
        torch.uint4,
        group_size=8,
        is_symmetric=False,
        zero_point_domain=ZeroPointDomain.FLOAT,
        zero_point_precision=torch.float32,
    ),
    "static": IntxFakeQuantizeConfig(torch.int4, group_size=8, is_dynamic=False),
    "int4": Int4WeightFakeQuantizeConfig(group_size=8, activation_dtype=torch.bfloat16),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(autouse=True)
def _streams():
    with streams_put_back(0):
        yield


def network(config, activations=ACTIVATIONS):
    model = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
    config = copy.deepcopy(config)
    quantize_(model, QATConfig(weight_config=config, activation_config=activations, step="prepare"))
    return model, torch.randn(32, 16), torch.randn(32, 4)


@every_config
def test_only_scales_that_stay_are_called_constant(config):
    weights = quantized_weights(network(config)[0])
    assert [weight.has_constant_step_size for weight in weights] == 2 * [
        config is CONFIGS["static"]
    ]


def train(model, x, y, steps=3, **options):
    estimator = fogzo.FogzoEstimator(quantized_weights(model), **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = estimator.record(lambda: mse_loss(model(x), y))
        loss.backward()
        estimator.refine_grads_()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@every_config
def test_records_say_how_weights_are_rounded(config):
    model, *_ = network(config)
    for record, layer in zip(quantized_weights(model), (model[0], model[2]), strict=True):
        rounded = layer.weight_fake_quantizer(layer.weight)
        codes = record.codes()
        offset = rounded - codes * record.step_size()
        if record.grid is None:  # each group has a range of its own
            groups = offset.unflatten(-1, (-1, 8))
            torch.testing.assert_close(groups, groups[..., :1].expand_as(groups))
            assert codes.max() - codes.min() == 15
        else:
            assert offset.abs().max() < 1e-6
            assert (codes.min(), codes.max()) == (record.grid.low_code, record.grid.high_code)
        assert record.model is model


@every_config
def test_scales_are_held_while_weights_move_and_all_is_put_back(config):
    model, x, _ = network(config)
    model(x)
    layer, record = model[0], quantized_weights(model)[0]
    quantizers = layer.weight_fake_quantizer, layer.activation_fake_quantizer
    before = [dict(vars(quantizer)) for quantizer in quantizers]
    step, rounded = record.step_size(), layer.weight_fake_quantizer(layer.weight)
    before[0] = dict(vars(quantizers[0]))
    saved = layer.weight.detach().clone()
    with torch.no_grad(), record.hold_step_size():
        assert_bits_equal(layer.weight_fake_quantizer(layer.weight), rounded.detach())
        layer.weight.mul_(0.5)
        assert_bits_equal(record.step_size(), step)
        model(2 * x)
        codes = record.codes()
        moved = layer.weight_fake_quantizer(layer.weight)
        layer.weight.copy_(saved)
        jumps = (moved - rounded) / step
        assert (jumps - jumps.round()).abs().max() < 1e-3  # to levels of the same step sizes
        assert codes.shape == saved.shape
    for quantizer, own in zip(quantizers, before, strict=True):
        assert vars(quantizer).keys() == own.keys()
        assert all(vars(quantizer)[name] is own[name] for name in own)
    if getattr(config, "is_dynamic", True):
        with torch.no_grad():
            layer.weight.mul_(0.5)
        assert not torch.equal(record.step_size(), step)


def test_gradients_pass_half_a_step_beyond_the_ends_as_the_surrogate_says():
    config = IntxFakeQuantizeConfig(torch.int2, "per_channel", is_dynamic=False)
    layer = FakeQuantizedLinear(6, 1, weight_config=config)
    quantizer = layer.weight_fake_quantizer
    quantizer.scale, quantizer.zero_point = torch.ones(1, 1), torch.zeros(1, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-2.6, -2.4, -1.0, 0.3, 1.4, 1.6]]))
    quantizer(layer.weight).sum().backward()
    (record,) = quantized_weights(nn.Sequential(layer))
    slope = record.surrogate.slope(layer.weight.detach() / record.step_size(), record.grid)
    assert layer.weight.grad.tolist() == slope.float().tolist() == [[0, 1, 1, 1, 1, 0]]


def test_convert_gives_the_trained_model_bit_for_bit():
    model, x, y = network(IntxFakeQuantizeConfig(torch.int4, group_size=8), activations=None)
    untrained = mse_loss(model(x), y).item()
    losses = train(model, x, y, steps=12)
    assert losses[0] == untrained
    assert losses[-1] < 0.9 * losses[0]
    trained = model(x)
    base = IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(8))
    quantize_(model, QATConfig(base, step="convert"))
    assert type(model[0]) is nn.Linear
    assert (model(x) - trained).abs().max() == 0


def test_what_the_config_of_int4_kernels_prepares_is_trained():
    model = nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 4))
    config = QATConfig(Int4WeightOnlyConfig(group_size=32), step="prepare")
    quantize_(model, config, filter_fn=lambda module, name: name == "0")
    assert [record.name for record in quantized_weights(model)] == ["0.weight"]
    losses = train(model, torch.randn(32, 32), torch.randn(32, 4), steps=8)
    assert losses[-1] < losses[0]


def test_a_tied_weight_is_listed_once_and_padding_is_held():
    config = IntxFakeQuantizeConfig(torch.int4, "per_channel")
    embedding = FakeQuantizedEmbedding(6, 4, padding_idx=2, weight_config=config)
    head = FakeQuantizedLinear(4, 6, weight_config=config)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    (record,) = quantized_weights(model)
    assert record.held.flatten().nonzero().tolist() == [[2]]
    with torch.no_grad(), record.hold_step_size():
        rounded = head.weight_fake_quantizer(head.weight)
        head.weight.mul_(1.1)
        for layer in model:
            moved = layer.weight_fake_quantizer(layer.weight)
            jumps = (moved - rounded) / record.step_size()
            assert (jumps - jumps.round()).abs().max() < 1e-4


def linear(config):
    return nn.Sequential(FakeQuantizedLinear(16, 4, weight_config=config))


def switched_off():
    model = linear(CONFIGS["rows"])
    model[0].weight_fake_quantizer.enabled = False
    return model


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), 'step="prepare"'),
        (lambda: linear(Float8FakeQuantizeConfig()), "Float8FakeQuantizeConfig rounds to floating"),
        (lambda: linear(Int4WeightFakeQuantizeConfig(group_size=16)), "float8 before int4"),
        (lambda: linear(ACTIVATIONS), "PerToken scales belong to inputs"),
        (switched_off, "enable_linear_fake_quant"),
    ],
)
def test_what_has_no_evenly_spaced_levels_is_refused_by_name(model, says):
    with pytest.raises(ValueError, match=says):
        quantized_weights(model())


def test_floating_point_layers_of_the_prototypes_are_refused_by_name():
    qat = pytest.importorskip("torchao.prototype.qat", reason="torchao without prototypes")
    layer = qat.NVFP4FakeQuantizedLinear.__new__(qat.NVFP4FakeQuantizedLinear)
    nn.Linear.__init__(layer, 16, 4)
    with pytest.raises(ValueError, match="NVFP4FakeQuantizedLinear rounds to floating point"):
        quantized_weights(nn.Sequential(layer))
