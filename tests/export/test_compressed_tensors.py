import json
import warnings

import pytest
import torch
from networks import (
    grouped_query_llama,
    inner_linear,
    llama,
    logits,
    quantized,
    source_of,
    tied_llama,
    vit,
    weights_are_equal,
)
from safetensors.torch import load_file
from transformers import CompressedTensorsConfig

import fogzo
from fogzo.export import check, compressed_tensors, export
from fogzo.quantizers import TERNARY, fixed_scale

pytest.importorskip("compressed_tensors", reason="transformers reads the folder with it")

WEIGHTS = {
    "int2": fogzo.lsq(2, levels="integer"),
    "half2": fogzo.lsq(2),
    "half2-g32": fogzo.lsq(2, granularity=32),
    "int3-channel": fogzo.lsq(3, granularity="channel"),
    "half3": fogzo.lsq(3, levels="half"),
    "int4-g32": fogzo.fixed(4, granularity=32),
    "half4": fogzo.lsq(4, levels="half"),
    "int8": fogzo.abs_max(8),
    "ternary": fogzo.ternary(),
    "sign": fogzo.sign(),
}
INPUTS = {
    "W4A8": (fogzo.lsq(4), fogzo.lsq(8)),
    "W4A4": (fogzo.lsq(4), fogzo.fixed(4)),
    "W2A2": (fogzo.lsq(2, levels="integer"), fogzo.lsq(2, levels="integer")),
}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def read(model, folder, dequantize):
    """By either way of transformers: decompressed as the file is read, or at the first forward."""
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        return type(model).from_pretrained(folder, **options if dequantize else {})


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("quantizer", WEIGHTS.values(), ids=WEIGHTS)
def test_transformers_reads_the_trained_network(quantizer, dequantize, tmp_path):
    model = quantized(llama(), quantizer)
    source = source_of(model)
    compressed_tensors.write(source, tmp_path)
    served = read(model, tmp_path, dequantize=dequantize)
    assert torch.equal(logits(served), logits(model))
    assert weights_are_equal(served, source)


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("make", [tied_llama, grouped_query_llama, vit])
def test_other_networks(make, dequantize, tmp_path):
    model = quantized(make(), fogzo.lsq(2, granularity="channel"))
    source = source_of(model)
    compressed_tensors.write(source, tmp_path)
    served = read(model, tmp_path, dequantize=dequantize)
    assert torch.equal(logits(served), logits(model))
    assert weights_are_equal(served, source)


@pytest.mark.parametrize("make", [llama, vit])
@pytest.mark.parametrize(("weights", "activations"), INPUTS.values(), ids=INPUTS)
def test_static_integer_inputs(weights, activations, make, tmp_path):
    model = quantized(make(), weights, activations)
    source = source_of(model)
    compressed_tensors.write(source, tmp_path)
    served = read(model, tmp_path, dequantize=False)
    assert torch.equal(logits(served), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    model = llama().to(dtype)
    model.model.rotary_emb = llama().model.rotary_emb  # its frequencies stay float32 in a reader
    quantized(model, fogzo.lsq(2, granularity=32))
    source = source_of(model)
    compressed_tensors.write(source, tmp_path)
    served = read(model, tmp_path, dequantize=False)
    assert torch.equal(logits(served), logits(model))
    assert weights_are_equal(served, source)


def test_half_grids_take_four_bits_as_three_have_two_layouts(tmp_path):
    source = source_of(quantized(llama(), fogzo.lsq(2)))
    compressed_tensors.write(source, tmp_path)
    (group,) = config_of(tmp_path)["config_groups"].values()
    assert group["weights"]["num_bits"] == 4
    assert config_of(tmp_path)["ignore"] == ["lm_head"]


def test_the_tied_head_is_not_in_the_file(tmp_path):
    compressed_tensors.write(source_of(quantized(tied_llama(), fogzo.lsq(4))), tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


@pytest.mark.parametrize("dequantize", [False, True])
def test_layers_of_different_bits_and_groups_share_a_config_group(dequantize, tmp_path):
    model = llama()
    quantized(model, fogzo.ternary(granularity=32), filter_fn=lambda m, n: "self_attn" in n)
    quantized(model, fogzo.lsq(4), filter_fn=lambda m, n: "up_proj" in n)
    quantized(model, fogzo.lsq(4, granularity=16), filter_fn=lambda m, n: "down_proj" in n)
    source = source_of(model)
    compressed_tensors.write(source, tmp_path)
    (group,) = config_of(tmp_path)["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 16)
    served = read(model, tmp_path, dequantize=dequantize)
    assert torch.equal(logits(served), logits(model))
    assert weights_are_equal(served, source)


def test_the_widest_type_of_all_layers_is_asked_for_and_reported(tmp_path):
    model = llama()
    quantized(model, fogzo.lsq(2, levels="integer"), filter_fn=lambda m, n: "mlp" in n)
    quantized(model, fogzo.lsq(8), filter_fn=lambda m, n: "self_attn" in n)
    says = r"gate_proj' .* needs 2 bits and .*q_proj' needs 8, .* allow_wider=True takes 8 for all"
    with pytest.raises(ValueError, match=says):
        export(model, tmp_path / "out", "compressed-tensors")
    report = export(model, tmp_path / "out", "compressed-tensors", allow_wider=True)
    assert {layer.stored for layer in report.layers} == {"W8"}
    words = load_file(tmp_path / "out" / "model.safetensors")
    packed = words["model.layers.0.mlp.gate_proj.weight_packed"]
    (weights,) = {
        m.weight.numel() for n, m in model.named_modules() if n.endswith("0.mlp.gate_proj")
    }
    assert packed.nbytes == weights
    assert all(layer.bits > 8 for layer in report.layers)


def test_inputs_that_need_two_config_groups_are_refused(tmp_path):
    model = llama()
    fogzo.quantize_(
        model,
        fogzo.lsq(4),
        inner_linear,
        activations=lambda module, name: fogzo.fixed(8, step_size=0.1) if "mlp" in name else None,
    )
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate_proj.*two config groups"):
        export(model, tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_ternary_inputs_are_refused():
    quantizer = fogzo.Quantizer(TERNARY, fixed_scale(0.1))
    model = llama()
    fogzo.quantize_(model, fogzo.lsq(4), inner_linear, activations=quantizer)
    assert "its inputs have 3 levels (ternary)" in check(model, "compressed-tensors")[0]


def test_the_report_says_what_the_reader_made_of_it(tmp_path):
    report = export(
        quantized(llama(), fogzo.lsq(4), fogzo.lsq(8)), tmp_path / "out", "compressed-tensors"
    )
    assert all(layer.exact for layer in report.layers)
    assert all(layer.stored == "W4 in int8" and layer.bits > 8 for layer in report.layers)
    assert report.logits_difference == 0
    assert "transformers" in report.reader
