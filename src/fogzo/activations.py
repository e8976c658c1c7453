"""Activation quantization: the inputs of quantized layers, and how their step sizes are measured.

Estimators never perturb an activation. Its quantizer runs in every forward, probes included.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fogzo.collectives import full, is_sharded
from fogzo.quantizers import Quantizer, unsigned
from fogzo.quantizers.steps import knee_of, loaded_knee, positive_step, smallest_step

logger = logging.getLogger(__name__)

Activations = Quantizer | Callable[[nn.Module, str], Quantizer | None] | None

# What the buffer `input_state` holds.
UNMEASURED, AS_GIVEN, UNSIGNED = 0, 1, 2


@dataclass
class _Tally:
    """What the inputs seen so far say of a layer's step and of its levels."""

    count: int = 0
    negative: bool = False
    steps: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, x: Tensor, candidates: tuple[Quantizer, Quantizer], feature_dim: int) -> None:
        """Measure an input for both grids, as a later input may rule one out."""
        steps = torch.stack([quantizer.measure_input(x, feature_dim) for quantizer in candidates])
        # Zeros alone (a layer behind one that starts at zero) and overflows say nothing.
        smallest = smallest_step(x.dtype, candidates[0].scale_dtype)
        if bool((steps.isfinite() & (steps >= smallest)).all()):
            self.count += 1
            self.negative |= bool((x < 0).any())
            self.steps = self.steps + steps


class QuantizedInput(nn.Module):
    """Mixed into a layer's class by `quantize_`: quantizes the layer's first positional input.

    Attributes:
        activation_quantizer: The quantizer in use, or None. Once measured, its grid is the
            unsigned one if a step is kept and no input was negative.
        input_step: The step of a fixed scale (a buffer) or learned one (a parameter), else None.
        input_step_knee: A buffer beside a learned step, which keeps the step in use positive.
        input_state: A buffer beside it: 0 not measured yet, 1 measured for the grid as given,
            2 measured for the unsigned grid of as many bits.
    """

    weight: nn.Parameter
    activation_quantizer: Quantizer | None
    input_step: Tensor | None
    input_step_knee: Tensor | None
    input_state: Tensor | None
    _given: Quantizer | None
    # Mirrors input_state, together with activation_quantizer: reading a buffer would make every
    # forward wait for the device, and break the compiler's graph.
    _measured: bool
    _tally: _Tally | None

    def attach_input(self, quantizer: Quantizer | None) -> None:
        """Begin to quantize inputs; None leaves them alone."""
        self.activation_quantizer = self._given = quantizer
        self._measured, self._tally = True, None
        self.register_buffer("input_step_knee", None)
        if quantizer is None or not quantizer.scale.has_state:
            self.register_buffer("input_step", None)
            self.register_buffer("input_state", None)
            return
        value, state = _initial(quantizer)
        weight = self.weight
        step = torch.full((1, 1), value, dtype=weight.dtype, device=weight.device)
        if quantizer.scale.kind == "learned":
            self.register_parameter("input_step", nn.Parameter(step))
            self.input_step_knee = knee_of(step)
        else:
            self.register_buffer("input_step", step)
        self.register_buffer(
            "input_state", torch.tensor(state, dtype=torch.int8, device=weight.device)
        )
        self._mirror(state)

    def detach_input(self) -> None:
        """Leave nothing of `attach_input` behind."""
        del self.activation_quantizer, self.input_step, self.input_step_knee, self.input_state
        del self._given, self._measured, self._tally

    def with_quantized_input(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The positional arguments of a forward, the first of them quantized."""
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
        if self._tally is not None or not self._measured:
            self._measure(x, feature_dim)
            if not self._measured:
                return args
        assert self.activation_quantizer is not None
        quantize = self.activation_quantizer.quantize_input
        step, knee = self.input_step, self.input_step_knee
        if step is not None and knee is not None:
            step = positive_step(step, knee)
        return quantize(x, step, feature_dim, self.training), *args[1:]

    def _measure(self, x: Tensor, feature_dim: int) -> None:
        assert self._given is not None
        assert self.input_step is not None and self.input_state is not None
        tally = self._tally
        if tally is None:
            self._check_may_measure()
            tally = _Tally()
        without_negatives = _for_unsigned(self._given)
        tally.add(x, (self._given, without_negatives), feature_dim)
        if not tally.count:
            return
        as_given = tally.negative or without_negatives is self._given
        assert isinstance(tally.steps, Tensor)
        with torch.no_grad():  # in place, as an optimizer may hold the parameter already
            self.input_step.copy_(tally.steps[0 if as_given else 1] / tally.count)
            if self.input_step_knee is not None:
                self.input_step_knee.copy_(knee_of(self.input_step))
            self.input_state.fill_(AS_GIVEN if as_given else UNSIGNED)
        self._mirror(AS_GIVEN if as_given else UNSIGNED)

    def _check_may_measure(self) -> None:
        # Not without gradient: a probe would put the buffers back that say it was measured.
        if not (self.training and torch.is_grad_enabled()):
            raise ValueError(
                f"the input of this {type(self).__name__} has no step size yet, which only a "
                "training forward with gradients measures by itself. Measure it first: "
                "with fogzo.calibrate_(model): model(x)"
            )
        if _may_be_distributed():
            raise ValueError(
                f"the input of this {type(self).__name__} has no step size yet, and each rank "
                "would measure its own batch (and FSDP forget it). Measure it before wrapping the "
                "model in DDP or fully_shard, with the same x on every rank: "
                "with fogzo.calibrate_(model): model(x)"
            )

    def _mirror(self, state: int) -> None:
        assert self._given is not None
        self._measured = state != UNMEASURED
        self.activation_quantizer = _for_unsigned(self._given) if state == UNSIGNED else self._given

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._given is None or self.input_step is None or self.input_state is None:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        step, state = f"{prefix}input_step", f"{prefix}input_state"
        if f"{prefix}weight" in state_dict and step not in state_dict and state not in state_dict:
            # A float checkpoint knows no inputs: measure them anew instead of keeping stale steps.
            values = _initial(self._given)
            state_dict[step] = torch.full_like(self.input_step, values[0])
            state_dict[state] = torch.full_like(self.input_state, values[1])
        knee = f"{prefix}input_step_knee"
        if self.input_step_knee is not None and step in state_dict and knee not in state_dict:
            loaded = state_dict[step].abs()  # had it crossed zero, no better measure is left
            state_dict[knee] = loaded_knee(full(loaded), self.input_step_knee)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._mirror(int(self.input_state))


@contextmanager
def calibrate_(model: nn.Module) -> Iterator[None]:
    """Measure the step sizes of activations on what passes through, in any mode.

    ``with fogzo.calibrate_(model): model(x)``. Each step becomes the mean over the forwards inside
    the block (or over the calls, of a layer that is called several times), and levels become
    unsigned where no input was negative. A measurement overrides earlier and learned steps; steps
    that were given (``fogzo.fixed(2, step=0.1)``) and dynamic scales have nothing to measure.
    Across ranks, do it before DDP or ``fully_shard``, on the same inputs everywhere.

    >>> import fogzo
    >>> model = nn.Sequential(nn.ReLU(), nn.Linear(4, 2))
    >>> _ = fogzo.quantize_(model, fogzo.lsq(2), lambda *_: True, activations=fogzo.lsq(2))
    >>> with torch.no_grad(), fogzo.calibrate_(model.eval()):
    ...     _ = model(torch.tensor([[0.5, 1.5, -3.0, 4.0]]))
    >>> round(model[1].input_step.item(), 4)  # 2 mean|x| / sqrt(3), as the largest level is 3
    1.7321
    >>> model[1].activation_quantizer.grid.name
    'uniform2-unsigned'

    Raises:
        ValueError: If no layer quantizes its input, or FSDP has sharded the model.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedInput) and module.activation_quantizer is not None
    }
    if not layers:
        raise ValueError(
            "no layer of this model quantizes its input: "
            "fogzo.quantize_(model, fogzo.lsq(2), activations=fogzo.lsq(2))"
        )
    measuring = {name: m for name, m in layers.items() if _is_measured_from_inputs(m._given)}
    if any(is_sharded(layer.weight) for layer in measuring.values()):
        raise ValueError(
            "this model is sharded, and a step measured now would be lost with the gathered "
            "parameters: call fogzo.calibrate_(model) before fully_shard(model)"
        )
    for layer in measuring.values():
        layer._tally = _Tally()
    try:
        yield
        missed = [n for n, m in measuring.items() if m._tally is None or not m._tally.count]
        if missed:
            logger.warning("calibrate_ saw no input other than zeros of %s", ", ".join(missed))
    finally:
        for layer in measuring.values():
            layer._tally = None


def activation_quantizers(
    layers: Mapping[str, nn.Module], activations: Activations
) -> dict[str, Quantizer | None]:
    """The activation quantizer of each layer to be quantized.

    Raises:
        ValueError: If one is no quantizer or does not fit its layer.
    """
    if activations is not None and not isinstance(activations, Quantizer):
        try:
            inspect.signature(activations).bind(nn.Identity(), "name")
        except TypeError:
            raise ValueError(
                "activations must be a fogzo.Quantizer, or a function of (module, name) that "
                f"returns one or None, got {activations!r:.80}: for example "
                "fogzo.quantize_(model, fogzo.lsq(2), activations=fogzo.lsq(2))"
            ) from None
    quantizers: dict[str, Quantizer | None] = {}
    for name, layer in layers.items():
        chosen = activations
        if isinstance(layer, nn.Embedding):
            chosen = None  # its inputs are indices
        elif chosen is not None and not isinstance(chosen, Quantizer):
            chosen = chosen(layer, name)
        if chosen is not None:
            _check(name, layer, chosen)
        quantizers[name] = chosen
    return quantizers


def _check(name: str, layer: nn.Module, quantizer: object) -> None:
    if not isinstance(quantizer, Quantizer):
        raise ValueError(
            f"the activation quantizer of {name!r} must be a fogzo.Quantizer or None, got "
            f"{type(quantizer).__name__}: activations=lambda module, name: fogzo.lsq(2)"
        )
    if quantizer.scale.has_state and quantizer.granularity != "tensor":
        raise ValueError(
            f"a {quantizer.scale.kind} step of activations serves the whole tensor, as the number "
            f"of tokens varies, but granularity={quantizer.granularity!r} was asked of {name!r}: "
            'use granularity="tensor", for example activations=fogzo.lsq(2), or a scale that '
            'measures every input, fogzo.abs_max(8, granularity="token") or fogzo.quest(4)'
        )
    weight: Any = layer.weight
    features = getattr(layer, "in_channels", weight.shape[1 if isinstance(layer, nn.Linear) else 0])
    try:
        quantizer.check_dtype(weight.dtype)
        quantizer.quantize_input(torch.ones(1, features), torch.ones(1, 1))
    except ValueError as error:
        raise ValueError(f"cannot quantize the input of {name!r}: {error}") from None


def _for_unsigned(quantizer: Quantizer) -> Quantizer:
    """The quantizer that takes over for inputs without a negative value."""
    grid = unsigned(quantizer.grid)
    # A rotation mixes signs, whatever the input's are.
    if quantizer.rotation is not None or grid == quantizer.grid:
        return quantizer
    return replace(quantizer, grid=grid)


def _is_measured_from_inputs(quantizer: Quantizer | None) -> bool:
    return quantizer is not None and quantizer.scale.has_state and quantizer.scale.value is None


def _initial(quantizer: Quantizer) -> tuple[float, int]:
    """The step and state of a layer that has seen no input: a step that was given needs none."""
    value = quantizer.scale.value
    return (0.0, UNMEASURED) if value is None else (value, AS_GIVEN)


def _may_be_distributed() -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return False
    # FSDP, in one process too, frees the gathered parameter that a forward would write to.
    return dist.get_world_size() > 1 or "torch.distributed.fsdp" in sys.modules
