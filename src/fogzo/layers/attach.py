"""Attaching quantizers to a model in place, listing what they quantize, and baking them in."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fogzo.collectives import distributed_like, full, is_sharded, reshard, sharded_dims
from fogzo.layers.activations import Activations, QuantizedInput, activation_quantizers
from fogzo.layers.bypasses import warn_of_bypassed_layers
from fogzo.layers.quantizable import check_quantizable, parametrization, warn_of_own_quantization
from fogzo.layers.selection import (
    FilterFn,
    check_ties,
    output_dim,
    quantizable_layers,
    select_layers,
    warn_of_selection,
)
from fogzo.layers.weights import QuantizedWeight
from fogzo.quantizers import Quantizer, Surrogate
from fogzo.quantizers.steps import knee_of, loaded_knee, positive_step
from fogzo.wording import listed

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
    _name: str  # in the model that `quantize_` was given
    _held_step_size: Tensor | None
    # Of the weight and its step when that was measured, until the first training forward.
    _versions: tuple[int, int, int] | None = None
    _stale: list[str]  # shared by all layers of a `quantize_`, so that one speaks for them
    _loading: bool = False
    # In which the last forward saw the weight: FSDP gathers it in another. None before the first.
    _forward_dtype: torch.dtype | None = None

    @property
    def forward_ran(self) -> bool:
        """Whether anything has called this layer since it was quantized."""
        return self._forward_dtype is not None

    def quantized_weight(self) -> Tensor:
        """The weight that the forward uses, differentiable by the surrogate."""
        return self._quantized(self.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, on quantized weights."""
        if not isinstance(self, QuantizedLayer):
            # Wrapped before `dequantize_`, by accelerate's hooks for instance.
            return type(self).forward(self, *args, **kwargs)
        if "weight" not in self._parameters:
            self._check_own_weight()
        tracing = torch.compiler.is_dynamo_compiling()
        if not tracing and self._versions is not None:
            self._check_versions(self._versions)
        self.__dict__["_forward_dtype"] = self.weight.dtype
        args = self.with_quantized_input(args)
        weight = self.quantized_weight()
        if tracing:
            # Only the trace sees this attribute, and unlike a view's it knows whose it is.
            self.__dict__["weight"] = weight
            try:
                return super().forward(*args, **kwargs)
            finally:
                del self.__dict__["weight"]
        # Threads may share the layer, so the quantized weight lives on an object of this call's.
        view = object.__new__(_view_class(type(self)))
        object.__setattr__(view, "__dict__", self.__dict__)
        object.__setattr__(view, "_quantized_weight", weight)
        return super(QuantizedLayer, view).forward(*args, **kwargs)

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
    def hold_step_size(self) -> Iterator[None]:
        """Keep the present step sizes although the weight moves (dynamic scales only)."""
        if self.quantizer.scale.has_state:
            yield
            return
        # Not by way of a local variable, which would keep a gathered weight until the end.
        self._held_step_size = self.quantizer.current_step(
            self._whole_weight(), None, self.output_dim
        )
        try:
            yield
        finally:
            self._held_step_size = None

    @torch.no_grad()
    def measure_step_(self) -> None:
        """Measure the step sizes on the present weights, as `quantize_` did.

        For weights that were initialised anew. Dynamic scales have nothing to measure.

        Raises:
            ValueError: If FSDP has sharded the layer.
        """
        if self.weight_step is None:
            return
        if is_sharded(self.weight):
            raise ValueError(
                f"{self._name!r} is sharded, and no rank holds the weights to measure: initialise "
                "them first, then fogzo.quantize_(model, quantizer), then fully_shard(model)"
            )
        self._check_step_shape()
        step = self.quantizer.initial_step(self.weight, self.output_dim)
        self.load_state_dict({"weight_step": step}, strict=False)
        self._note_versions()

    def step_mismatch(self) -> float:
        """By how many powers of two (the median) the steps differ from what would be measured now.

        Zero where nothing is measured: dynamic scales and steps that were given.
        """
        if self.weight_step is None or self.quantizer.scale.value is not None:
            return 0.0
        with torch.no_grad():
            weight = self._whole_weight()
            measured = self.quantizer.initial_step(weight, self.output_dim)
            step = self._step()
            assert measured is not None and step is not None
            in_use = self.quantizer.current_step(weight, full(step))
            ratios = (measured.double() / in_use.double())[measured > 0]  # zeros say nothing
            return float(ratios.log2().abs().median()) if ratios.numel() else 0.0

    def _note_versions(self) -> None:
        """Remember which weights the step was measured on."""
        self._versions = None
        step = self.weight_step
        if step is None or self.quantizer.scale.value is not None or self.weight.is_inference():
            return
        self._versions = (id(self.weight), self.weight._version, step._version)

    def _check_own_weight(self) -> None:
        """Raise a `ValueError` if a parametrization computes the weight."""
        how = parametrization(self)
        if how is not None:
            raise ValueError(
                f"{how.name} was put on {self._name!r} after fogzo.quantize_, so its weight is "
                f"computed and cannot be quantized: {how.way_out}"
            )

    def _check_step_shape(self) -> None:
        """Raise a `ValueError` unless there is a step size for each group of weights."""
        shape, by = self.weight.shape, self.quantizer.granularity
        groups = shape.numel() // by if isinstance(by, int) else shape[self.output_dim]
        groups = 1 if by == "tensor" else groups
        if self.weight_step is not None and len(self.weight_step) != groups:
            raise ValueError(
                f"the weight of {self._name!r} has {groups} groups now but {len(self.weight_step)} "
                "step sizes, as its shape was changed after fogzo.quantize_: change it first "
                "(model.resize_token_embeddings(...), pruning), then fogzo.quantize_(model, ...)"
            )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """nn.Module's own, also called by ``layer.weight = ...``; refuses a weight of other values.

        Raises:
            ValueError: If the weight would be replaced.
        """
        present = self._parameters.get("weight")
        held = name == "weight" and not self._loading and present is not None
        if held and not _same_values(param, present):
            raise ValueError(
                f"the weight of {self._name!r} is quantized with step sizes of its own and cannot "
                "be replaced. Tie, fuse (fuse_conv_bn_eval) or resize before fogzo.quantize_, or "
                "after fogzo.dequantize_(model), which bakes the quantized weights in. To "
                "initialise it anew: with torch.no_grad(): layer.weight.copy_(values); "
                "layer.measure_step_()"
            )
        super().register_parameter(name, param)

    def _quantized(self, training: bool) -> Tensor:
        try:
            return self.quantizer(self.weight, self._step(), self.output_dim, training)
        except RuntimeError:
            self._check_step_shape()
            raise

    def _check_versions(self, measured: tuple[int, int, int]) -> None:
        """Before the first training forward: warn if the weights are not those that were measured.

        Nothing is asked of tensors that `torch.func` lends, nor while a probe runs.
        """
        weight, step = self._parameters.get("weight"), self.weight_step
        if not (self.training and torch.is_grad_enabled() and type(weight) is nn.Parameter):
            return
        if step is None or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return
        self._versions = None
        own, weight_version, step_version = measured  # FSDP lends a gathered weight instead
        changed = weight._version != weight_version and step._version == step_version
        if id(weight) == own and changed and self.step_mismatch() > 1:
            self._stale.append(self._name)
            if len(self._stale) == 1:
                warn_of_stale_steps(self._stale)

    def _step(self) -> Tensor | None:
        """Positive step sizes, outside of a forward gathered, if the scale keeps any."""
        if self._held_step_size is not None:
            return self._held_step_size
        step = self.weight_step
        if step is None:
            return None
        step, knee = full(step), self.weight_step_knee
        return step if knee is None else positive_step(step, knee)

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
            _warn_of_empty_groups(self.quantizer, {self._name: (empty, measured.numel())})
        knee = f"{prefix}weight_step_knee"
        if self.weight_step_knee is not None and step in state_dict and knee not in state_dict:
            state_dict[knee] = loaded_knee(full(state_dict[step]), self.weight_step_knee)
        self._loading = True
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            del self._loading
        self._versions = None

    def _replicate_for_data_parallel(self) -> Any:
        self.__dict__["_forward_dtype"] = self.weight.dtype  # a replica's forward runs for it
        return super()._replicate_for_data_parallel()

    def __prepare_scriptable__(self) -> nn.Module:
        raise ValueError(
            f"torch.jit.script cannot compile {self._name!r}, which is quantized: bake the "
            "quantized weights in first, torch.jit.script(fogzo.dequantize_(model))"
        )

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
    which were left alone, and a warning if the default leaves more than half of the weights in
    float or quantizes the last layer.

    Do it before anything else takes hold of the layers: optimizers (which have to train learned
    steps too), ``fully_shard``, ``accelerate.dispatch_model``, `torch.compile`. Initialise, tie
    and prune the weights before.

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
        ValueError: If nothing is selected, a layer is quantized already or cannot be, a weight is
            not finite, or a tied one is selected in one place and not in another. The model is
            then untouched.
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
    layers = quantizable_layers(model)
    selected = select_layers(model, layers, filter_fn)
    one_step = quantizer.granularity == "tensor" and quantizer.rotation is None
    check_ties(layers, selected, one_step)

    # Two passes: every error comes before the first change.
    steps: dict[int, Tensor | None] = {}
    empty_groups: dict[str, tuple[int, int]] = {}
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
            empty_groups[name] = empty, 0 if step is None else step.numel()
    inputs = activation_quantizers(selected, activations)
    # And every warning, as it may be turned into an error.
    warn_of_own_quantization(selected)
    warn_of_selection(model, layers, selected, default=filter_fn is None)
    _warn_of_empty_groups(quantizer, empty_groups)
    stale: list[str] = []
    for name, layer in selected.items():
        _attach(name, layer, quantizer, steps[id(layer.weight)], stale)
        cast(QuantizedLayer, layer).attach_input(inputs[name])
    _leave_fast_path(model)

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
        ValueError: If FSDP has cut a rotated weight along the dimension that is rotated, or a
            parametrization was put on a weight after `quantize_`.
    """
    reshard([model])  # else the outermost module's parameters may be the gathered ones
    shared: dict[int, list[tuple[str, QuantizedLayer]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            module._check_own_weight()
            shared.setdefault(id(module.weight), []).append((name, module))
    return [_record(model, uses[0][0], [layer for _, layer in uses]) for uses in shared.values()]


def dequantize_(model: ModelT) -> ModelT:
    """Bake the quantized weights in and leave a plain model of the original classes.

    Activation quantizers are dropped: the plain layers take their inputs in float. Warns of layers
    that never ran although others did: something else may have read their weights in float.

    Raises:
        ValueError: If nothing in the model is quantized, FSDP has sharded it, weights are offloaded
            or a parametrization was put on one after `quantize_`. The model is then untouched.
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
    for layer in layers:
        layer._check_own_weight()
        if layer.weight.is_meta:
            raise ValueError(
                f"the weight of {layer._name!r} is on the meta device, offloaded: "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True) brings it back"
            )
        layer._check_step_shape()
    warn_of_bypassed_layers(model)
    baked: set[int] = set()
    for layer in layers:
        with torch.no_grad():
            if id(layer.weight) not in baked:
                baked.add(id(layer.weight))
                layer.weight.copy_(layer._quantized(training=False))
        del layer.quantizer, layer.weight_step, layer.weight_step_knee
        del layer.output_dim, layer._held_step_size, layer._name, layer._stale
        for name in ("_forward_dtype", "_versions"):
            layer.__dict__.pop(name, None)
        layer.detach_input()
        cast(nn.Module, layer).__class__ = _plain_class(layer)
    return model


def measure_steps_(model: nn.Module) -> None:
    """Measure the step sizes of all quantized weights again, after initialising them anew."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.measure_step_()


def warn_of_stale_steps(names: list[str]) -> None:
    """Say that these layers quantize with the step sizes of other weights."""
    warnings.warn(
        f"the weights of {listed(names)} are not of the size that their step sizes were measured "
        "on: initialise them before fogzo.quantize_, or measure again, "
        "fogzo.measure_steps_(model)",
        UserWarning,
        stacklevel=3,
    )


@cache
def _quantized_class(plain: Any) -> Any:
    members: dict[str, Any] = {"__module__": __name__}
    if hasattr(plain, "reset_parameters"):

        def reset_parameters(self: QuantizedLayer) -> None:
            """The layer's own, and step sizes of the new weights."""
            plain.reset_parameters(self)
            self.measure_step_()

        members["reset_parameters"] = reset_parameters
    return type(f"Quantized{plain.__name__}", (QuantizedLayer, plain), members)


def _view_class(cls: Any) -> Any:
    """The class of objects that share the state of a layer of this class, but for its weight."""
    if "_view" not in cls.__dict__:
        members = {
            "__module__": __name__,
            "__slots__": ("_quantized_weight",),
            "weight": property(lambda self: self._quantized_weight),
        }
        cls._view = type(cls.__name__, (cls,), members)
    return cls.__dict__["_view"]


def _plain_class(layer: nn.Module) -> type:
    """The class that `_quantized_class` was given, whatever other tools mixed in on top."""
    mro = type(layer).__mro__
    return mro[mro.index(QuantizedInput) + 1]


def _new_layer(plain: type) -> nn.Module:
    cls = _quantized_class(plain)
    return cast(nn.Module, cls.__new__(cls))


def _same_values(new: Tensor | None, old: Tensor | None) -> bool:
    if new is old or new is None or old is None:
        return new is old
    return new.device == old.device and not old.is_meta and torch.equal(new, old)


def _describe(quantizer: Quantizer) -> str:
    """A quantizer in the words that a printed model shows."""
    surrogate = getattr(quantizer.surrogate, "name", quantizer.surrogate)
    return (
        f"{quantizer.grid.name}, {quantizer.scale.kind} scale "
        f"per {quantizer.granularity}, {surrogate}"
    )


def _attach(
    name: str, plain: nn.Module, quantizer: Quantizer, step: Tensor | None, stale: list[str]
) -> None:
    dim = output_dim(plain)
    cls: Any = type(plain)
    plain.__class__ = _quantized_class(cls)
    layer = cast(QuantizedLayer, plain)
    layer.__dict__.pop("forward", None)  # its class's own, as `check_quantizable` made sure
    layer.quantizer = quantizer
    layer.output_dim = dim or 0
    layer._name, layer._stale = name or "model", stale
    layer._held_step_size = None
    layer.weight_step_knee = None
    if isinstance(step, nn.Parameter):
        layer.register_parameter("weight_step", step)
        del layer.weight_step_knee
        layer.register_buffer("weight_step_knee", knee_of(step))
    elif step is not None:
        layer.register_buffer("weight_step", step)
    else:
        layer.weight_step = None
    layer._note_versions()


def _warn_of_empty_groups(quantizer: Quantizer, found: Mapping[str, tuple[int, int]]) -> None:
    """Say which layers have groups without a step size of their own, of how many, and what then."""
    layers = []
    for name, (count, total) in found.items():
        if count:
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
        hold_step_size=nullcontext
        if quantizer.scale.has_state
        else partial(_held_step_sizes, layers),
    )


@contextmanager
def _held_step_sizes(layers: list[QuantizedLayer]) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.hold_step_size())
        yield


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
            "not isinstance(module, fogzo.QuantizedLayer)"
        )
    check_quantizable(name, layer)
