"""The table of formats: what each of them stores weights as, and what it cannot say."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fogzo.export.integers import IntegerWeight
from fogzo.export.source import InputForm, Source
from fogzo.quantizers import TERNARY, abs_max
from fogzo.wording import listed

Holds = Callable[[IntegerWeight], bool]


@dataclass(frozen=True)
class StoredType:
    """How a format stores a weight.

    Attributes:
        name: As the format calls it.
        bits: Per weight, without the scales unless `numbers` is 0.
        width: Bits of its integers. A layer takes more than it needs only with `allow_wider`.
        holds: Whether the levels of a weight's grid are among its own.
        block: How many inputs share a scale in the file, which must divide rows and groups; 0
            where the scales are those of the quantizer.
        kinds: Classes of layers.
        outputs_per_byte: How many outputs of one input a byte holds; 1 where bytes hold inputs.
        groups: The group sizes that the file may have, the preferred first; empty where its groups
            are those of the quantizer.
        divides: Whether its reader divides by the reciprocal of the scale, rounded to the weight's
            dtype.
        numbers: How many numbers a group has beside its integers: its scale, and maybe its zero.
        number_bits: Of each of these in the file.
    """

    name: str
    bits: float
    width: int
    holds: Holds
    block: int = 0
    kinds: tuple[type[nn.Module], ...] = (nn.Module,)
    outputs_per_byte: int = 1
    groups: tuple[int, ...] = ()
    numbers: int = 1
    divides: bool = False
    number_bits: Callable[[IntegerWeight], int] = lambda weight: 8 * weight.dtype.itemsize

    def group(self, weight: IntegerWeight) -> int | None:
        """How many inputs share a scale in the file; None if all inputs of an output do."""
        size = weight.group_size or weight.integers.shape[1]
        fitting = [group for group in self.groups if size % group == 0]
        return next(iter([*fitting, *self.groups[-1:]]), weight.group_size)

    def bits_per_weight(self, weight: IntegerWeight) -> float:
        """In the file, with the scales."""
        (outputs, inputs), group = weight.integers.shape, self.group(weight)
        count = weight.scale.numel()
        if self.groups and group is not None:
            count = outputs * math.ceil(inputs / group)
        return self.bits + count * self.numbers * self.number_bits(weight) / (outputs * inputs)

    def misfit(self, weight: IntegerWeight) -> str | None:
        """Why its blocks do not fit the weight's rows or groups."""
        (outputs, inputs), size = weight.integers.shape, weight.group_size
        if outputs % self.outputs_per_byte:
            multiple = self.outputs_per_byte
            return f"it has {outputs} outputs, and {self.name} needs a multiple of {multiple}"
        if self.block and inputs % self.block:
            return f"it has {inputs} inputs, and {self.name} needs a multiple of {self.block}"
        if self.block and size is not None and size % self.block:
            return (
                f"it has the levels {weight.quantizer.grid.name} in groups of {size}, and "
                f"{self.name} shares a step over {self.block}"
            )
        return None


@dataclass(frozen=True)
class Format:
    """A format, as `export` knows it by name.

    Attributes:
        types: Stored types, the preferred first.
        variants: By name, the types to choose from instead.
        rotation: Whether weights may be rotated.
        inputs: Says what is wrong with a layer's quantized input, or None.
        float_inputs: What is wrong with an input in float, or None.
        step_dtypes: Step sizes must be exact in one of them; empty where any will do.
        group_multiple: What groups of inputs must be a multiple of.
        architectures: Classes of models; empty where any will do.
        reads_config: Whether its readers build the model from transformers' config.
        writes_config: Whether its folder holds transformers' config files.
        shares: Whether its file says which names stand for the same tensor.
        traces: Whether it holds whatever the model computes, and not its state by name.
        of_model: Says what is wrong with the model as a whole, or None.
        one_type: Whether all layers are stored as the widest type that one of them needs.
        bits_with_inputs: Of a layer's integers in the file where its input is quantized; 0 where
            that makes no difference.
        float64: Whether weights of float64 keep their precision.
        expected: The only levels that it holds, in words, where these are few.
        elsewhere: Formats for what this one does not hold.
    """

    types: tuple[StoredType, ...]
    variants: Mapping[str, tuple[StoredType, ...]] = field(default_factory=dict)
    rotation: bool = False
    inputs: Callable[[InputForm], str | None] = lambda form: None
    float_inputs: str | None = None
    step_dtypes: tuple[torch.dtype, ...] = ()
    group_multiple: int = 1
    architectures: tuple[str, ...] = ()
    reads_config: bool = False
    writes_config: bool = True
    shares: bool = False
    traces: bool = False
    of_model: Callable[[Source], str | None] = lambda source: None
    one_type: bool = False
    bits_with_inputs: int = 0
    float64: bool = False
    expected: str = ""
    elsewhere: str = 'format="packed" or "onnx"'


def _within(low: int, high: int) -> Holds:
    """Types of integers times a scale."""
    return lambda weight: low <= weight.low and weight.high <= high


def _levels(most: int) -> Holds:
    """Types of evenly spaced levels with a zero anywhere, also between two of them."""
    return lambda weight: weight.num_levels <= most


def _is_plus_minus_one(weight: IntegerWeight) -> bool:
    return (weight.low, weight.high, weight.stride) == (-1, 1, 2)


def _is_bitnet(weight: IntegerWeight) -> bool:
    return weight.quantizer.grid == TERNARY and weight.quantizer.granularity == "tensor"


_WEIGHTS_ALONE = 'activations="drop" exports the weights alone (logits will differ)'


def _no_inputs(what: str) -> Callable[[InputForm], str]:
    def wrong(form: InputForm) -> str:
        return (
            f"its inputs are quantized ({form.quantizer.grid.name}), which {what}: "
            f'{_WEIGHTS_ALONE}, or format="packed" or "onnx"'
        )

    return wrong


def _static_integer_inputs(form: InputForm) -> str | None:
    quantizer, grid = form.quantizer, form.quantizer.grid
    if quantizer.rotation is not None:
        return (
            "its inputs are rotated before they are rounded, which readers of compressed-tensors "
            f'ignore: {_WEIGHTS_ALONE}, or format="packed"'
        )
    if grid.offset:
        first, second = (f"±{grid.spacing * (code + 0.5):g}" for code in range(2))
        return (
            f"its inputs have levels {first}, {second}, and compressed-tensors has integers only: "
            f'train with activations=fogzo.lsq({grid.bits:g}, levels="integer")'
        )
    if not quantizer.scale.has_state:
        return (
            f"its inputs are measured in every forward pass ({grid.name} per "
            f"{quantizer.granularity}), which its readers do by other constants: train with "
            f"activations=fogzo.lsq(8), which keeps its step, {_WEIGHTS_ALONE}, or "
            'format="packed"'
        )
    if grid.low_code == 0:
        return (
            f"its inputs have unsigned levels ({grid.name}), as none was negative, and only "
            f'symmetric ones are written: {_WEIGHTS_ALONE}, or format="packed" or "onnx"'
        )
    if grid.num_levels & (grid.num_levels - 1):
        return (
            f"its inputs have {grid.num_levels} levels ({grid.name}), and compressed-tensors has "
            "whole numbers of bits: train with activations=fogzo.lsq(2, "
            'levels="integer"), or format="packed" or "onnx"'
        )
    return None


def _own_names_are_free(source: Source) -> str | None:
    for name, layer in source.layers.items():
        module = layer.module
        held = (vars(module), module._parameters, module._buffers, module._modules)
        own = set(dir(layer.plain)).union(*held)
        for taken in ("codes", "scales"):  # of `packed.PackedLayer`
            if taken in own:
                return (
                    f"cannot write {name or 'the layer'!r} as packed: its {layer.plain.__name__} "
                    f"has {taken!r} of its own, where packed keeps how the weight is quantized: "
                    f'rename it, self.{taken}_, or format="float" or "onnx"'
                )
    return None


def _one_config_group(source: Source) -> str | None:
    grids = {
        name: None if layer.input is None else layer.input.quantizer.grid
        for name, layer in source.layers.items()
    }
    first, *others = grids
    for name in others:
        if grids[name] != grids[first]:
            one, other = (grid.name if grid else "in float" for grid in (grids[first], grids[name]))
            return (
                f"cannot write {name!r} as compressed-tensors: its inputs are {other} and those of "
                f"{first!r} are {one}, which makes two config groups, and transformers reads the "
                f'first alone: quantize all inputs alike, {_WEIGHTS_ALONE}, or format="packed"'
            )
    widths = {
        name: min(t.width for t in _COMPRESSED if t.holds(layer.weight))
        for name, layer in source.layers.items()
    }
    narrow, wide = min(widths, key=widths.__getitem__), max(widths, key=widths.__getitem__)
    if widths[narrow] < widths[wide] and not source.options.allow_wider:
        return (
            f"cannot write {narrow!r} as compressed-tensors: it needs {widths[narrow]} bits and "
            f"{wide!r} needs {widths[wide]}, and one config group stores all alike: "
            f"allow_wider=True takes {widths[wide]} for all, or quantize them alike, or "
            'format="packed"'
        )
    return None


_OF_LLAMA = re.compile(
    r"(lm_head|model\.(embed_tokens|norm|layers\.\d+\.("
    r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|(input|post_attention)_layernorm"
    r")))\.(weight|bias)"
)


def _llama_cpp_computes_it(source: Source) -> str | None:
    weights = [f"{name}.weight" for name in source.layers]
    unknown = [n for n in (*weights, *source.other_tensors()) if not _OF_LLAMA.fullmatch(n)]
    if unknown:
        return (
            f"gguf has no name for {listed(unknown)}, which a LlamaForCausalLM of transformers has "
            'not: format="packed" or "onnx"'
        )
    config: Any = source.model.config
    rope = config.rope_parameters.get("rope_type", "default")
    if rope != "default":
        return (
            f"the rotary embedding is {rope!r}, and gguf is written for 'default' only: "
            'format="packed" or "onnx"'
        )
    if config.hidden_act != "silu":
        return (
            f"the activation function is {config.hidden_act!r}, and llama.cpp computes 'silu' for "
            'a LLaMA: format="packed" or "onnx"'
        )
    return None


def _is_float32(source: Source) -> str | None:
    for name, layer in source.layers.items():
        if layer.weight.dtype in (torch.bfloat16, torch.float16):
            return (
                f"cannot write {name or 'the layer'!r} as onnx: its weights are "
                f"{layer.weight.dtype}, and onnx is written in float32: model.float(), then export"
            )
    return None


def _divisors_are_finite(source: Source) -> str | None:
    for name, layer in source.layers.items():
        weight = layer.weight
        if source.options.variant != "autobitlinear" and not weight.divisor().isfinite().all():
            return (
                f"cannot write {name or 'the layer'!r} as bitnet: its reader divides by the "
                f"reciprocal of the step size, which exceeds {weight.dtype}: "
                'variant="autobitlinear", whose reader multiplies, or model.float(), then export'
            )
    return None


def _bitnet_inputs(form: InputForm) -> str | None:
    quantizer, expected = form.quantizer, abs_max(8, granularity="token")
    same = (quantizer.grid, quantizer.scale) == (expected.grid, expected.scale)
    if same and quantizer.granularity in ("token", "channel") and quantizer.rotation is None:
        return None
    return _BITNET_INPUTS.format(quantizer.grid.name)


_BITNET_INPUTS = (
    "readers of bitnet round inputs to 8 bits per token, and its are {}: train with "
    f'activations=fogzo.abs_max(8, granularity="token"), or {_WEIGHTS_ALONE}'
)
_LINEAR = (nn.Linear,)
_CONV = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def _gguf(name: str, bits: float, width: int, block: int, holds: Holds) -> StoredType:
    return StoredType(name, bits, width, holds, block, (nn.Linear, nn.Embedding), numbers=0)


_GGUF = (
    _gguf("TQ2_0", 2.0625, 2, 256, _within(-1, 1)),
    _gguf("Q2_K", 2.625, 2, 256, _levels(4)),
    _gguf("Q3_K", 3.4375, 3, 256, _within(-4, 3)),
    _gguf("Q4_0", 4.5, 4, 32, _within(-8, 7)),
    _gguf("Q5_0", 5.5, 5, 32, _within(-16, 15)),
    _gguf("Q8_0", 8.5, 8, 32, _within(-128, 127)),
)
# Smaller, or with smaller blocks, but slow or unknown to some readers: only on request.
_GGUF_ON_REQUEST = (
    _gguf("TQ1_0", 1.6875, 2, 256, _within(-1, 1)),
    _gguf("Q1_0", 1.125, 1, 128, _is_plus_minus_one),
    _gguf("Q2_0", 2.25, 2, 64, lambda w: _within(-2, 1)(w) or _within(-1, 2)(w)),
)


def _signed(name: str, bits: int, kinds: tuple[type[nn.Module], ...] = _LINEAR) -> StoredType:
    return StoredType(name, bits, bits, _within(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), 0, kinds)


def _affine(name: str, bits: int, block: int = 0, groups: tuple[int, ...] = ()) -> StoredType:
    """Levels ``scale * (u - zero)`` with a scale and a zero for each group."""
    return StoredType(name, bits, bits, _levels(2**bits), block, _LINEAR, groups=groups, numbers=2)


def _mlx_bits(weight: IntegerWeight) -> int:
    """16 where a dtype of as many holds scales and biases; see `mlx`."""
    both = torch.cat([weight.step, weight.step * -weight.zero])
    halves = (torch.float16, torch.bfloat16)
    return 16 if any(torch.equal(both.to(half).to(both.dtype), both) for half in halves) else 32


# Larger blocks give zeros in onnxruntime, without an error.
_MATMUL_BLOCKS = (256, 128, 64, 32, 16)
_MATMUL = (
    _affine("MatMulNBits 2", 2, groups=_MATMUL_BLOCKS),
    _affine("MatMulNBits 4", 4, groups=_MATMUL_BLOCKS),
    # Its zero is 128, and no other.
    replace(_signed("MatMulNBits 8", 8), groups=_MATMUL_BLOCKS),
)
_BITNET = StoredType("2 bit", 2, 2, _is_bitnet, 0, _LINEAR, outputs_per_byte=4)
_BITLINEAR = replace(_BITNET, divides=True)
_COMPRESSED = (_signed("W2", 2), _signed("W4", 4), _signed("W8", 8))
_INT4, _INT8 = "DequantizeLinear int4", "DequantizeLinear int8"

FORMATS: Mapping[str, Format] = {
    "packed": Format(
        # As many weights in a byte as fit.
        tuple(
            StoredType(
                f"{8 / count:.3g} bit",
                8 / count,
                levels,
                _levels(levels),
                number_bits=lambda weight: 8 * weight.narrow_step().itemsize,
            )
            for levels, count in ((2, 8), (3, 5), (4, 4), (6, 3), (16, 2), (256, 1))
        ),
        rotation=True,
        shares=True,
        of_model=_own_names_are_free,
        float64=True,
        elsewhere='format="float"',
    ),
    "float": Format(
        (StoredType("float", 32, 32, lambda weight: True, numbers=0),),
        rotation=True,
        inputs=_no_inputs("float weights cannot say"),
        float64=True,
        elsewhere='format="packed"',
    ),
    "compressed-tensors": Format(
        # Other widths changed their layout in 2026 and kept their name: one of two readers is
        # wrong, and neither says so.
        _COMPRESSED,
        one_type=True,
        bits_with_inputs=8,
        inputs=_static_integer_inputs,
        reads_config=True,
        of_model=_one_config_group,
    ),
    "gguf": Format(
        _GGUF,
        variants={t.name.lower(): (t,) for t in (*_GGUF, *_GGUF_ON_REQUEST)},
        inputs=_no_inputs("gguf cannot say; llama.cpp rounds them to 8 bits itself"),
        step_dtypes=(torch.float16,),
        architectures=("LlamaForCausalLM",),
        writes_config=False,
        of_model=_llama_cpp_computes_it,
    ),
    "onnx": Format(
        (*_MATMUL, _signed(_INT4, 4, _CONV), _signed(_INT8, 8, _CONV)),
        variants={
            "nbits": (*_MATMUL, _signed(_INT4, 4, _CONV), _signed(_INT8, 8, _CONV)),
            "qdq": (_signed(_INT4, 4, (*_LINEAR, *_CONV)), _signed(_INT8, 8, (*_LINEAR, *_CONV))),
        },
        group_multiple=16,
        shares=True,
        traces=True,
        writes_config=False,
        of_model=_is_float32,
        elsewhere='format="packed"',
    ),
    "mlx": Format(
        tuple(
            replace(_affine(f"{bits} bit", bits, 32, (128, 64, 32)), number_bits=_mlx_bits)
            for bits in (2, 3, 4, 5, 6, 8)
        ),
        inputs=_no_inputs("mlx cannot say"),
        # Then every product with the step is exact, and the sum of the two is rounded once.
        step_dtypes=(torch.float16, torch.bfloat16),
        reads_config=True,
    ),
    "bitnet": Format(
        (_BITLINEAR,),
        variants={"bitlinear": (_BITLINEAR,), "autobitlinear": (_BITNET,)},
        expected="ternary weights with one step per tensor: train with fogzo.ternary()",
        inputs=_bitnet_inputs,
        float_inputs=_BITNET_INPUTS.format("in float"),
        of_model=_divisors_are_finite,
        reads_config=True,
    ),
    "torchao": Format(
        tuple(_affine(f"int{bits}", bits) for bits in range(1, 9)),
        inputs=_no_inputs("torchao's weight-only layers cannot say"),
        shares=True,
        traces=True,
        writes_config=False,
        elsewhere='format="packed"',
    ),
}
