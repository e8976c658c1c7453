import json

import pytest
import torch
from networks import llama, logits, quantized, relative, vit
from torch import nn

import fogzo
from fogzo.export import bitnet, export
from fogzo.export.source import Options, Source

pytest.importorskip("accelerate", reason="transformers reads the folder with it")

# Of torch's own compiler, which the reader's layers import.
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
TOKEN = fogzo.abs_max(8, granularity="token")
CLASSES = ["bitlinear", "autobitlinear"]


@pytest.fixture(autouse=True)
def eager():
    with torch.compiler.set_stance("force_eager"):  # the reader's layers compile themselves
        yield


@pytest.mark.parametrize("linear_class", CLASSES)
@pytest.mark.parametrize("make", [llama, vit])
def test_transformers_reads_the_trained_network(make, linear_class, tmp_path):
    model = quantized(make(), fogzo.ternary(), TOKEN)
    report = export(model, tmp_path / "out", "bitnet", variant=linear_class)
    assert all(layer.exact == (not layer.step_rounding) for layer in report.layers)
    limit = 2**-23 if linear_class == "bitlinear" else 0  # of a reciprocal of a reciprocal
    assert all(layer.step_rounding <= limit for layer in report.layers)
    assert report.logits_difference < 5e-3  # inputs that round the other way
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["linear_class"] == linear_class
    assert config["modules_to_not_convert"] == ["lm_head" if make is llama else "classifier"]


@pytest.mark.parametrize("linear_class", CLASSES)
def test_each_layer_gives_what_it_gave(linear_class, tmp_path):
    model = llama(attention_bias=True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_()
    model = quantized(model, fogzo.ternary(), TOKEN)
    source = Source.of(model, Options(variant=linear_class))
    bitnet.write(source, tmp_path)
    served = type(model).from_pretrained(tmp_path)
    for name, layer in source.layers.items():
        x = torch.randn(4, layer.weight.shape[1], generator=torch.Generator().manual_seed(2))
        found, expected = (logits(m.get_submodule(name), x) for m in (served, model))
        assert relative(found, expected) < 1e-6


def test_bytes_are_those_of_transformers():
    from transformers.integrations.bitnet import pack_weights

    model = quantized(nn.Sequential(nn.Linear(64, 12)), fogzo.ternary(), filter_fn=lambda *_: True)
    weight = Source.of(model, Options()).layers["0"].weight
    expected = pack_weights(weight.integers.float())
    assert torch.equal(bitnet.pack_quarters(weight.unsigned()), expected)


def test_inputs_in_float_are_exported_only_if_that_is_asked_for(tmp_path):
    model = quantized(llama(), fogzo.ternary())
    with pytest.raises(ValueError, match=r"rounds? inputs to 8 bits per token"):
        export(model, tmp_path / "out", "bitnet")
    assert not list(tmp_path.iterdir())
    report = export(model, tmp_path / "out", "bitnet", activations="drop")
    assert all(layer.step_rounding <= 2**-23 for layer in report.layers)
    assert 1e-4 < report.logits_difference < 0.1


def test_divisors_that_half_precision_rounds_are_reported(tmp_path):
    model = quantized(llama().bfloat16(), fogzo.ternary(), TOKEN)
    report = export(model, tmp_path / "out", "bitnet")
    served = type(model).from_pretrained(tmp_path / "out")
    rounded = 0
    for layer in report.layers:
        step = model.get_submodule(layer.name).step_size().float()
        off = (1 / served.get_submodule(layer.name).weight_scale.float() / step - 1).abs().max()
        assert layer.step_rounding == pytest.approx(float(off), abs=1e-6)
        assert not (layer.exact and off > 1e-6)
        rounded += not layer.exact
    assert rounded
    report = export(model, tmp_path / "out", "bitnet", variant="autobitlinear")
    assert all(layer.exact and not layer.step_rounding for layer in report.layers)


def test_divisors_that_are_not_finite_are_refused(tmp_path):
    model = llama().half()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(5e-4)
    model = quantized(model, fogzo.ternary(), TOKEN)
    with pytest.raises(ValueError, match=r"up_proj' as bitnet: .* exceeds torch.float16: variant="):
        export(model, tmp_path / "out", "bitnet")
    assert not list(tmp_path.iterdir())
    export(model, tmp_path / "out", "bitnet", variant="autobitlinear")
    export(model.float(), tmp_path / "out", "bitnet")
