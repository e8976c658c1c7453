"""What each format can hold: its stored types, and what it cannot say.

`FORMATS` is the table. A layer is stored as the first type of its format that holds its grid and
fits its shape, and in no wider integers than its grid needs; where there is none, one sentence says
which layer, why and the way out.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fogzo.export.integers import IntegerWeight, rounding_error
from fogzo.export.source import InputForm, Options, Source, SourceLayer
from fogzo.quantizers import TERNARY, abs_max

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
        numbers: How many numbers a group has beside its integers: its scale, and maybe its zero.
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

    def group(self, weight: IntegerWeight) -> int | None:
        """How many inputs share a scale in the file; None if all inputs of an output do."""
        size = weight.group_size or weight.integers.shape[1]
        fitting = [group for group in self.groups if size % group == 0]
        return next(iter([*fitting, *self.groups[-1:]]), weight.group_size)

    def bits_per_weight(self, weight: IntegerWeight) -> float:
        """In the file, with the scales."""
        narrow = weight.quantizer.scale_dtype in (torch.float16, torch.bfloat16)
        (outputs, inputs), group = weight.integers.shape, self.group(weight)
        count = weight.scale.numel()
        if self.groups and group is not None:
            narrow, count = False, outputs * math.ceil(inputs / group)
        return self.bits + count * self.numbers * (16 if narrow else 32) / (outputs * inputs)

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
        shares: Whether its file says which names stand for the same tensor.
        of_model: Says what is wrong with the model as a whole, or None.
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
    shares: bool = False
    of_model: Callable[[Source], str | None] = lambda source: None
    float64: bool = False
    expected: str = ""
    elsewhere: str = "--format packed or onnx"


def problems(source: Source, format: str) -> list[str]:
    """What keeps a model from being written, a sentence each; empty if nothing does."""
    rules = FORMATS[format]
    found = list(_problems_of_model(source, format, rules))
    if not found:
        for layer in source.layers.values():
            chosen = _choose(layer, format, rules, source)
            if isinstance(chosen, str):
                found.append(f"cannot write {layer.name or 'the layer'!r} as {format}: {chosen}")
    if not found and (wrong := rules.of_model(source)):
        found.append(wrong)
    return found


def stored(source: Source, name: str, format: str) -> StoredType:
    """The type that a layer is stored as, of a source that has no `problems`."""
    chosen = _choose(source.layers[name], format, FORMATS[format], source)
    assert isinstance(chosen, StoredType), chosen
    return chosen


def step_error(weight: IntegerWeight, format: str) -> float:
    """By how much steps must be rounded to be written, relative to them; usually 0."""
    dtypes = FORMATS[format].step_dtypes
    return min((rounding_error(weight.scale, dtype) for dtype in dtypes), default=0.0)


def _problems_of_model(source: Source, format: str, rules: Format) -> Iterator[str]:
    name, variant = type(source.model).__name__, source.options.variant
    if rules.architectures and name not in rules.architectures:
        yield (
            f"{format} is written for {' and '.join(rules.architectures)} only, got {name}: "
            f"{rules.elsewhere}"
        )
    elif rules.reads_config and not hasattr(source.model, "config"):
        yield (
            f"the readers of {format} build the network from transformers' config, and {name} has "
            f"none: {rules.elsewhere}"
        )
    elif hasattr(source.model, "config") and not rules.shares:
        for other, first in source.shared().items():
            yield (
                f"{other!r} is {first!r} by another name, and the readers of {format} build both "
                "from transformers' config and would fill one: --format packed for "
                "fogzo.export.load_, --format onnx, or give the model a copy of its own"
            )
            break
    if variant is not None and variant not in rules.variants:
        known = f"one of {', '.join(rules.variants)}" if rules.variants else "none"
        yield f"{format} has no variant {variant!r}, expected {known}: leave --variant out"


def _choose(layer: SourceLayer, format: str, rules: Format, source: Source) -> StoredType | str:
    """The stored type, or what stands in the way."""
    weight, options = layer.weight, source.options
    if weight.quantizer.rotation is not None and not rules.rotation:
        return (
            f"its weights are rotated (Hadamard), and {format} has no rotation of inputs: "
            "--format packed, --format float (rotation folded into float weights), or train with "
            "rotation=None"
        )
    if weight.dtype == torch.float64 and not rules.float64:
        return "its weights are float64, whose steps no reader holds: model.float(), then export"
    chosen = _type_of(layer, format, rules, options)
    if isinstance(chosen, str):
        return chosen
    wrong_input = rules.inputs(layer.input) if layer.input is not None else rules.float_inputs
    if wrong_input is not None and (layer.input is not None or options.activations == "keep"):
        return wrong_input
    size = weight.group_size
    if size is not None and size % rules.group_multiple:
        return (
            f"its groups of {size} inputs are no multiple of {rules.group_multiple}: train with "
            'granularity="channel", or --format packed'
        )
    if not options.round_steps and (error := step_error(weight, format)):
        dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in rules.step_dtypes)
        return (
            f"its step sizes are no {dtypes} (worst rounding {error:.1e}): train with "
            f"scale_dtype={rules.step_dtypes[0]}, or export with --round-steps, which keeps the "
            "codes and moves the weights by that much"
        )
    return chosen


def _type_of(layer: SourceLayer, format: str, rules: Format, options: Options) -> StoredType | str:
    weight, grid = layer.weight, layer.weight.quantizer.grid.name
    candidates = rules.types if options.variant is None else rules.variants[options.variant]
    types = [t for t in candidates if issubclass(layer.plain, t.kinds)]
    if not types:
        kinds = dict.fromkeys(kind.__name__ for t in candidates for kind in t.kinds)
        return (
            f"it is of class {layer.plain.__name__}, and {format} holds {', '.join(kinds)} only: "
            f"{rules.elsewhere}"
        )
    holding = [t for t in types if t.holds(weight)]
    if not holding:
        if rules.expected:
            return f"got {grid} per {weight.quantizer.granularity}, expected {rules.expected}"
        half = f", as integers {weight.low} to {weight.high}" if weight.stride == 2 else ""
        return (
            f"{' or '.join(t.name for t in types)} cannot hold its {weight.num_levels} levels "
            f'({grid}{half}): train with fewer bits or levels="integer", or --format packed'
        )
    narrowest = min(t.width for t in holding)
    fitting = [t for t in holding if t.misfit(weight) is None]
    for candidate in fitting:
        if candidate.width == narrowest or options.allow_wider:
            return candidate
    ways_out, wider = ["--format packed"], ""
    if weight.group_size is not None:
        ways_out.insert(0, 'train with granularity="channel"')
    for name, others in rules.variants.items():
        if (
            others[0].width == narrowest
            and others[0].holds(weight)
            and not others[0].misfit(weight)
        ):
            ways_out.insert(0, f"--variant {name}")
    if fitting:
        ways_out.insert(0, "add --allow-wider")
        wider = f"; it would take {fitting[0].name}, {fitting[0].bits:g} bits per weight"
    return f"{holding[0].misfit(weight)}{wider}: {', or '.join(ways_out)}"


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


_WEIGHTS_ALONE = "--activations drop exports the weights alone (logits will differ)"


def _no_inputs(what: str) -> Callable[[InputForm], str]:
    def wrong(form: InputForm) -> str:
        return (
            f"its inputs are quantized ({form.quantizer.grid.name}), which {what}: "
            f"{_WEIGHTS_ALONE}, or --format packed or onnx"
        )

    return wrong


def _static_integer_inputs(form: InputForm) -> str | None:
    quantizer, grid = form.quantizer, form.quantizer.grid
    if quantizer.rotation is not None:
        return (
            "its inputs are rotated before they are rounded, which readers of compressed-tensors "
            f"ignore: {_WEIGHTS_ALONE}, or --format packed"
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
            f"activations=fogzo.lsq(8), which keeps its step, {_WEIGHTS_ALONE}, or --format packed"
        )
    if grid.low_code == 0:
        return (
            f"its inputs have unsigned levels ({grid.name}), as none was negative, and only "
            f"symmetric ones are written: {_WEIGHTS_ALONE}, or --format packed or onnx"
        )
    if grid.num_levels & (grid.num_levels - 1):
        return (
            f"its inputs have {grid.num_levels} levels ({grid.name}), and compressed-tensors has "
            "whole numbers of bits: train with activations=fogzo.lsq(2, "
            'levels="integer"), or --format packed or onnx'
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
                f"first alone: quantize all inputs alike, {_WEIGHTS_ALONE}, or --format packed"
            )
    return None


def _llama_cpp_computes_it(source: Source) -> str | None:
    config: Any = source.model.config
    rope = config.rope_parameters.get("rope_type", "default")
    if rope != "default":
        return (
            f"the rotary embedding is {rope!r}, and gguf is written for 'default' only: --format "
            "packed or onnx"
        )
    if config.hidden_act != "silu":
        return (
            f"the activation function is {config.hidden_act!r}, and llama.cpp computes 'silu' for "
            "a LLaMA: --format packed or onnx"
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


# Larger blocks give zeros in onnxruntime, without an error.
_MATMUL_BLOCKS = (256, 128, 64, 32, 16)
_MATMUL = (
    _affine("MatMulNBits 2", 2, groups=_MATMUL_BLOCKS),
    _affine("MatMulNBits 4", 4, groups=_MATMUL_BLOCKS),
    # Its zero is 128, and no other.
    replace(_signed("MatMulNBits 8", 8), groups=_MATMUL_BLOCKS),
)
_BITNET = StoredType("2 bit", 2, 2, _is_bitnet, 0, _LINEAR, outputs_per_byte=4)
_INT4, _INT8 = "DequantizeLinear int4", "DequantizeLinear int8"

FORMATS: Mapping[str, Format] = {
    "packed": Format(
        # As many weights in a byte as fit.
        tuple(
            StoredType(f"{8 / count:.3g} bit", 8 / count, levels, _levels(levels))
            for levels, count in ((2, 8), (3, 5), (4, 4), (6, 3), (16, 2), (256, 1))
        ),
        rotation=True,
        shares=True,
        float64=True,
        elsewhere="--format float",
    ),
    "float": Format(
        (StoredType("float", 32, 32, lambda weight: True, numbers=0),),
        rotation=True,
        inputs=_no_inputs("float weights cannot say"),
        float64=True,
        elsewhere="--format packed",
    ),
    "compressed-tensors": Format(
        # Other widths changed their layout in 2026 and kept their name: one of two readers is
        # wrong, and neither says so.
        (_signed("W2", 2), _signed("W4", 4), _signed("W8", 8)),
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
        of_model=_is_float32,
        elsewhere="--format packed",
    ),
    "mlx": Format(
        tuple(_affine(f"{bits} bit", bits, 32, (128, 64, 32)) for bits in (2, 3, 4, 5, 6, 8)),
        inputs=_no_inputs("mlx cannot say"),
        # Then every product with the step is exact, and the sum of the two is rounded once.
        step_dtypes=(torch.float16, torch.bfloat16),
        reads_config=True,
    ),
    "bitnet": Format(
        (_BITNET,),
        variants={"bitlinear": (_BITNET,), "autobitlinear": (_BITNET,)},
        expected="ternary weights with one step per tensor: train with fogzo.ternary()",
        inputs=_bitnet_inputs,
        float_inputs=_BITNET_INPUTS.format("in float"),
        reads_config=True,
    ),
    "torchao": Format(
        tuple(_affine(f"int{bits}", bits) for bits in range(1, 9)),
        inputs=_no_inputs("torchao's weight-only layers cannot say"),
        shares=True,
        elsewhere="--format packed",
    ),
}
