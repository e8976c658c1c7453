"""Attaching quantizers to a model in place, listing what they quantize, and baking them in."""

import copy
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fogzo.collectives import check_not_flat, is_sharded, reshard, sharded_dims
from fogzo.layers.activations import Activations, activation_quantizers
from fogzo.layers.bypasses import warn_of_bypassed_layers
from fogzo.layers.experts import ExpertMatrices, layer_name
from fogzo.layers.fast_path import give_fast_path_back, leave_fast_path
from fogzo.layers.hosts import check_loaded_as_saved, tell_transformers
from fogzo.layers.padding import moves_padding, padding_rows, warn_of_padding
from fogzo.layers.quantizable import check_quantizable, require_module, warn_of_own_quantization
from fogzo.layers.quantized_experts import attach_matrices_, detach_matrices_, plain_experts_class
from fogzo.layers.quantized_input import QuantizedInput, quantized_input_class
from fogzo.layers.quantized_layer import (
    QuantizedLayer,
    plain_class,
    quantized_class,
    require_quantized,
    warn_of_empty_groups,
)
from fogzo.layers.selection import (
    FilterFn,
    check_ties,
    output_dim,
    quantizable_layers,
    select_layers,
    warn_of_selection,
    without_adapters,
)
from fogzo.layers.weights import QuantizedWeight, inputs_of_an_output
from fogzo.quantizers import Quantizer, Surrogate
from fogzo.quantizers.experts import ExpertQuantizer
from fogzo.quantizers.grids import uniform
from fogzo.quantizers.step_sizes import knee_of
from fogzo.wording import caveat, listed

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


def quantize_(
    model: ModelT,
    quantizer: Quantizer,
    filter_fn: FilterFn | None = None,
    activations: Activations = None,
) -> ModelT:
    """Quantize the weights of a model's layers in place and, if you like, the layers' inputs.

    Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, Embedding and transformers' Conv1D are supported,
    with their subclasses, and the parameters of fused experts, of one matrix per expert. By default
    embeddings, adapters of PEFT and output heads stay as they are: layers whose name ends in
    lm_head, classifier, head, fc, score, ... or, where there is none, the last linear layer.
    Printing the model shows which layers are quantized; the ``fogzo`` logger says which were left
    alone, and a warning if the default leaves more than half of the weights in float or quantizes
    the last layer.

    Do it before anything else takes hold of the layers: optimizers (which have to train learned
    step sizes too), ``fully_shard``, ``accelerate.dispatch_model``, `torch.compile`. Initialise,
    tie and prune the weights before.

    Args:
        model: Any module; its layers keep their identity, hooks, names and parameters.
        quantizer: A preset such as ``fogzo.lsq(bits=2)``, or a composed `Quantizer`.
        filter_fn: ``filter_fn(module, name)`` says which supported layers to quantize.
        activations: How the first input of each of these layers is quantized, embeddings apart:
            a preset, or ``activations(module, name)`` that returns one or None. None leaves
            inputs in float, as those of fused experts always are. `fixed`, `lsq` and `bbq` measure
            theirs in the first training pass or by `calibrate_`; the first two take unsigned levels
            where no input is negative (after a ReLU), as ``levels="unsigned"`` does beforehand.

    Returns:
        The same model.

    Warns:
        UserWarning: If weights that share a step size are all zero, or next to nothing beside the
            layer's others: fixed and learned scales then have nothing to measure it from, and take
            it from the layer's other groups. Also if the padding of an embedding is zero and would
            not stay so.

    Raises:
        ValueError: If an argument is of another kind, torch.inference_mode() is on, nothing is
            selected, a layer is quantized already or cannot be, a weight is not finite, or a tied
            one is selected in one place and not, or cannot be, in another. The model is then
            untouched.
    """
    require_module(model, "fogzo.quantize_(model, fogzo.lsq(bits=2))")
    check_weight_quantizer(quantizer)
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "step sizes that are made under torch.inference_mode() can never be trained: call "
            "fogzo.quantize_(model, quantizer) outside of it, or under torch.no_grad()"
        )
    check_loaded_as_saved(model)
    reshard([model])
    layers = quantizable_layers(model)
    if filter_fn is None:
        layers = without_adapters(model, layers)
    selected = select_layers(model, layers, filter_fn)
    check_ties(model, layers, selected, has_one_step(quantizer))

    # Two passes: every error comes before the first change.
    steps: dict[int, KeptSteps] = {}
    empty_groups: dict[str, tuple[int, int]] = {}
    padded: list[str] = []
    for name, layer in selected.items():
        _check_layer(name, layer)
        if id(layer.weight) not in steps:
            weight, dim = cast(Tensor, layer.weight), output_dim(layer) or 0
            try:
                own = quantizer_for(layer, quantizer)
                step, empty = own.find_step_size(weight, dim)
                own.codes(weight, step, dim)
                if not empty and moves_padding(layer, own, step):  # else said of empty groups
                    padded.append(name)
            except ValueError as error:
                raise ValueError(f"cannot quantize {name!r}: {error}") from None
            steps[id(layer.weight)] = kept_steps(quantizer, step, weight.requires_grad)
            empty_groups[name] = empty, 0 if step is None else step.numel()
    inputs = activation_quantizers(selected, activations)
    # And every warning, as it may be turned into an error.
    warn_of_own_quantization(selected)
    warn_of_selection(model, layers, selected, default=filter_fn is None)
    warn_of_empty_groups(quantizer, empty_groups)
    warn_of_padding(padded)
    stale: list[str] = []
    for name, layer in selected.items():
        attach_(name, layer, quantizer, steps[id(layer.weight)], stale)
        cast(QuantizedLayer, layer).attach_input(inputs[name])
    leave_fast_path(model)
    tell_transformers(model)

    left = [name for name in layers if name not in selected]
    logger.info("quantized %s; left alone %s", ", ".join(selected), ", ".join(left) or "nothing")
    return model


def quantized_weights(model: nn.Module) -> list[QuantizedWeight]:
    """The quantized weights of a model, tied ones once, in the order of its modules.

    Call it after ``fully_shard(model)``, which replaces the parameters.

    Returns:
        Records with ``.name``, ``.param`` (latent), ``.step_size()`` and ``.surrogate``; they
        also read out ``.codes()``.

    Raises:
        ValueError: If FSDP has cut a rotated weight along the dimension that is rotated, FSDP1 has
            sharded a weight, or a parametrization was put on one after `quantize_`.
    """
    require_module(model, "fogzo.quantized_weights(model)")
    reshard([model])  # else the outermost module's parameters may be the gathered ones
    shared: dict[int, list[tuple[str, QuantizedLayer]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            module._check_own_weight()
            shared.setdefault(id(module.weight), []).append((layer_name(name, module), module))
    if not shared:
        check_loaded_as_saved(model)
    return [_record(model, uses[0][0], [layer for _, layer in uses]) for uses in shared.values()]


def dequantize_(model: ModelT, activations: Literal["drop", "keep"] | None = None) -> ModelT:
    """Bake the quantized weights in and leave a plain model of the original classes.

    Warns of layers whose quantized weight no forward pass used although the model ran: something
    may have read it in float.

    Args:
        model: Quantized.
        activations: Whether layers that quantize their inputs go on doing so (``"keep"``; they
            keep a class of their own) or take them in float (``"drop"``). By default they take
            them in float, and the ``fogzo`` logger says so.

    Raises:
        ValueError: If nothing in the model is quantized, FSDP has sharded it, weights are offloaded
            or a parametrization was put on a layer after `quantize_`. The model is then untouched.
    """
    if activations not in ("drop", "keep", None):
        raise ValueError(
            f'activations must be "drop" or "keep", got {activations!r}: '
            'fogzo.dequantize_(model, activations="keep")'
        )
    layers = list(require_quantized(model, "fogzo.dequantize_(model)").values())
    reshard([model])
    if any(is_sharded(layer.weight) for layer in layers):
        raise ValueError(
            "this model is sharded: load its full state_dict into a model that is not, quantized "
            f"alike, and call fogzo.dequantize_ on that one{caveat('FSDP2')}"
        )
    for layer in layers:
        layer._check_own_weight()
        _check_other_parameters(layer)
        if layer.weight.is_meta:
            raise ValueError(
                f"the weight of {layer._name!r} is on the meta device, offloaded: "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True) brings it back"
            )
        layer._check_step_size_shape()
        if layer.is_in_float:
            raise ValueError(
                f"{layer._name!r} is in float until its quantization begins, and its step sizes "
                "are not those of its weights: call switch.advance_() of fogzo.methods."
                "quantize_from after each optimizer step, to the end of the run"
            )
    warn_of_bypassed_layers(model)
    with_input = [layer._name for layer in layers if layer.activation_quantizer is not None]
    if with_input and activations is None:
        logger.warning(
            "the inputs of %s are no longer quantized, and the outputs differ from those that were "
            'trained: activations="keep" keeps them quantized, activations="drop" says that this '
            "is meant",
            listed(with_input),
        )
    baked: set[int] = set()
    for layer in layers:
        keeps_input = activations == "keep" and layer.activation_quantizer is not None
        with torch.no_grad():
            if id(layer.weight) not in baked:
                baked.add(id(layer.weight))
                layer.weight.copy_(layer._quantized(training=False))
        del layer.quantizer, layer.weight_step, layer.weight_step_knee
        del layer.output_dim, layer._held_step_size, layer._name, layer._stale
        own = ("_forward_dtype", "_weight_was_read", "_measured_on", "_float_phase")
        for name in (*own, "observe_quantized_weight"):
            layer.__dict__.pop(name, None)
        if keeps_input:
            cast(nn.Module, layer).__class__ = quantized_input_class(plain_class(layer))
            continue
        layer.detach_input()
        if isinstance(layer, ExpertMatrices):
            detach_matrices_(layer)
        cast(nn.Module, layer).__class__ = plain_class(layer)
    give_fast_path_back(model)
    tell_transformers(model)
    return model


def measure_step_sizes_(model: nn.Module) -> None:
    """Measure the step sizes of all quantized weights again, after initialising them anew.

    Raises:
        ValueError: If nothing in the model is quantized, or FSDP has sharded it.
    """
    for layer in require_quantized(model, "fogzo.measure_step_sizes_(model)").values():
        layer.measure_step_size_()


def quantizer_for(layer: nn.Module, quantizer: Quantizer) -> Quantizer | ExpertQuantizer:
    """The quantizer of a layer's weight, made of the one that was given."""
    if isinstance(layer, ExpertMatrices):
        return ExpertQuantizer(quantizer, layer.transposed)
    return quantizer


def check_weight_quantizer(quantizer: object) -> None:
    """Raise a `ValueError` unless it is a quantizer of weights."""
    if not isinstance(quantizer, Quantizer):
        raise ValueError(
            f"quantizer must be a fogzo.Quantizer, got {type(quantizer).__name__}: "
            "for example fogzo.quantize_(model, fogzo.lsq(bits=2))"
        )
    if quantizer.granularity == "token":
        raise ValueError(
            'weights have no tokens, but the quantizer has granularity="token": use "channel", '
            'one per output channel, for example fogzo.lsq(bits=2, granularity="channel")'
        )
    if any(quantizer.grid == uniform(bits, "unsigned") for bits in range(1, 9)):
        raise ValueError(
            f"the levels of {quantizer.grid.name} are for inputs that are never negative, and "
            "weights are: fogzo.quantize_(model, fogzo.lsq(2), "
            'activations=fogzo.lsq(2, levels="unsigned"))'
        )


def has_one_step(quantizer: Quantizer) -> bool:
    """Whether all of a weight has one step size, whichever dimension holds its outputs."""
    return quantizer.granularity == "tensor" and quantizer.rotation is None


class KeptSteps(NamedTuple):
    """What layers keep of step sizes, all that are tied the same tensors.

    Attributes:
        step: Of shape (groups, 1); a parameter if they are learned, None if they are dynamic.
        knee: Of learned ones, see `positive_step_size`.
    """

    step: Tensor | None
    knee: Tensor | None


def kept_steps(quantizer: Quantizer, step: Tensor | None, requires_grad: bool = True) -> KeptSteps:
    """Step sizes as layers keep them."""
    if step is None or quantizer.scale.kind != "learned":
        return KeptSteps(step, None)
    return KeptSteps(nn.Parameter(step, requires_grad=requires_grad), knee_of(step))


def attach_(
    name: str, plain: nn.Module, quantizer: Quantizer, kept: KeptSteps, stale: list[str]
) -> None:
    """Make one layer quantize its weight.

    Args:
        name: What messages call it.
        plain: The layer, checked.
        quantizer: Of its weight.
        kept: Its step sizes.
        stale: Shared by the layers that are attached together.
    """
    dim = output_dim(plain)
    cls: Any = type(plain)
    plain.__class__ = quantized_class(cls)
    layer = cast(QuantizedLayer, plain)
    layer.__dict__.pop("forward", None)  # its class's own, as `check_quantizable` made sure
    # One of its own, as the compiler takes no float of an object that two layers share.
    layer.quantizer = copy.deepcopy(quantizer_for(plain, quantizer))
    layer.output_dim = dim or 0
    layer._name, layer._stale = name or "model", stale
    layer._held_step_size = None
    if isinstance(kept.step, nn.Parameter):
        layer.register_parameter("weight_step", kept.step)
        layer.register_buffer("weight_step_knee", kept.knee)
    else:
        layer.weight_step_knee = None
        if kept.step is None:
            layer.weight_step = None
        else:
            layer.register_buffer("weight_step", kept.step)
    if isinstance(layer, ExpertMatrices):
        attach_matrices_(layer)
    if not layer.weight.is_meta:
        layer._remember_weight()


def _record(model: nn.Module, name: str, layers: list[QuantizedLayer]) -> QuantizedWeight:
    """The record of one weight and all the layers that share it."""
    layer = layers[0]
    quantizer = layer.quantizer
    of_experts = isinstance(layer, ExpertMatrices)
    full_name = name if of_experts else f"{name}.weight".lstrip(".")
    check_not_flat(full_name, layer.weight)
    if quantizer.rotation is not None and sharded_dims(layer.weight) - {layer.output_dim}:
        raise ValueError(
            f"{full_name!r} is rotated along its inputs, and no rank holds them all: cut it by "
            "output, fully_shard(..., shard_placement_fn=lambda p: "
            f"Shard({layer.output_dim}) if p is model.{full_name} else None), or quantize it "
            "without rotation"
        )

    return QuantizedWeight(
        name=full_name,
        param=layer.weight,
        step_size=layer.step_size,
        surrogate=cast(Surrogate, quantizer.surrogate),
        model=model,
        rotate=None
        if quantizer.rotation is None
        else partial(quantizer.rotate, output_dim=layer.output_dim),
        codes=layer.codes,
        grid=quantizer.grid if quantizer.companding is None else None,
        held=padding_rows(layer),
        of_experts=of_experts,
        hold_step_size=nullcontext
        if quantizer.scale.has_state
        else partial(_held_step_sizes, layers),
        has_constant_step_size=quantizer.scale.kind == "fixed",
        fan_in=_fan_in(layer),
    )


def _fan_in(layer: QuantizedLayer) -> int:
    """How many inputs an output of a layer has."""
    if isinstance(layer, ExpertMatrices):
        return layer.weight.shape[1 if layer.transposed else 2]
    return inputs_of_an_output(layer.weight, layer.output_dim, getattr(layer, "groups", 1))


@contextmanager
def _held_step_sizes(layers: list[QuantizedLayer]) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.hold_step_size())
        yield


def _check_other_parameters(layer: QuantizedLayer) -> None:
    """Raise a `ValueError` if the layer's own class does not know what computes a parameter."""
    module, plain = cast(nn.Module, layer), plain_class(layer)
    if isinstance(layer, ExpertMatrices):
        module, plain = layer.experts, plain_experts_class(layer.experts)
    for name in getattr(module, "parametrizations", ()):
        # Torch's class with the property that computes it lies on top of the quantized layer's.
        if not isinstance(getattr(plain, name, None), property):
            raise ValueError(
                f"a parametrization was put on {name!r} of {layer._name!r} after fogzo.quantize_ "
                "and would be lost: torch.nn.utils.parametrize.remove_parametrizations("
                f'layer, "{name}") first'
            )


def _check_layer(name: str, layer: nn.Module) -> None:
    if isinstance(layer, QuantizedLayer):
        raise ValueError(
            f"{name!r} is quantized already ({layer.quantizer.grid.name}): start from a fresh "
            "model, or name what is to be quantized now, filter_fn=lambda module, name: "
            "name in {...}; a filter replaces the default one, which leaves the head in float"
        )
    if isinstance(layer, QuantizedInput):
        raise ValueError(
            f'{name!r} still quantizes its input, as dequantize_(model, activations="keep") left '
            "it: start from a model of which nothing is quantized, such as "
            'fogzo.dequantize_(model, activations="drop") makes'
        )
    check_quantizable(name, layer)
