import numpy as np
import pytest
import torch
from networks import (
    grouped_query_llama,
    inputs_of,
    llama,
    logits,
    quantized,
    source_of,
    tied_llama,
    weights_are_equal,
)
from torch import nn

import fogzo
from fogzo.export import export, gguf

reader = pytest.importorskip("gguf", reason="writes the file, and transformers reads it with it")

HALF = torch.float16
WEIGHTS = {
    "TQ2_0": fogzo.ternary(scale_dtype=HALF),
    "TQ2_0-sign": fogzo.sign(scale_dtype=HALF),
    "TQ2_0-g256": fogzo.ternary(granularity=256, scale_dtype=HALF),
    "Q2_K": fogzo.lsq(2, scale_dtype=HALF),
    "Q2_K-channel": fogzo.lsq(2, granularity="channel", scale_dtype=HALF),
    "Q2_K-integer": fogzo.lsq(2, levels="integer", scale_dtype=HALF),
    "Q3_K": fogzo.lsq(3, scale_dtype=HALF),
    "Q4_0": fogzo.lsq(4, granularity=32, scale_dtype=HALF),
    "Q4_0-g64": fogzo.lsq(4, granularity=64, scale_dtype=HALF),
    "Q4_0-half": fogzo.lsq(3, levels="half", scale_dtype=HALF),
    "Q5_0": fogzo.fixed(4, levels="half", granularity="channel", scale_dtype=HALF),
    "Q8_0": fogzo.abs_max(8, scale_dtype=HALF),
}


def wide(make=llama, **changes):
    """Rows of whole blocks of 256."""
    return make(hidden_size=256, intermediate_size=512, **changes)


def read(model, folder):
    return type(model).from_pretrained(folder, gguf_file=gguf.FILE, dtype=model.dtype)


def types_in(folder):
    tensors = reader.GGUFReader(folder / gguf.FILE).tensors
    return {tensor.name: tensor.tensor_type.name for tensor in tensors}


@pytest.mark.parametrize("name", WEIGHTS)
def test_transformers_reads_the_trained_network(name, tmp_path):
    model = quantized(wide(), WEIGHTS[name])
    source = source_of(model)
    gguf.write(source, tmp_path)
    served = read(model, tmp_path)
    assert weights_are_equal(served, source)
    assert torch.equal(logits(served), logits(model))
    types = types_in(tmp_path)
    assert types["blk.0.attn_q.weight"] == name.partition("-")[0]
    assert types["token_embd.weight"] == types["output.weight"] == "F32"


@pytest.mark.parametrize("make", [grouped_query_llama, tied_llama])
def test_other_networks(make, tmp_path):
    model = quantized(wide(make), fogzo.lsq(2, granularity="channel", scale_dtype=HALF))
    source = source_of(model)
    gguf.write(source, tmp_path)
    served = read(model, tmp_path)
    assert weights_are_equal(served, source)
    assert torch.equal(logits(served), logits(model))
    assert ("output.weight" in types_in(tmp_path)) == (make is not tied_llama)


def test_biases_are_written_and_read(tmp_path):
    model = grouped_query_llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_()
    source = source_of(quantized(model, fogzo.lsq(4, scale_dtype=HALF)))
    gguf.write(source, tmp_path)
    served = gguf.read_back(source, tmp_path)
    assert torch.equal(served.call(inputs_of(model)), logits(model))
    tensors = {t.name: t.data for t in reader.GGUFReader(tmp_path / gguf.FILE).tensors}
    bias = source.other_tensors()["model.layers.0.self_attn.k_proj.bias"]
    # Of a head (16 outputs), llama.cpp rotates neighbours, transformers the i-th with the 8 + i-th.
    assert np.array_equal(tensors["blk.0.attn_k.bias"][:4], bias[[0, 8, 1, 9]].numpy())
    assert np.array_equal(
        tensors["blk.0.attn_v.bias"],
        source.other_tensors()["model.layers.0.self_attn.v_proj.bias"].numpy(),
    )


@pytest.mark.parametrize("make", [llama, tied_llama])
def test_quantized_embeddings_and_heads(make, tmp_path):
    model = quantized(
        make(), fogzo.lsq(4, granularity=32, scale_dtype=HALF), filter_fn=lambda *_: True
    )
    source = source_of(model)
    gguf.write(source, tmp_path)
    served = read(model, tmp_path)
    assert weights_are_equal(served, source)
    assert torch.equal(logits(served), logits(model))
    assert types_in(tmp_path)["token_embd.weight"] == "Q4_0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    model = quantized(llama().to(dtype), fogzo.lsq(4, granularity=32, scale_dtype=HALF))
    source = source_of(model)
    gguf.write(source, tmp_path)
    assert weights_are_equal(read(model, tmp_path), source)
    expected = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert types_in(tmp_path)["token_embd.weight"] == expected


@pytest.mark.parametrize(
    ("variant", "type_id", "quantizer"),
    [
        ("q1_0", 41, fogzo.sign(scale_dtype=HALF)),
        ("q2_0", 42, fogzo.lsq(2, levels="integer", granularity=64, scale_dtype=HALF)),
        ("tq1_0", 34, fogzo.ternary(scale_dtype=HALF)),
    ],
)
def test_types_on_request(variant, type_id, quantizer, tmp_path):
    source = source_of(quantized(wide(), quantizer), variant=variant)
    gguf.write(source, tmp_path)
    assert (tmp_path / gguf.FILE).read_bytes().count(
        b"blk.0.attn_q.weight"
        + np.array([2], "<u4").tobytes()
        + np.array([256, 256], "<u8").tobytes()
        + np.array([type_id], "<u4").tobytes()
    ) == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_act": "gelu"}, "activation function is 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rotary embedding is 'linear'",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(changes, match, tmp_path):
    model = quantized(llama(**changes), fogzo.lsq(4, scale_dtype=HALF))
    with pytest.raises(ValueError, match=match):
        export(model, tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())


def test_the_report_says_what_the_reader_made_of_it(tmp_path):
    report = export(quantized(wide(), fogzo.ternary(scale_dtype=HALF)), tmp_path / "out", "gguf")
    assert all(layer.exact for layer in report.layers)
    assert report.logits_difference == 0
    assert "transformers" in report.reader


def test_what_no_reader_in_python_knows_is_not_verified(tmp_path):
    model = quantized(wide(), fogzo.sign(scale_dtype=HALF))
    report = export(model, tmp_path / "out", "gguf", variant="q1_0")
    assert "no reader in Python" in report.note
    assert {(layer.stored, layer.exact) for layer in report.layers} == {("Q1_0", None)}
    assert report.logits_difference is None
