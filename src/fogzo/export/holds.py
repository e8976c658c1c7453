"""Whether a format can hold a model: the stored type of each layer, or what stands in the way.

A layer is stored as the first type of its format that holds its grid and fits its shape, and in no
wider integers than its grid needs unless `allow_wider` says so; where there is none, one sentence
says which layer, why and the way out. No format holds numbers that are not finite, or not those of
a quantized layer yet.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from fogzo.export.folder import why_not_saved
from fogzo.export.format_table import FORMATS, Format, StoredType
from fogzo.export.integers import IntegerWeight
from fogzo.export.source import Options, Source, SourceLayer
from fogzo.wording import listed


def problems(source: Source, format: str) -> list[str]:
    """What keeps a model from being written, a sentence each; empty if nothing does."""
    rules = FORMATS[format]
    found = list(_problems_of_model(source, format, rules))
    if not found:
        for layer in source.layers.values():
            chosen = _unready(layer) or _choose(layer, format, rules, source)
            if isinstance(chosen, str):
                found.append(f"cannot write {layer.name or 'the layer'!r} as {format}: {chosen}")
    if not found and (wrong := rules.of_model(source)):
        found.append(wrong)
    return found


def stored(source: Source, name: str, format: str) -> StoredType:
    """The type that a layer is stored as, of a source that has no `problems`."""
    rules = FORMATS[format]
    layers = source.layers.values() if rules.one_type else [source.layers[name]]
    chosen = [_choose(layer, format, rules, source) for layer in layers]
    assert all(isinstance(each, StoredType) for each in chosen), chosen
    widest = max(cast(list[StoredType], chosen), key=lambda each: each.width)
    if not rules.bits_with_inputs or source.layers[name].input is None:
        return widest
    name = f"{widest.name} in int{rules.bits_with_inputs}"
    return replace(widest, name=name, bits=rules.bits_with_inputs)


def step_error(weight: IntegerWeight, format: str) -> float:
    """By how much steps must be rounded to be written, relative to them; usually 0."""
    return min(map(weight.step_change, FORMATS[format].step_dtypes), default=0.0)


def with_rounded_steps(
    weight: IntegerWeight, format: str, variant: str | None = None
) -> IntegerWeight:
    """The weight with steps that the format holds, in the dtype that changes them least."""
    if any(kind.divides for kind in _candidates(FORMATS[format], variant)):
        return weight.with_divisor()
    dtype = min(FORMATS[format].step_dtypes, key=weight.step_change, default=None)
    return weight if dtype is None else weight.round_steps(dtype)


def _problems_of_model(source: Source, format: str, rules: Format) -> Iterator[str]:
    name, variant = type(source.model).__name__, source.options.variant
    if source.experts:
        yield (
            f"{listed(source.experts)} are fused experts, which no format holds yet: "
            "fogzo.dequantize_(model); model.save_pretrained(folder) writes the quantized weights "
            "as float numbers, or leave experts in float with filter_fn"
        )
    if not rules.shares and getattr(source.model, "peft_config", None):
        yield (
            f"the model has adapters of PEFT, of which the readers of {format} know nothing: "
            "model.unload() takes them off, fogzo.integrations.peft.merge_and_unload(model) makes "
            'a float model of both, and format="packed" for fogzo.export.load_ keeps both'
        )
    elif rules.architectures and name not in rules.architectures:
        yield (
            f"{format} is written for {' and '.join(rules.architectures)} only, got {name}: "
            f"{rules.elsewhere}"
        )
    elif rules.reads_config and not source.of_transformers:
        yield (
            f"the readers of {format} build the network from transformers' config, and {name} is "
            f"not built from one: {rules.elsewhere}"
        )
    elif source.of_transformers and not rules.shares:
        for other, first in source.shared().items():
            yield (
                f"{other!r} is {first!r} by another name, and the readers of {format} build both "
                "from transformers' config and would fill one: "
                'format="packed" for fogzo.export.load_, format="onnx", or give the model a copy '
                "of its own"
            )
            break
    if not rules.traces:
        yield from _problems_of_state(source, format)
    if rules.writes_config and (why := why_not_saved(source.model)):
        yield (
            f"transformers refuses to save the model's generation_config ({why:.300}): correct "
            "that, or take the one of its class, model.generation_config = "
            "transformers.GenerationConfig.from_model_config(model.config)"
        )
    if variant is not None and variant not in rules.variants:
        known = f"one of {', '.join(rules.variants)}" if rules.variants else "none"
        yield f"{format} has no variant {variant!r}, expected {known}: leave variant out"


def _problems_of_state(source: Source, format: str) -> Iterator[str]:
    """What a format leaves out that holds tensors and quantized layers alone."""
    for name in source.inputs_alone():
        yield (
            f"{name or 'the layer'!r} quantizes its input and no weight, as "
            f'fogzo.dequantize_(layer, activations="keep") left it, and {format} describes '
            'quantized layers alone: export the model before fogzo.dequantize_, or format="onnx"'
        )
    for key, kind in source.states_without_tensors().items():
        yield (
            f"{key!r} of the model's state is of type {kind}, and {format} holds tensors alone: "
            'let get_extra_state return a tensor, or format="onnx"'
        )
    for key, kind in source.unwritten_tensors().items():
        yield (
            f"{key!r} of the model's state is a tensor of {kind}, and {format} holds dense ones of "
            "up to 64 bits: keep it out of the state, module.register_buffer(name, tensor, "
            "persistent=False), or turn it into such a one"
        )


def _unready(layer: SourceLayer) -> str | None:
    """Why the layer's numbers are none to write, in any format."""
    module = layer.module
    if module.is_in_float:
        return (
            "it is in float until its quantization begins, and its step sizes are not those of its "
            "weights: call switch.advance_() of fogzo.methods.quantize_from after each optimizer "
            "step, to the end of the run"
        )
    earlier = "load weights from before training diverged, model.load_state_dict(earlier)"
    if wrong := _not_finite(module.weight):
        return f"{wrong} weights are not finite: {earlier}"
    # The one in use may be finite although the learned one is not.
    if wrong := _not_finite(layer.weight.scale, module.weight_step):
        return (
            f"{wrong} step sizes are not finite: {earlier}, or measure them on its weights, "
            "fogzo.measure_step_sizes_(model)"
        )
    form = layer.input
    if form is not None and form.measured and _not_finite(form.step, module.input_step):
        return (
            f"the step size of its input is not finite: {earlier}, or measure it, "
            "with fogzo.calibrate_(model): model(x)"
        )
    return None


def _not_finite(*tensors: Tensor | None) -> str | None:
    """How many numbers are not finite, of the first tensor in which any is."""
    for tensor in tensors:
        if tensor is not None and (count := int((~tensor.isfinite()).sum())):
            return f"{count:,} of its {tensor.numel():,}"
    return None


def _choose(layer: SourceLayer, format: str, rules: Format, source: Source) -> StoredType | str:
    """The stored type, or what stands in the way."""
    weight, options = layer.weight, source.options
    if weight.quantizer.rotation is not None and not rules.rotation:
        return (
            f"its weights are rotated (Hadamard), and {format} has no rotation of inputs: "
            'format="packed", format="float" (rotation folded into float weights), or train with '
            "a quantizer that does not rotate, such as fogzo.lsq(2)"
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
            'granularity="channel", or format="packed"'
        )
    if not options.round_steps and (error := step_error(weight, format)):
        dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in rules.step_dtypes)
        return (
            f"its step sizes are no {dtypes} (worst rounding {error:.1e}): train with "
            f"scale_dtype={rules.step_dtypes[0]}, or export with round_steps=True, which keeps the "
            "codes and moves the weights by that much"
        )
    return chosen


def _candidates(rules: Format, variant: str | None) -> tuple[StoredType, ...]:
    return rules.types if variant is None else rules.variants[variant]


def _type_of(layer: SourceLayer, format: str, rules: Format, options: Options) -> StoredType | str:
    weight, grid = layer.weight, layer.weight.quantizer.grid.name
    candidates = _candidates(rules, options.variant)
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
            f'({grid}{half}): train with fewer bits or levels="integer", or format="packed"'
        )
    narrowest = min(t.width for t in holding)
    fitting = [t for t in holding if t.misfit(weight) is None]
    for candidate in fitting:
        if candidate.width == narrowest or options.allow_wider:
            return candidate
    ways_out, wider = ['format="packed"'], ""
    if weight.group_size is not None:
        ways_out.insert(0, 'train with granularity="channel"')
    for name, others in rules.variants.items():
        if (
            others[0].width == narrowest
            and others[0].holds(weight)
            and not others[0].misfit(weight)
        ):
            ways_out.insert(0, f'variant="{name}"')
    if fitting:
        ways_out.insert(0, "allow_wider=True")
        wider = f"; it would take {fitting[0].name}, {fitting[0].bits:g} bits per weight"
    return f"{holding[0].misfit(weight)}{wider}: {', or '.join(ways_out)}"
