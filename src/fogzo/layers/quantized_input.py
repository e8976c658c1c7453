"""A layer whose own forward sees a quantized input, and how that input's step size is measured.

Estimators never perturb an activation. Its quantizer runs in every forward pass, probes included.
"""

import copy
import math
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fogzo.collectives import full
from fogzo.quantizers import Quantizer, unsigned
from fogzo.quantizers.grids import TIE_MARGIN
from fogzo.quantizers.reading import can_be_read, has_a_value
from fogzo.quantizers.step_sizes import knee_of, loaded_knee, positive_step_size, smallest_step_size
from fogzo.wording import caveat

# What the buffer `input_state` holds, as a float: averages of models (AveragedModel, EMA) round
# integers down, and so turn a 2 into a 1.
UNMEASURED, AS_GIVEN, UNSIGNED = 0, 1, 2


class FloatPhase:
    """Whether layers compute in float for now; see `fogzo.methods.quantize_from`.

    Copies of a layer share it, so that an average of models that was begun in float is quantized
    when its model is. They are known, as each then needs step sizes of its own weights.

    Attributes:
        active: Whether it lasts.
        copies: The layers that were copied from others in it, as long as something holds them.
    """

    def __init__(self, active: bool) -> None:
        self.active = active
        self.copies: WeakSet[Any] = WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FloatPhase":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return FloatPhase, (self.active,)  # copies stay in this process


@dataclass
class _Tally:
    """Statistics of the inputs seen so far, from which a layer's step size and levels follow."""

    count: int = 0
    negative: bool = False
    steps: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, x: Tensor, candidates: tuple[Quantizer, Quantizer], feature_dim: int) -> None:
        """Measure an input for both grids, as a later input may rule one out."""
        steps = torch.stack([quantizer.measure_input(x, feature_dim) for quantizer in candidates])
        # Zeros alone (a layer behind one that starts at zero) and overflows say nothing.
        smallest = smallest_step_size(x.dtype, candidates[0].scale_dtype)
        if bool((steps.isfinite() & (steps >= smallest)).all()):
            self.count += 1
            # Below zero by more than the round-off of a sum that is zero in exact arithmetic.
            self.negative |= bool((x < -TIE_MARGIN * steps[0]).any())
            self.steps = self.steps + steps


class QuantizedInput(nn.Module):
    """Mixed into a layer's class by `quantize_`: quantizes the layer's first positional input.

    The two tensors below decide, whoever wrote to them: a copy that follows the model (EMA, SWA,
    ``load_state_dict``, ``torch.func.functional_call``) quantizes as the model does.

    Attributes:
        input_step: The step size of a fixed scale (a buffer) or learned one (a parameter), or None.
            Infinite until it is measured, so that no average with it passes for one.
        input_step_knee: A buffer beside a learned one, which keeps what is in use positive.
        input_state: A buffer beside it: 0 not measured yet, 1 measured for the grid as given,
            2 measured for the unsigned grid of as many bits.
    """

    weight: nn.Parameter
    input_step: Tensor | None
    input_step_knee: Tensor | None
    input_state: Tensor | None
    _given: Quantizer | None
    _without_negatives: Quantizer | None
    # Whether input_state was once seen to say that it is measured. Where it cannot be read for
    # nothing (on an accelerator, in a compiled graph) that is not asked again: an infinite step
    # makes the output NaN or infinite.
    _was_measured: bool
    _tally: _Tally | None
    _float_phase: FloatPhase | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """See `new_of_class`."""
        return new_of_class(cls, QuantizedInput, args, kwargs)

    @property
    def is_in_float(self) -> bool:
        """Whether neither weight nor input is quantized for now."""
        return self._float_phase is not None and self._float_phase.active

    @property
    def activation_quantizer(self) -> Quantizer | None:
        """The quantizer in use, or None.

        Once measured, its grid is the unsigned one if a scale that is kept saw no negative input.
        """
        state = self.input_state
        if state is None or not has_a_value(state) or round(state.item()) != UNSIGNED:
            return self._given
        return self._without_negatives

    def attach_input(self, quantizer: Quantizer | None) -> None:
        """Begin to quantize inputs; None leaves them alone."""
        quantizer = copy.deepcopy(quantizer)
        self._given = self._without_negatives = quantizer
        self._was_measured, self._tally = False, None
        self.register_buffer("input_step_knee", None)
        if quantizer is None or not quantizer.scale.has_state:
            self.register_buffer("input_step", None)
            self.register_buffer("input_state", None)
            return
        # The same object where nothing takes over, which is how that is known without its state.
        self._without_negatives = _for_unsigned(quantizer)
        value, state = _initial(quantizer)
        weight = self.weight
        step = torch.full((1, 1), value, dtype=weight.dtype, device=weight.device)
        if quantizer.scale.kind == "learned":
            self.register_parameter("input_step", nn.Parameter(step))
            self.input_step_knee = knee_of(step)
        else:
            self.register_buffer("input_step", step)
        self.register_buffer("input_state", torch.tensor(float(state), device=weight.device))
        self._was_measured = state != UNMEASURED

    @property
    def measures_input(self) -> bool:
        """Whether the input's step size is measured once, from inputs, and then kept."""
        given = self._given
        return given is not None and given.scale.has_state and given.scale.value is None

    def begin_tally(self) -> None:
        """Measure every input anew, as the mean over them, until `end_tally`."""
        self._tally = _Tally()

    @property
    def is_tallying(self) -> bool:
        """Whether `begin_tally` was called and `end_tally` was not."""
        return self._tally is not None

    @property
    def tallied(self) -> int:
        """How many inputs a tally has measured."""
        return 0 if self._tally is None else self._tally.count

    def end_tally(self) -> None:
        """Keep what was measured."""
        self._tally = None

    @torch.no_grad()
    def forget_input_step_size_(self) -> None:
        """Measure the input's step size again, in the next training pass or `calibrate_`.

        Dynamic scales and step sizes that were given have nothing to measure.
        """
        if not self.measures_input:
            return
        assert self.input_step is not None and self.input_state is not None
        self.input_step.fill_(math.inf)
        self.input_state.fill_(UNMEASURED)
        self._was_measured = False

    def detach_input(self) -> None:
        """Leave nothing of `attach_input` behind."""
        del self.input_step, self.input_step_knee, self.input_state
        del self._given, self._without_negatives, self._was_measured, self._tally

    def with_quantized_input(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The positional arguments of a forward pass, with the first quantized if it is to be."""
        given = self._given
        if given is None or self.is_in_float:
            return args
        if not args:
            raise ValueError(
                f"{type(self).__name__} quantizes its first positional input but was called with "
                "keywords alone: layer(x), not layer(input=x)"
            )
        x = args[0]
        if x.numel() == 0:  # an expert that no token was sent to
            return args
        # Features are last, before the kernel positions of a convolution; the batch is optional.
        feature_dim = 1 - self.weight.dim()
        step, buffer = self.input_step, self.input_state
        if step is None or buffer is None:
            return given.quantize_input(x, None, feature_dim, self.training), *args[1:]
        state = self._read_state(step, buffer)
        if self._tally is not None or state == UNMEASURED:
            measure = self._measure
            if torch.compiler.is_compiling():
                measure = torch._dynamo.disable(measure)
            state = measure(x, feature_dim)
            if state == UNMEASURED:
                return args
            if not can_be_read(buffer):  # as when gradient checkpointing computes it again
                state = None
        quantizer, is_unsigned = given, None
        if state == UNSIGNED:
            assert self._without_negatives is not None
            quantizer = self._without_negatives
        elif state is None and self._without_negatives is not given:
            is_unsigned = buffer >= (AS_GIVEN + UNSIGNED) / 2
        if (knee := self.input_step_knee) is not None:
            step = positive_step_size(step, knee)
        if state is None and given.scale_dtype is not None:  # rounding would make it finite
            step = torch.where(step.isfinite(), step, math.nan)
        quantized = quantizer.quantize_input(x, step, feature_dim, self.training, is_unsigned)
        return quantized, *args[1:]

    def _read_state(self, step: Tensor, buffer: Tensor) -> int | None:
        """The value of `input_state`; None where it cannot be read at no cost."""
        if torch.compiler.is_compiling():
            return None if self._was_measured or self._is_measured() else UNMEASURED
        if not (can_be_read(buffer) or (not self._was_measured and has_a_value(buffer))):
            return None
        value = buffer.item()
        state = round(value)
        if self._tally is None:
            self._check_levels(value)
            if state != UNMEASURED and not self.training:
                self._check_step(step)
        if self._was_measured != (state != UNMEASURED):
            self._was_measured = state != UNMEASURED
        return state

    def _is_measured(self) -> bool:
        return self.input_state is None or round(self.input_state.item()) != UNMEASURED

    # torch.compiler.assume_constant_result, less its import of a second: the compiler reads the
    # buffer once instead of breaking the graph. `_was_measured`, which it guards, notes a change.
    _is_measured._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _measure(self, x: Tensor, feature_dim: int) -> int:
        """Take an input in; the state that follows."""
        assert self._given is not None and self._without_negatives is not None
        assert self.input_step is not None and self.input_state is not None
        tally = self._tally
        if tally is None:
            # In training, too, zeros pass as they are: in DETR a layer never gets anything else.
            if has_a_value(x) and not bool(x.any()):
                return UNMEASURED
            self._check_may_measure()
            tally = _Tally()
        tally.add(x, (self._given, self._without_negatives), feature_dim)
        if not tally.count:
            return UNMEASURED
        as_given = tally.negative or self._without_negatives is self._given
        assert isinstance(tally.steps, Tensor)
        with torch.no_grad():  # in place, as an optimizer may hold the parameter already
            self.input_step.copy_(tally.steps[0 if as_given else 1] / tally.count)
            if self.input_step_knee is not None:
                self.input_step_knee.copy_(knee_of(self.input_step))
            self.input_state.fill_(AS_GIVEN if as_given else UNSIGNED)
        self._was_measured = True
        return AS_GIVEN if as_given else UNSIGNED

    def _check_may_measure(self) -> None:
        # Not without gradient: a probe would put the buffers back that say it was measured.
        if not (self.training and torch.is_grad_enabled()):
            raise ValueError(
                f"the input of this {type(self).__name__} has no step size yet, which only a "
                "training forward pass with gradients measures by itself. Measure it first: "
                f"with fogzo.calibrate_(model): model(x){caveat('Activations')}"
            )
        if _may_be_distributed():
            raise ValueError(
                f"the input of this {type(self).__name__} has no step size yet, and each rank "
                "would measure its own batch (and FSDP forget it). Measure it before wrapping the "
                "model in DDP or fully_shard, with the same x on every rank: "
                f"with fogzo.calibrate_(model): model(x){caveat('Activations')}"
            )

    def _check_levels(self, state: float) -> None:
        # A tenth is what the last models of a long moving average have left of the first ones.
        if abs(state - round(state)) > 0.1:
            raise ValueError(
                f"this {type(self).__name__} is an average of models whose inputs had different "
                f"levels (input_state is {state:.2f}, between 0 not measured, 1 as given and 2 "
                "unsigned), so its step size means nothing. Begin the average anew after "
                "fogzo.calibrate_(model), or measure the averaged model itself: "
                f"with fogzo.calibrate_(averaged): averaged(x){caveat('Weight averages')}"
            )

    def _check_step(self, step: Tensor) -> None:
        # Not in training, where it is what divergence looks like, and shows in the loss.
        if not (can_be_read(step) or (not self._was_measured and has_a_value(step))):
            return
        value = step.item()
        if not math.isfinite(value):
            raise ValueError(
                f"the step size of this {type(self).__name__}'s input is {value}: it is an average "
                "that began before the model had measured it, or training diverged. Measure the "
                "model first, with fogzo.calibrate_(model): model(x), and then begin the average; "
                "or measure the averaged model itself: with fogzo.calibrate_(averaged): averaged(x)"
                + caveat("Weight averages")
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._given is None or self.input_step is None or self.input_state is None:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        step, state = f"{prefix}input_step", f"{prefix}input_state"
        if f"{prefix}weight" in state_dict and step not in state_dict and state not in state_dict:
            # A float checkpoint knows no inputs: measure them anew instead of keeping stale ones.
            values = _initial(self._given)
            state_dict[step] = torch.full_like(self.input_step, values[0])
            state_dict[state] = torch.full_like(self.input_state, values[1])
        if step in state_dict and state not in state_dict:
            own = full(state_dict[step])  # of one's own: as good as measured
            if has_a_value(own) and bool(own.isfinite().all()):
                state_dict[state] = self.input_state.clamp(min=AS_GIVEN)
        knee = f"{prefix}input_step_knee"
        if self.input_step_knee is not None and step in state_dict and knee not in state_dict:
            loaded = state_dict[step].abs()  # had it crossed zero, no better measure is left
            state_dict[knee] = loaded_knee(full(loaded), self.input_step_knee)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._was_measured = has_a_value(self.input_state) and bool(round(self.input_state.item()))


@cache
def quantized_input_class(plain: Any) -> Any:
    """The class of layers of a class that quantize their inputs alone, the same one each time."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, on a quantized input."""
        return plain.forward(self, *self.with_quantized_input(args), **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _new_quantized_input, (plain,), self.__getstate__()

    members = {"__module__": __name__, "forward": forward, "__reduce_ex__": reduce_ex}
    return type(f"QuantizedInput{plain.__name__}", (QuantizedInput, plain), members)


def plain_class_of(cls: type, mixin: type) -> Any:
    """The class that a mixin was mixed into, whatever other tools mixed in on top."""
    mro = cls.__mro__
    return mro[mro.index(mixin) + 1]


def new_of_class(cls: type, mixin: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What calling the class of a layer with a mixin makes.

    With arguments it is a plain layer: PEFT builds adapters of convolutions by their base's class.
    Without any it is an empty object of the class, as torch and unpickling begin a copy.
    """
    if args or kwargs:
        return plain_class_of(cls, mixin)(*args, **kwargs)
    return object.__new__(cls)


def _new_quantized_input(plain: type) -> Any:
    cls = quantized_input_class(plain)
    return cls.__new__(cls)


def _for_unsigned(quantizer: Quantizer) -> Quantizer:
    """The quantizer that takes over for inputs without a negative value."""
    grid = unsigned(quantizer.grid)
    # A rotation mixes signs, whatever the input's are, and a bell has two sides.
    mixed = quantizer.rotation is not None or quantizer.companding is not None
    if mixed or grid == quantizer.grid:
        return quantizer
    return replace(quantizer, grid=grid)


def _initial(quantizer: Quantizer) -> tuple[float, int]:
    """The step size and state of a layer that has seen no input: one that was given needs none."""
    value = quantizer.scale.value
    return (math.inf, UNMEASURED) if value is None else (value, AS_GIVEN)


def _may_be_distributed() -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return False
    # FSDP, in one process too, frees the gathered parameter that a forward pass would write to.
    return dist.get_world_size() > 1 or "torch.distributed.fsdp" in sys.modules
