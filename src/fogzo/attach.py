"""Attaching quantizers to a model in place, listing what they quantize, and baking them in."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fogzo.activations import Activations, QuantizedInput, activation_quantizers
from fogzo.collectives import distributed_like, full, is_sharded, reshard, sharded_dims
from fogzo.quantizers import Quantizer, Surrogate
from fogzo.quantizers.steps import knee_of, loaded_knee, positive_step
from fogzo.selection import FilterFn, check_ties, output_dim, select_layers
from fogzo.weights import QuantizedWeight, check_parameter

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


class QuantizedLayer(QuantizedInput):
    """Mixed into a layer's class by `quantize_`: the layer's own forward sees quantized weights.

    ``layer.weight`` stays the latent weight, under its own name, so optimizers, checkpoints and
    weight tying are untouched. ``layer.weight_step`` holds the step sizes of fixed scales (a
    buffer) and learned ones (a parameter, which an optimizer may move anywhere: `step_size` is
    positive, by the buffer ``weight_step_knee``). To begin from steps of your own, load them:
    ``layer.load_state_dict({"weight_step": steps}, strict=False)`` finds the knee that fits.
    """

    quantizer: Quantizer
    weight: nn.Parameter
    weight_step: Tensor | None
    weight_step_knee: Tensor | None
    output_dim: int
    _frozen_step: Tensor | None
    _forward_dtype: torch.dtype | None = None  # in which FSDP gathers the weight

    def quantized_weight(self) -> Tensor:
        """The weight that the forward uses, differentiable by the surrogate."""
        return self.quantizer(self.weight, self._step(), self.output_dim, self.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, on quantized weights."""
        self.__dict__["_forward_dtype"] = self.weight.dtype
        if self.activation_quantizer is not None:
            args = self.with_quantized_input(args)
        # An instance attribute hides the parameter of that name, whatever the class's forward is.
        self.__dict__["weight"] = self.quantized_weight()
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["weight"]

    def step_size(self) -> Tensor:
        """Step sizes in use, broadcastable to the weight.

        Of a layer that FSDP has sharded, all ranks have to ask for them together, as for `codes`:
        the step sizes are gathered, or the weight that they are measured from.
        """
        return self.quantizer.step_size(*self._gathered(), self.output_dim)

    def codes(self) -> Tensor:
        """Integer codes of the weight, int8, in the rotated basis if the quantizer rotates."""
        return self.quantizer.codes(self._whole_weight(), self._step(), self.output_dim)

    @contextmanager
    def frozen_step(self) -> Iterator[None]:
        """Keep the present step sizes although the weight moves (dynamic scales only)."""
        if self.quantizer.scale.has_state:
            yield
            return
        # Not by way of a local variable, which would keep a gathered weight until the end.
        self._frozen_step = self.quantizer.current_step(self._whole_weight(), None, self.output_dim)
        try:
            yield
        finally:
            self._frozen_step = None

    def _step(self) -> Tensor | None:
        """Positive step sizes, outside of a forward gathered, if the scale keeps any."""
        if self._frozen_step is not None:
            return self._frozen_step
        if self.weight_step is None:
            return None
        step = full(self.weight_step)
        return step if self.weight_step_knee is None else positive_step(step, self.weight_step_knee)

    def _whole_weight(self) -> Tensor:
        """The weight as a forward sees it, outside of one."""
        if not is_sharded(self.weight):
            return self.weight
        weight = full(self.weight)
        return weight.to(self._forward_dtype or weight.dtype)

    def _gathered(self) -> tuple[Tensor, Tensor | None]:
        """The weight and all of its step sizes; of the weight only the shape if it has some."""
        step = self._step()
        return (self._whole_weight(), None) if step is None else (self.weight, step)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight, step = state_dict.get(f"{prefix}weight"), f"{prefix}weight_step"
        if self.weight_step is not None and weight is not None and step not in state_dict:
            # A float checkpoint has no step sizes: measure its weights instead of keeping old ones.
            own = full(weight).to(self.weight.dtype)
            measured, empty = self.quantizer.find_step(own, self.output_dim)
            assert measured is not None
            state_dict[step] = distributed_like(measured, self.weight_step)
            _warn_of_empty_groups(self.quantizer, {prefix.removesuffix("."): (empty, self)})
        knee = f"{prefix}weight_step_knee"
        if self.weight_step_knee is not None and step in state_dict and knee not in state_dict:
            state_dict[knee] = loaded_knee(full(state_dict[step]), self.weight_step_knee)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The layer's own, and how it is quantized."""
        return ", ".join(filter(None, (super().extra_repr(), self._description())))

    def __repr__(self) -> str:
        own = super().__repr__()
        # transformers' Conv1D writes its own, without extra_repr.
        description = self._description()
        return own if description in own else f"Quantized{own[:-1]}, {description})"

    def _description(self) -> str:
        own, of_input = _describe(self.quantizer), self.activation_quantizer
        return own if of_input is None else f"{own}; input: {_describe(of_input)}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made on the fly, so pickle must be told how to make it again.
        return _new_layer, (_plain_class(self),), self.__getstate__()


def quantize_(
    model: ModelT,
    quantizer: Quantizer,
    filter_fn: FilterFn | None = None,
    activations: Activations = None,
) -> ModelT:
    """Quantize the weights of a model's layers in place and, if you like, the layers' inputs.

    Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, Embedding and transformers' Conv1D are supported,
    with their subclasses. By default embeddings and output heads stay as they are: layers whose
    name ends in lm_head, classifier, head, fc, score, ... or, where there is none, the last
    linear layer. Printing the model shows which layers are quantized; the ``fogzo`` logger says
    which were left alone.

    Args:
        model: Any module; its layers keep their identity, hooks, names and parameters.
        quantizer: A preset such as ``fogzo.lsq(bits=2)``, or a composed `Quantizer`.
        filter_fn: ``filter_fn(module, name)`` says which supported layers to quantize.
        activations: How the first input of each of these layers is quantized, embeddings apart:
            a preset, or ``activations(module, name)`` that returns one or None. None leaves
            inputs in float. `fixed` and `lsq` measure their step in the first training forward or
            by `calibrate_`, and take unsigned levels where no input is negative (after a ReLU);
            ``levels="unsigned"`` decides that beforehand.

    Returns:
        The same model.

    Warns:
        UserWarning: If weights that share a step size are all zero, or next to nothing beside the
            layer's others: fixed and learned scales then have nothing to measure it from, and take
            it from the layer's other groups.

    Raises:
        ValueError: If nothing is selected, a layer is quantized already or cannot be, or a tied
            weight is selected in one place and not in another. The model is then untouched.
    """
    if not isinstance(quantizer, Quantizer):
        raise ValueError(
            f"quantizer must be a fogzo.Quantizer, got {type(quantizer).__name__}: "
            "for example fogzo.quantize_(model, fogzo.lsq(bits=2))"
        )
    if quantizer.granularity == "token":
        raise ValueError(
            'weights have no tokens, but the quantizer has granularity="token": use "channel", '
            'one step an output channel, for example fogzo.lsq(bits=2, granularity="channel")'
        )
    reshard([model])
    layers = {name: m for name, m in model.named_modules() if output_dim(m) is not None}
    selected = select_layers(model, layers, filter_fn)
    one_step = quantizer.granularity == "tensor" and quantizer.rotation is None
    check_ties(layers, selected, one_step)

    # Two passes: every error comes before the first change.
    steps: dict[int, Tensor | None] = {}
    empty_groups: dict[str, tuple[int, nn.Module]] = {}
    for name, layer in selected.items():
        _check_layer(name, layer)
        if id(layer.weight) not in steps:
            weight, dim = cast(Tensor, layer.weight), output_dim(layer) or 0
            try:
                step, empty = quantizer.find_step(weight, dim)
                quantizer.codes(weight, step, dim)
            except ValueError as error:
                raise ValueError(f"cannot quantize {name!r}: {error}") from None
            if step is not None and quantizer.scale.kind == "learned":
                step = nn.Parameter(step)
            steps[id(layer.weight)] = step
            empty_groups[name] = empty, layer
    inputs = activation_quantizers(selected, activations)
    for name, layer in selected.items():
        _attach(layer, quantizer, steps[id(layer.weight)])
        cast(QuantizedLayer, layer).attach_input(inputs[name])
    _leave_fast_path(model)
    _warn_of_empty_groups(quantizer, empty_groups)

    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        logger.warning("nn.MultiheadAttention bypasses its layers' forward and is not quantized")
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
        ValueError: If FSDP has cut a rotated weight along the dimension that is rotated.
    """
    reshard([model])  # else the outermost module's parameters may be the gathered ones
    shared: dict[int, list[tuple[str, QuantizedLayer]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            shared.setdefault(id(module.weight), []).append((name, module))
    return [_record(model, uses[0][0], [layer for _, layer in uses]) for uses in shared.values()]


def dequantize_(model: ModelT) -> ModelT:
    """Bake the quantized weights in and leave a plain model of the original classes.

    Activation quantizers are dropped: the plain layers take their inputs in float.

    Raises:
        ValueError: If nothing in the model is quantized, or FSDP has sharded it.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    if not layers:
        raise ValueError(
            "nothing in this model is quantized: first call "
            "fogzo.quantize_(model, fogzo.lsq(bits=2))"
        )
    reshard([model])
    if any(is_sharded(layer.weight) for layer in layers):
        raise ValueError(
            "this model is sharded: load its full state_dict into a model that is not, quantized "
            "alike, and call fogzo.dequantize_ on that one"
        )
    baked: set[int] = set()
    for layer in layers:
        with torch.no_grad():
            if id(layer.weight) not in baked:
                baked.add(id(layer.weight))
                layer.weight.copy_(layer.quantizer(layer.weight, layer._step(), layer.output_dim))
        del layer.quantizer, layer.weight_step, layer.weight_step_knee
        del layer.output_dim, layer._frozen_step
        layer.__dict__.pop("_forward_dtype", None)
        layer.detach_input()
        cast(nn.Module, layer).__class__ = _plain_class(layer)
    return model


@cache
def _quantized_class(plain: Any) -> Any:
    return type(f"Quantized{plain.__name__}", (QuantizedLayer, plain), {"__module__": __name__})


def _plain_class(layer: nn.Module) -> type:
    """The class that `_quantized_class` was given, whatever other tools mixed in on top."""
    mro = type(layer).__mro__
    return mro[mro.index(QuantizedInput) + 1]


def _new_layer(plain: type) -> nn.Module:
    cls = _quantized_class(plain)
    return cast(nn.Module, cls.__new__(cls))


def _describe(quantizer: Quantizer) -> str:
    """A quantizer in the words that a printed model shows."""
    surrogate = getattr(quantizer.surrogate, "name", quantizer.surrogate)
    return (
        f"{quantizer.grid.name}, {quantizer.scale.kind} scale "
        f"per {quantizer.granularity}, {surrogate}"
    )


def _attach(plain: nn.Module, quantizer: Quantizer, step: Tensor | None) -> None:
    dim = output_dim(plain)
    cls: Any = type(plain)
    plain.__class__ = _quantized_class(cls)
    layer = cast(QuantizedLayer, plain)
    layer.quantizer = quantizer
    layer.output_dim = dim or 0
    layer._frozen_step = None
    layer.weight_step_knee = None
    if isinstance(step, nn.Parameter):
        layer.register_parameter("weight_step", step)
        del layer.weight_step_knee
        layer.register_buffer("weight_step_knee", knee_of(step))
    elif step is not None:
        layer.register_buffer("weight_step", step)
    else:
        layer.weight_step = None


def _warn_of_empty_groups(quantizer: Quantizer, found: Mapping[str, tuple[int, nn.Module]]) -> None:
    """Say which layers have groups without a step size of their own, and what was done."""
    layers = []
    for name, (count, layer) in found.items():
        if count:
            total = cast(Tensor, layer.weight_step).numel()
            layers.append(f"{name!r} ({count} of {total} groups)" if total > 1 else f"{name!r}")
    if not layers:
        return
    grid = quantizer.grid.name
    zero = f"stay zero on the grid {grid}"
    if quantizer.grid.offset:
        zero = f'do not stay zero, as {grid} has no level there (levels="integer" has one)'
    warnings.warn(
        "no step size can be measured from weights that are zero, or next to nothing beside the "
        f"layer's others: {', '.join(layers)}. Such groups got the median step size of their "
        "layer's other groups; layers without others, that of torch's default initialization. "
        f"Weights of zero {zero}. To leave a layer in float: fogzo.quantize_(model, quantizer, "
        "filter_fn=lambda module, name: name not in {...})",
        stacklevel=3,
    )


def _leave_fast_path(model: nn.Module) -> None:
    """Make transformer encoders call their layers: in eval mode they would read raw weights."""
    for module in model.modules():
        if not any(isinstance(layer, QuantizedLayer) for layer in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch's own mark of a layer without a fast path
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # the format of the fast path alone


def _record(model: nn.Module, name: str, layers: list[QuantizedLayer]) -> QuantizedWeight:
    """The record of one weight and all the layers that share it."""
    layer = layers[0]
    quantizer = layer.quantizer
    full_name = f"{name}.weight" if name else "weight"
    if quantizer.rotation is not None and sharded_dims(layer.weight) - {layer.output_dim}:
        raise ValueError(
            f"{full_name!r} is rotated along its inputs, and no rank holds them all: cut it by "
            "output, fully_shard(..., shard_placement_fn=lambda p: "
            f"Shard({layer.output_dim}) if p is model.{full_name} else None), or quantize it "
            "without rotation"
        )

    @contextmanager
    def frozen_steps() -> Iterator[None]:
        with ExitStack() as stack:
            for sharing in layers:
                stack.enter_context(sharing.frozen_step())
            yield

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
        grid=quantizer.grid,
        held=_padding(layer),
        frozen_step=nullcontext if quantizer.scale.has_state else frozen_steps,
    )


def _padding(layer: nn.Module) -> Tensor | None:
    """Which rows of an embedding are padding, and must stay what they are."""
    index = getattr(layer, "padding_idx", None)
    if not isinstance(layer, nn.Embedding) or index is None:
        return None
    rows = torch.zeros(layer.num_embeddings, 1, dtype=torch.bool)
    rows[index] = True
    return rows


def _check_layer(name: str, layer: nn.Module) -> None:
    if isinstance(layer, QuantizedLayer):
        raise ValueError(
            f"{name!r} is quantized already ({layer.quantizer.grid.name}): start from a fresh "
            "model, or leave it out with filter_fn=lambda module, name: "
            "not isinstance(module, fogzo.attach.QuantizedLayer)"
        )
    check_parameter(f"{name}.weight", layer.weight)
    if is_sharded(cast(Tensor, layer.weight)):
        raise ValueError(
            f"{name!r} is sharded already, and FSDP would not know of its step sizes: "
            "fogzo.quantize_(model, quantizer) first, then fully_shard(model)"
        )
    if getattr(layer, "sparse", False):
        raise ValueError(
            f"{name!r} has sparse gradients, which no rounding passes on: build it with "
            "nn.Embedding(..., sparse=False), or leave it out with filter_fn"
        )
