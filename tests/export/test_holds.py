"""The table of formats: what each of them holds, as what, and what it says of the rest."""

import re

import pytest
import torch
from networks import inner, inner_linear, llama, logits, mlp, quantized, resnet, vit
from torch import nn
from transformers import LlamaForCausalLM

import fogzo
import fogzo.export.transformers
from fogzo.export import check, export, formats, holds, load_
from fogzo.export.format_table import FORMATS
from fogzo.export.source import Options, Source
from fogzo.quantizers import Grid, Quantizer, abs_mean_scale

F16 = {"scale_dtype": torch.float16}


def one_layer(module, name):
    return name.endswith("q_proj")


def small_llama(quantizer, width=256, activations=None, filter_fn=one_layer):
    model = fogzo.quantize_(llama(width), quantizer, filter_fn, activations)
    if activations is not None and activations.scale.has_state:
        with torch.no_grad(), fogzo.calibrate_(model):
            model(torch.arange(8)[None])
    return model


def stored(model, format, **options):
    source = Source.of(model, Options(**options))
    assert holds.problems(source, format) == []
    return {holds.stored(source, name, format).name for name in source.layers}


# The cells of the table that say yes.
QUANTIZERS = {
    "int2": lambda g="tensor": fogzo.lsq(2, levels="integer", granularity=g, **F16),
    "int3": lambda g="tensor": fogzo.lsq(3, granularity=g, **F16),
    "int4": lambda g="tensor": fogzo.lsq(4, granularity=g, **F16),
    "int8": lambda g="tensor": fogzo.fixed(8, granularity=g, **F16),
    "half1": lambda g="tensor": fogzo.lsq(1, granularity=g, **F16),
    "sign": lambda g="channel": fogzo.sign(granularity=g, **F16),
    "half2": lambda g="tensor": fogzo.lsq(2, granularity=g, **F16),
    "half3": lambda g="tensor": fogzo.lsq(3, levels="half", granularity=g, **F16),
    "half4": lambda g="tensor": fogzo.lsq(4, levels="half", granularity=g, **F16),
    "half8": lambda g="tensor": fogzo.fixed(8, levels="half", granularity=g, **F16),
    "ternary": lambda g="tensor": fogzo.ternary(granularity=g, **F16),
    "abs_max4": lambda g="channel": fogzo.abs_max(4, granularity=g, **F16),
}
YES = {
    "int2": ("2 bit", "W2", "Q2_K", "MatMulNBits 2", "int4", "2 bit", "int2", None),
    "int3": ("4 bit", "W4", "Q3_K", "MatMulNBits 4", "int4", "3 bit", "int3", None),
    "int4": ("4 bit", "W4", "Q4_0", "MatMulNBits 4", "int4", "4 bit", "int4", None),
    "int8": ("8 bit", "W8", "Q8_0", "MatMulNBits 8", "int8", "8 bit", "int8", None),
    "half1": ("1 bit", "W2", "TQ2_0", "MatMulNBits 2", "int4", "2 bit", "int1", None),
    "sign": ("1 bit", "W2", "TQ2_0", "MatMulNBits 2", "int4", "2 bit", "int1", None),
    "half2": ("2 bit", "W4", "Q2_K", "MatMulNBits 2", "int4", "2 bit", "int2", None),
    "half3": ("4 bit", "W4", "Q4_0", "MatMulNBits 4", "int4", "3 bit", "int3", None),
    "half4": ("4 bit", "W8", "Q5_0", "MatMulNBits 4", "int8", "4 bit", "int4", None),
    "half8": ("8 bit", None, None, None, None, "8 bit", "int8", None),
    "ternary": ("1.6 bit", "W2", "TQ2_0", "MatMulNBits 2", "int4", "2 bit", "int2", "2 bit"),
    "abs_max4": ("4 bit", "W4", "Q4_0", "MatMulNBits 4", "int4", "4 bit", "int4", None),
}
COLUMNS = (
    *("packed", "compressed-tensors", "gguf", "onnx", "onnx qdq", "mlx", "torchao", "bitnet"),
)


@pytest.mark.parametrize("quantizer", YES)
def test_every_quantizer_has_a_type_or_a_reason(quantizer, tmp_path):
    model = small_llama(QUANTIZERS[quantizer]())
    for column, expected in zip(COLUMNS, YES[quantizer], strict=True):
        format, _, variant = column.partition(" ")
        options = {"variant": variant or None, "activations": "drop"}
        if expected is None:
            reason = "expected ternary weights" if format == "bitnet" else "hold its 256 levels"
            no(model, format, reason, tmp_path, **options)
        else:
            (found,) = stored(model, format, **options)
            assert found.removeprefix("DequantizeLinear ") == expected
    assert stored(model, "float") == {"float"}


@pytest.mark.parametrize(
    ("quantizer", "group", "variant", "expected"),
    [
        ("half2", 256, None, "Q2_K"),
        ("ternary", 256, None, "TQ2_0"),
        ("ternary", 256, "tq1_0", "TQ1_0"),
        ("sign", 128, "q1_0", "Q1_0"),
        ("half1", 256, "q1_0", "Q1_0"),
        ("int2", 64, "q2_0", "Q2_0"),
        ("ternary", 64, "q2_0", "Q2_0"),
        ("int4", 32, None, "Q4_0"),
        ("int8", 32, None, "Q8_0"),
    ],
)
def test_types_of_gguf_by_groups_and_variants(quantizer, group, variant, expected):
    model = small_llama(QUANTIZERS[quantizer](group))
    assert stored(model, "gguf", variant=variant) == {expected}


def no(model, format, message, tmp_path, **options):
    problems = check(model, format, **options)
    assert any(re.search(message, problem) for problem in problems), problems
    if format in formats():
        with pytest.raises(ValueError, match=re.escape(problems[0])):
            export(model, tmp_path / "out", format, **options)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "format", ["compressed-tensors", "gguf", "onnx", "mlx", "bitnet", "torchao"]
)
def test_rotations(format, tmp_path):
    message = (
        r"cannot write 'model.layers.0.self_attn.q_proj' as .*: its weights are rotated "
        r'\(Hadamard\), and .* has no rotation of inputs: format="packed", format="float"'
    )
    no(small_llama(fogzo.quest(2, **F16)), format, message, tmp_path)


@pytest.mark.parametrize("format", ["gguf", "mlx"])
def test_steps_that_are_no_float16(format, tmp_path):
    model = small_llama(fogzo.lsq(2))
    message = r"its step sizes are no float16.* \(worst rounding \d.\de-0\d\): train with "
    no(model, format, message + "scale_dtype=torch.float16, or export with", tmp_path)
    assert check(model, format, round_steps=True) == []


def test_bfloat16_steps_are_for_mlx_alone(tmp_path):
    model = small_llama(fogzo.lsq(4, granularity="channel", scale_dtype=torch.bfloat16))
    assert stored(model, "mlx") == {"4 bit"}


def test_groups_without_a_type_of_as_many_bits(tmp_path):
    model = small_llama(QUANTIZERS["half2"](64))
    message = (
        "it has the levels uniform2-half in groups of 64, and Q2_K shares a step over 256; it "
        "would take Q4_0, 4.5 bits per weight: allow_wider=True, or train with "
        'granularity="channel"'
    )
    no(model, "gguf", message, tmp_path)
    assert stored(model, "gguf", allow_wider=True) == {"Q4_0"}


def test_widths_without_a_type_of_as_many_bits(tmp_path):
    model = small_llama(QUANTIZERS["ternary"](), width=192)
    message = (
        "it has 192 inputs, and TQ2_0 needs a multiple of 256; it would take Q4_0, 4.5 bits per "
        'weight: allow_wider=True, or variant="q2_0", or format="packed"'
    )
    no(model, "gguf", message, tmp_path)
    assert stored(model, "gguf", allow_wider=True) == {"Q4_0"}
    assert stored(model, "gguf", variant="q2_0") == {"Q2_0"}
    narrow = small_llama(QUANTIZERS["int4"](), width=16)
    no(narrow, "gguf", "has 16 inputs, and Q4_0 needs a multiple of 32: format=", tmp_path)
    no(narrow, "mlx", "has 16 inputs, and 4 bit needs a multiple of 32: format=", tmp_path)


def test_groups_that_onnx_does_not_have(tmp_path):
    model = small_llama(QUANTIZERS["int4"](8))
    no(model, "onnx", "its groups of 8 inputs are no multiple of 16: train with", tmp_path)


def test_levels_that_nothing_holds(tmp_path):
    model = small_llama(QUANTIZERS["half8"]())
    message = r"W2 or W4 or W8 cannot hold its 256 levels \(uniform8-half, as integers -255 to 255"
    no(model, "compressed-tensors", message, tmp_path)
    many = Quantizer(Grid("many", -200, 199), abs_mean_scale())
    no(small_llama(many), "packed", "cannot hold its 400 levels", tmp_path)


LSQ8, HALF2 = fogzo.lsq(8), fogzo.lsq(2)
TOKEN = fogzo.abs_max(8, granularity="token")


@pytest.mark.parametrize(
    ("format", "activations", "message"),
    [
        ("float", LSQ8, 'which float weights cannot say: activations="drop" exports the weights'),
        ("gguf", LSQ8, "which gguf cannot say; llama.cpp rounds them to 8 bits itself: activ"),
        ("mlx", TOKEN, "which mlx cannot say"),
        ("torchao", TOKEN, "which torchao's weight-only layers cannot say"),
        *(
            (format, activations, f"are quantized .{activations.grid.name}., which")
            for format in ("float", "gguf", "mlx", "torchao")
            for activations in (HALF2, fogzo.quest(4), fogzo.lsq(8, levels="unsigned"))
        ),
        *(
            ("bitnet", activations, f"and its are {activations.grid.name}: train")
            for activations in (HALF2, fogzo.quest(4), fogzo.abs_max(4, granularity="token"))
        ),
        (
            "compressed-tensors",
            HALF2,
            r"its inputs have levels ±0.5, ±1.5, and compressed-tensors has integers only: train "
            r'with activations=fogzo.lsq\(2, levels="integer"\)',
        ),
        ("compressed-tensors", TOKEN, "measured in every forward pass .uniform8-integer per token"),
        ("compressed-tensors", fogzo.quest(4), "its inputs are rotated before they are rounded"),
        ("compressed-tensors", fogzo.lsq(8, levels="unsigned"), "unsigned levels"),
        ("bitnet", LSQ8, r"round inputs to 8 bits per token, and its are uniform8-integer: train"),
        ("bitnet", None, r"round inputs to 8 bits per token, and its are in float: train with"),
    ],
)
def test_inputs(format, activations, message, tmp_path):
    model = small_llama(fogzo.ternary(**F16), activations=activations)
    no(model, format, message, tmp_path)
    assert check(model, format, activations="drop") == []


def test_inputs_that_are_held():
    assert check(small_llama(fogzo.ternary(), activations=LSQ8), "compressed-tensors") == []
    assert check(small_llama(fogzo.ternary(), activations=TOKEN), "bitnet") == []
    for activations in (LSQ8, HALF2, TOKEN, fogzo.quest(4)):
        model = small_llama(fogzo.ternary(), activations=activations)
        assert check(model, "packed") == check(model, "onnx") == []


class LlamaWithHead(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.head = nn.ConvTranspose1d(8, 8, 3)


@pytest.mark.parametrize(
    ("format", "elsewhere"),
    [
        ("compressed-tensors", 'format="packed" or "onnx"'),
        ("mlx", 'format="packed" or "onnx"'),
        ("bitnet", 'format="packed" or "onnx"'),
        ("torchao", 'format="packed"'),
    ],
)
@pytest.mark.parametrize("kind", ["Conv2d", "ConvTranspose1d", "Embedding"])
def test_layers_that_are_not_linear(kind, format, elsewhere, tmp_path):
    model = llama()
    if kind == "Conv2d":
        model = quantized(resnet(), fogzo.ternary(**F16), filter_fn=inner)
    elif kind == "ConvTranspose1d":
        model = LlamaWithHead(model.config)
        model = fogzo.quantize_(model, fogzo.ternary(**F16), lambda module, name: name == "head")
    else:
        model = fogzo.quantize_(model, fogzo.ternary(**F16), lambda *_: True)
    message = f"it is of class {kind}, and {format} holds Linear only: {elsewhere}"
    no(model, format, message, tmp_path, activations="drop")


def test_layers_of_every_kind():
    model = quantized(resnet(), fogzo.lsq(4, **F16), filter_fn=inner)
    assert stored(model, "packed") == {"4 bit"}
    assert stored(model, "onnx") == {"DequantizeLinear int4", "MatMulNBits 4"}
    with_embedding = fogzo.quantize_(llama(), fogzo.lsq(4, **F16), lambda *_: True)
    assert stored(with_embedding, "packed") == {"4 bit"}
    assert stored(with_embedding, "gguf") == {"Q4_0"}
    assert "is of class Embedding, and onnx holds Linear, Conv" in check(with_embedding, "onnx")[0]


def test_bitnet(tmp_path):
    expected = "expected ternary weights with one step per tensor: train with fogzo.ternary()"
    half = small_llama(fogzo.lsq(2), activations=TOKEN)
    no(half, "bitnet", re.escape(f"got uniform2-half per tensor, {expected}"), tmp_path)
    channel = small_llama(fogzo.ternary(granularity="channel"), activations=TOKEN)
    no(channel, "bitnet", re.escape(f"got ternary per channel, {expected}"), tmp_path)
    head = fogzo.quantize_(
        llama(vocab_size=46), fogzo.ternary(), lambda _, name: name == "lm_head", activations=TOKEN
    )
    no(head, "bitnet", "it has 46 outputs, and 2 bit needs a multiple of 4", tmp_path)


def test_architectures(tmp_path):
    ternary = fogzo.ternary(**F16)
    image_model, plain_model = quantized(vit(), ternary), quantized(mlp(), ternary)
    message = "gguf is written for LlamaForCausalLM only, got ViTForImageClassification: format="
    no(image_model, "gguf", message, tmp_path)
    for format in ("compressed-tensors", "mlx", "bitnet"):
        message = f"the readers of {format} build the network from transformers' config, and Seq"
        no(plain_model, format, message, tmp_path)


def test_a_config_of_another_kind():
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(4, 8), nn.Linear(8, 4))
    model[2].weight = model[1].weight
    fogzo.quantize_(model, fogzo.ternary(), lambda _, name: name == "0")
    for model.config in ({"width": 8}, llama().config):  # of a part, say
        assert check(model, "float") == []
        assert "config, and Sequential is not built from one" in check(model, "mlx")[0]


def test_a_class_that_takes_more_than_a_config(tmp_path):
    class WithHead(type(llama())):
        def __init__(self, config, outputs):
            super().__init__(config)
            self.head = nn.Linear(8, outputs)

    model = quantized(WithHead(llama().config, 4), fogzo.lsq(2))
    assert "config, and WithHead is not built from one" in check(model, "mlx")[0]
    report = export(model, tmp_path / "out", "float")
    assert report.reader == "torch load_state_dict" and report.logits_difference == 0


def test_a_head_of_ones_own(tmp_path):
    for number, outputs in enumerate((96, 4)):  # what the config says, and another number
        model = llama()
        model.lm_head = nn.Sequential(nn.Linear(64, outputs))
        quantized(model, fogzo.lsq(2))
        state = torch.get_rng_state()
        assert "config, and LlamaForCausalLM is not built from one" in check(model, "mlx")[0]
        assert torch.equal(torch.get_rng_state(), state)
        report = export(model, tmp_path / f"{number}", "float")
        assert report.reader == "torch load_state_dict" and report.logits_difference == 0


def test_float64(tmp_path):
    model = fogzo.quantize_(mlp().double(), fogzo.lsq(2))
    no(
        model,
        "onnx",
        r"its weights are float64, whose steps no reader holds: model.float\(\)",
        tmp_path,
    )
    assert check(model, "packed") == check(model, "float") == []


def test_variants(tmp_path):
    model = small_llama(fogzo.ternary(**F16))
    no(
        model,
        "gguf",
        "gguf has no variant 'q9', expected one of tq2_0, q2_k",
        tmp_path,
        variant="q9",
    )
    no(model, "gguf", "Q1_0 cannot hold its 3 levels", tmp_path, variant="q1_0")


def shared(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


@pytest.mark.parametrize("format", ["float", "compressed-tensors", "gguf", "mlx", "bitnet"])
def test_a_module_of_two_names(format, tmp_path):
    model = fogzo.quantize_(shared(llama(num_hidden_layers=2)), fogzo.ternary(**F16), inner_linear)
    message = (
        "'model.layers.1.mlp.gate_proj.weight' is 'model.layers.0.mlp.gate_proj.weight' by another "
        f'name, and the readers of {format} build both .* format="packed" for fogzo.export.load_'
    )
    no(model, format, message, tmp_path)
    assert check(model, "packed") == check(model, "onnx") == check(model, "torchao") == []


def test_a_module_of_two_names_as_packed(tmp_path):
    model = fogzo.quantize_(shared(llama(num_hidden_layers=2)), fogzo.ternary(), inner_linear)
    assert export(model, tmp_path / "out").logits_difference == 0
    with pytest.raises(ValueError, match=r"layers.0.mlp.* by another name, .*fogzo.export.load_"):
        type(model).from_pretrained(tmp_path / "out")
    served = load_(shared(llama(num_hidden_layers=2)), tmp_path / "out")
    assert torch.equal(logits(served), logits(model))


def test_layers_that_quantize_their_input_alone(tmp_path):
    model = mlp()
    fogzo.quantize_(model[1], fogzo.lsq(4), lambda *_: True, fogzo.lsq(2))
    x = torch.randn(3, 64)
    with torch.no_grad(), fogzo.calibrate_(model):
        model(x)
    fogzo.dequantize_(model[1], activations="keep")
    fogzo.quantize_(model, fogzo.lsq(4), lambda _, name: name == "3")
    for format in ("packed", "float"):
        no(model, format, "'1' quantizes its input and no weight, .* format=\"onnx\"", tmp_path)
    assert check(model, "onnx") == check(model, "torchao") == []


def test_state_that_is_no_tensor(tmp_path):
    states = [{"a": 1}]

    class Extra(nn.Linear):
        def get_extra_state(self):
            return states[-1]

        def set_extra_state(self, state):
            pass

    def build():
        return nn.Sequential(Extra(8, 8), nn.Linear(8, 8))

    model = fogzo.quantize_(build(), fogzo.lsq(4), lambda *_: True)
    no(model, "packed", "'0._extra_state' of the model's state is of type dict", tmp_path)
    assert check(model, "onnx") == []
    states.append(torch.ones(1))  # as the message says
    x = torch.randn(3, 8)
    assert export(model, tmp_path / "out", example=x).logits_difference == 0
    assert torch.equal(load_(build(), tmp_path / "out")(x), model(x))


def test_tensors_that_no_llama_has(tmp_path):
    model = llama()
    model.lm_head = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96))
    fogzo.quantize_(model, fogzo.lsq(4, **F16), one_layer)
    no(model, "gguf", "gguf has no name for 'lm_head.0.weight', 'lm_head.0.bias'", tmp_path)
    model = llama()
    model.register_buffer("seen", torch.zeros(1))
    fogzo.quantize_(model, fogzo.lsq(4, **F16), one_layer)
    no(model, "gguf", "gguf has no name for 'seen', which a LlamaForCausalLM", tmp_path)


def test_every_problem_is_told_and_the_first_is_raised(tmp_path):
    model = fogzo.quantize_(llama(), fogzo.lsq(2))
    assert len(check(model, "bitnet")) == 7
    model = quantized(mlp(), fogzo.lsq(2), LSQ8)
    with pytest.raises(ValueError, match=r"cannot write '1' as float: .* \(and 2 more: fogzo"):
        export(model, tmp_path / "out", "float")


def test_groups_in_the_file_and_their_bits():
    weight = Source.of(small_llama(QUANTIZERS["half2"]()), Options()).layers
    weight = next(iter(weight.values())).weight
    (two_bits, *_) = FORMATS["mlx"].types
    assert two_bits.group(weight) == 128
    assert two_bits.bits_per_weight(weight) == 2 + 2 * 32 / 128
    (packed, *_) = (t for t in FORMATS["packed"].types if t.name == "2 bit")
    assert packed.group(weight) is None
    assert packed.bits_per_weight(weight) == 2 + 16 / weight.integers.numel()
    (q2_k,) = FORMATS["gguf"].variants["q2_k"]
    assert q2_k.bits_per_weight(weight) == 2.625
    odd = fogzo.quantize_(nn.Sequential(nn.Linear(20, 4)), fogzo.lsq(2), lambda *_: True)
    weight = Source.of(odd, Options()).layers["0"].weight
    assert FORMATS["onnx"].types[0].group(weight) == 16
