"""A layer whose own forward sees quantized weights."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fogzo.collectives import distributed_like, full, is_sharded
from fogzo.layers.experts import layer_name
from fogzo.layers.measured import Measured
from fogzo.layers.quantizable import parametrization, require_module
from fogzo.layers.quantized_input import QuantizedInput, plain_class_of
from fogzo.quantizers import Quantizer
from fogzo.quantizers.experts import ExpertQuantizer
from fogzo.quantizers.reading import has_a_value
from fogzo.quantizers.step_sizes import loaded_knee, positive_step_size
from fogzo.wording import caveat, listed

STEP_NAMES = ("weight_step", "weight_step_knee", "input_step", "input_step_knee", "input_state")
"""Of the tensors that a layer keeps beside its own, as saved networks name them."""

# What became of a buffer that a layer had, as long as another layer has it.
_MOVED: Any = WeakIdKeyDictionary()


class QuantizedLayer(QuantizedInput):
    """Mixed into a layer's class by `quantize_`: the layer's own forward sees quantized weights.

    ``layer.weight`` stays the latent weight, under its own name, so optimizers, checkpoints and
    weight tying are untouched. ``layer.weight_step`` holds the step sizes of fixed scales (a
    buffer) and learned ones (a parameter, which an optimizer may move anywhere: `step_size` is
    positive, by the buffer ``weight_step_knee``). To begin from your own, load them:
    ``layer.load_state_dict({"weight_step": sizes}, strict=False)`` finds the knee that fits. (The
    names ``weight_step`` and ``input_step`` are those of saved networks, and so they stay.)
    """

    quantizer: Quantizer | ExpertQuantizer
    weight: nn.Parameter
    weight_step: Tensor | None
    weight_step_knee: Tensor | None
    output_dim: int
    _name: str  # in the model that `quantize_` was given
    _held_step_size: Tensor | None
    _measured_on: Measured | None = None  # what the step size is of, until the first training pass
    _stale: list[str]  # shared by all layers of a `quantize_`, so that one speaks for them
    _loading: bool = False
    # In which the last forward pass saw the weight, as FSDP gathers it in another. None before.
    _forward_dtype: torch.dtype | None = None
    _weight_was_read: bool = False
    observe_quantized_weight: Callable[[Tensor], None] | None = None
    """Called with the quantized weight of every eager forward pass; no copy of the layer has it."""

    @property
    def forward_ran(self) -> bool:
        """Whether anything has called this layer since it was quantized."""
        return self._forward_dtype is not None

    @property
    def weight_was_read(self) -> bool:
        """Whether a forward pass has used the quantized weight.

        One does not that reads the weight by ``self._parameters``, say, or by a method that was
        bound to the layer before.
        """
        return self._weight_was_read

    def quantized_weight(self) -> Tensor:
        """The weight that the forward pass uses, differentiable by the surrogate."""
        return self.weight if self.is_in_float else self._quantized(self.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, on quantized weights."""
        if not isinstance(self, QuantizedLayer):
            # Wrapped before `dequantize_`, by accelerate's hooks for instance.
            return type(self).forward(self, *args, **kwargs)
        if "weight" not in self._parameters:
            self._check_own_weight()
        tracing = torch.compiler.is_dynamo_compiling()
        if not tracing and args and isinstance(args[0], torch.fx.Proxy):
            self._refuse_symbolic_trace()
        args = self.with_quantized_input(args)
        weight = self.weight_of_forward(tracing)
        if tracing:
            # Only the trace sees this attribute, and unlike a view's it knows whose it is.
            self.__dict__["weight"] = weight
            self.__dict__["_weight_was_read"] = True  # as nobody could tell
            try:
                return super().forward(*args, **kwargs)
            finally:
                del self.__dict__["weight"]
        # Threads may share the layer, so the quantized weight lives on an object of this call's.
        view = object.__new__(_view_class(type(self)))
        object.__setattr__(view, "__dict__", self.__dict__)
        object.__setattr__(view, "_quantized_weight", weight)
        return super(QuantizedLayer, view).forward(*args, **kwargs)

    def weight_of_forward(self, tracing: bool) -> Tensor:
        """`quantized_weight`, where a forward pass is about to use it.

        Args:
            tracing: Whether the compiler records that pass.
        """
        if not tracing and self._measured_on is not None:
            self._warn_if_outdated(self._measured_on)
        self.__dict__["_forward_dtype"] = self.weight.dtype
        weight = self.quantized_weight()
        if not tracing and self.observe_quantized_weight is not None:
            self.observe_quantized_weight(weight)
        return weight

    def step_size(self) -> Tensor:
        """Step sizes in use, broadcastable to the weight.

        If FSDP has sharded the layer, all ranks have to ask for them together, as for `codes`: the
        step sizes, or the weight that they are measured from, are gathered.

        Raises:
            ValueError: If the layer is no longer quantized.
        """
        if not isinstance(self, QuantizedLayer):  # asked by a record from before `dequantize_`
            raise ValueError(
                f"a {type(self).__name__} has no step sizes since fogzo.dequantize_ baked its "
                "quantized weight in: to go on training, bake in a copy, "
                "fogzo.dequantize_(copy.deepcopy(model)), and the model itself after the last step"
            )
        step = self._step()
        # Beside a step size that is kept only the weight's shape matters, so it is not gathered.
        measures = step is None or self.quantizer.companding is not None
        weight = self._whole_weight() if measures else self.weight
        return self.quantizer.step_size(weight, step, self.output_dim)

    def codes(self) -> Tensor:
        """Integer codes of the weight, int8, in the rotated basis if the quantizer rotates."""
        return self.quantizer.codes(self._whole_weight(), self._step(), self.output_dim)

    def in_step_sizes(self) -> Tensor:
        """The weight in step sizes, as it is rounded: see `Quantizer.in_step_sizes`."""
        return self.quantizer.in_step_sizes(self._whole_weight(), self._step(), self.output_dim)

    @contextmanager
    def hold_step_size(self) -> Iterator[None]:
        """Keep the present step sizes although the weight moves (dynamic scales only)."""
        if self.quantizer.scale.has_state:
            yield
            return
        # Not by way of a local variable, which would keep a gathered weight until the end.
        self._held_step_size = self.quantizer.current_step_size(
            self._whole_weight(), None, self.output_dim
        )
        try:
            yield
        finally:
            self._held_step_size = None

    def was_loaded_(self) -> None:
        """Take note of tensors that a loader has put in place itself, without a state dict."""
        self._measured_on = None
        state = self.input_state
        self._was_measured = state is not None and has_a_value(state) and self._is_measured()

    @torch.no_grad()
    def measure_step_size_(self) -> None:
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
        self._check_step_size_shape()
        step = self.quantizer.initial_step_size(self.weight, self.output_dim)
        self.load_state_dict({"weight_step": step}, strict=False)
        self._remember_weight()

    def step_size_mismatch(self) -> float:
        """By how many powers of two (the median) step sizes differ from those measured now.

        Zero where nothing is measured: dynamic scales and what was given.
        """
        if self.weight_step is None or self.quantizer.scale.value is not None:
            return 0.0
        with torch.no_grad():
            weight = self._whole_weight()
            measured = self.quantizer.initial_step_size(weight, self.output_dim)
            step = self._step()
            assert measured is not None and step is not None
            in_use = self.quantizer.current_step_size(weight, full(step))
            ratios = (measured.double() / in_use.double())[measured > 0]  # zeros say nothing
            return float(ratios.log2().abs().median()) if ratios.numel() else 0.0

    def _remember_weight(self) -> None:
        """Remember which weights the step size was measured on."""
        self._measured_on = None
        step = self.weight_step
        if step is None or self.quantizer.scale.value is not None or self.weight.is_inference():
            return
        self._measured_on = Measured.now(self.weight, step)

    def _check_own_weight(self) -> None:
        """Raise a `ValueError` if a parametrization computes the weight."""
        how = parametrization(self)
        if how is not None:
            raise ValueError(
                f"{how.name} was put on {self._name!r} after fogzo.quantize_, so its weight is "
                f"computed and cannot be quantized: {how.way_out}"
            )

    def _check_step_size_shape(self) -> None:
        """Raise a `ValueError` unless there is a step size for each group of weights."""
        if self.weight_step is None:
            return
        expected = self.quantizer.empty_step_size(self.weight, self.output_dim)
        groups = 0 if expected is None else len(expected)
        if len(self.weight_step) != groups:
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
        # On the meta device there are no values to lose, and loaders put the weight in so.
        held = present is not None and not present.is_meta and not self._loading
        if name == "weight" and held and not _same_values(param, present):
            raise ValueError(
                f"the weight of {self._name!r} is quantized with step sizes of its own and cannot "
                "be replaced. Tie, fuse (fuse_conv_bn_eval) or resize before fogzo.quantize_, or "
                "after fogzo.dequantize_(model), which bakes the quantized weights in. To "
                "initialise it anew: with torch.no_grad(): layer.weight.copy_(values); "
                "layer.measure_step_size_()"
            )
        super().register_parameter(name, param)

    def _quantized(self, training: bool) -> Tensor:
        try:
            return self.quantizer.quantize_weight(
                self.weight, self._step(), self.output_dim, training
            )
        except RuntimeError:
            self._check_step_size_shape()
            raise

    def _warn_if_outdated(self, measured: Measured) -> None:
        """Before the first training pass: warn if the weights are not those that were measured.

        Nothing is asked of tensors that `torch.func` lends, nor while a probe runs.
        """
        weight, step = self.weight, self.weight_step
        if not (self.training and torch.is_grad_enabled() and type(weight) is nn.Parameter):
            return
        if step is None or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return
        self._measured_on = None
        if not measured.is_outdated(weight, step):
            return
        self._check_step_size_shape()
        if self.step_size_mismatch() > 1:
            self._stale.append(self._name)
            if len(self._stale) == 1:
                warn_of_stale_step_sizes(self._stale)

    def _step(self) -> Tensor | None:
        """Positive step sizes, outside of a forward pass gathered, if the scale keeps any."""
        if self._held_step_size is not None:
            return self._held_step_size
        step = self.weight_step
        if step is None:
            return None
        step, knee = full(step), self.weight_step_knee
        return step if knee is None else positive_step_size(step, knee)

    def _whole_weight(self) -> Tensor:
        """The weight as a forward pass sees it, outside of one."""
        if not is_sharded(self.weight):
            return self.weight
        weight = full(self.weight)
        return weight.to(self._forward_dtype or weight.dtype)

    def measure_missing_step_size(self, state_dict: dict[str, Any], weight: str, step: str) -> None:
        """Add what a float checkpoint lacks, measured on its weights, so that none stays stale.

        Args:
            state_dict: To be loaded.
            weight: The name that the weight has there.
            step: The name of its step sizes.
        """
        if self.weight_step is None or step in state_dict or weight not in state_dict:
            return
        if state_dict[weight].shape != self.weight.shape:
            return  # as loading will say
        own = full(state_dict[weight]).to(self.weight.dtype)
        measured, empty = self.quantizer.find_step_size(own, self.output_dim)
        assert measured is not None
        state_dict[step] = distributed_like(measured, self.weight_step)
        warn_of_empty_groups(self.quantizer, {self._name: (empty, measured.numel())})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        step = f"{prefix}weight_step"
        self.measure_missing_step_size(state_dict, f"{prefix}weight", step)
        knee = f"{prefix}weight_step_knee"
        if self.weight_step_knee is not None and step in state_dict and knee not in state_dict:
            state_dict[knee] = loaded_knee(full(state_dict[step]), self.weight_step_knee)
        self._loading = True
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            del self._loading
        self._measured_on = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """nn.Module's own, of ``.to(...)``; layers that share a weight go on sharing its steps."""
        held = {name: self._buffers.get(name) for name in ("weight_step", "weight_step_knee")}
        super()._apply(fn, recurse)
        for name, old in held.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new is not old:
                shared = _MOVED.get(old, new)
                alike = (shared.dtype, shared.device) == (new.dtype, new.device)
                # Somebody may have kept the old one, and either may have changed since.
                if not (alike and has_a_value(new) and torch.equal(shared, new)):
                    shared = new
                self._buffers[name] = _MOVED[old] = shared
        return self

    def _replicate_for_data_parallel(self) -> Any:
        # A replica's forward runs for it.
        self.__dict__.update(_forward_dtype=self.weight.dtype, _weight_was_read=True)
        return super()._replicate_for_data_parallel()

    def __prepare_scriptable__(self) -> nn.Module:
        raise ValueError(
            f"torch.jit.script cannot compile {self._name!r}, which is quantized: bake the "
            "quantized weights in first, torch.jit.script(fogzo.dequantize_(model))"
        )

    def _refuse_symbolic_trace(self) -> None:
        raise ValueError(
            f"torch.fx.symbolic_trace cannot follow {self._name!r}, which is quantized: trace the "
            "float model first, traced = torch.fx.symbolic_trace(model), then "
            "fogzo.quantize_(traced, quantizer); or torch.export.export(model, (x,))"
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
        state = self.__getstate__()
        for name in ("observe_quantized_weight", "_measured_on"):
            state.pop(name, None)
        return _new_layer, (plain_class(self),), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._float_phase is not None:
            self._float_phase.copies.add(self)


def require_quantized(model: nn.Module, call: str) -> dict[str, QuantizedLayer]:
    """The quantized layers of a model by name, in the order of its modules.

    Raises:
        ValueError: If it is no module, or nothing in it is quantized; with the corrected call.
    """
    require_module(model, call)
    layers = {
        layer_name(name, module) or "model": module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
    }
    if not layers:
        raise ValueError(
            "nothing in this model is quantized: first call "
            f"fogzo.quantize_(model, fogzo.lsq(bits=2)), then {call}"
        )
    return layers


def warn_of_stale_step_sizes(names: list[str]) -> None:
    """Say that these layers quantize with the step sizes of other weights."""
    warnings.warn(
        f"the weights of {listed(names)} are not of the size that their step sizes were measured "
        "on: initialise them before fogzo.quantize_, or measure again, "
        f"fogzo.measure_step_sizes_(model){caveat('Order of setup')}",
        UserWarning,
        stacklevel=3,
    )


@cache
def quantized_class(plain: Any) -> Any:
    """The class of quantized layers of a class, the same one each time."""
    members: dict[str, Any] = {"__module__": __name__}
    if hasattr(plain, "reset_parameters"):

        def reset_parameters(self: QuantizedLayer) -> None:
            """The layer's own, and step sizes of the new weights."""
            plain.reset_parameters(self)
            self.measure_step_size_()

        members["reset_parameters"] = reset_parameters
    return type(f"Quantized{plain.__name__}", (QuantizedLayer, plain), members)


def _view_class(cls: Any) -> Any:
    """The class of objects that share the state of a layer of this class, but for its weight."""
    if "_view" not in cls.__dict__:
        members = {
            "__module__": __name__,
            "__slots__": ("_quantized_weight",),
            "weight": property(_read_quantized_weight),
        }
        cls._view = type(cls.__name__, (cls,), members)
    return cls.__dict__["_view"]


def _read_quantized_weight(view: Any) -> Tensor:
    view.__dict__["_weight_was_read"] = True
    return view._quantized_weight


def plain_class(layer: nn.Module) -> Any:
    """The class that `quantized_class` was given."""
    return plain_class_of(type(layer), QuantizedInput)


def _new_layer(plain: type) -> nn.Module:
    cls = quantized_class(plain)
    return cast(nn.Module, cls.__new__(cls))


def _same_values(new: Tensor | None, old: Tensor | None) -> bool:
    if new is old or new is None or old is None:
        return new is old
    return new.device == old.device and not old.is_meta and torch.equal(new, old)


def _describe(quantizer: Quantizer | ExpertQuantizer) -> str:
    """A quantizer in the words that a printed model shows."""
    surrogate = getattr(quantizer.surrogate, "name", quantizer.surrogate)
    return (
        f"{quantizer.grid.name}, {quantizer.scale.kind} scale "
        f"per {quantizer.granularity}, {surrogate}"
    )


def warn_of_empty_groups(
    quantizer: Quantizer | ExpertQuantizer, found: Mapping[str, tuple[int, int]]
) -> None:
    """Say which layers have groups without a step size of their own, of how many, and what then."""
    layers = []
    for name, (count, total) in found.items():
        if count:
            layers.append(f"{name!r} ({count} of {total} groups)" if total > 1 else f"{name!r}")
    if not layers:
        return
    grid = quantizer.grid
    zero = f"stay zero on the grid {grid.name}"
    if grid.offset:
        has_two = grid.high_code == grid.low_code + 1  # whose integers are -1 and 0
        other = "fogzo.ternary()" if has_two else 'levels="integer"'
        zero = f"do not stay zero, as {grid.name} has no level there ({other} has one)"
    warnings.warn(
        "no step size can be measured from weights that are zero, or next to nothing beside the "
        f"layer's others: {', '.join(layers)}. Such groups got the median step size of their "
        "layer's other groups; layers without others, that of torch's default initialization. "
        f"Weights of zero {zero}. To leave a layer in float: fogzo.quantize_(model, quantizer, "
        "filter_fn=lambda module, name: name not in {...})" + caveat("Zero weights"),
        stacklevel=3,
    )
