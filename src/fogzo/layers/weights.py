"""The records an estimator works on: a latent weight, its step size and its surrogate."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fogzo.collectives import check_placements, full
from fogzo.quantizers.grids import Grid
from fogzo.quantizers.surrogates import Surrogate, identity

StepSize = Callable[[], Tensor]
_IDENTITY = identity()


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One latent weight, as `quantized_weights` lists it or as you write it down yourself.

    Three fields are enough for a fake quantization of your own:
    ``QuantizedWeight("proj", model.proj.weight, lambda: model.proj.step)``.

    Attributes:
        name: What messages call it.
        param: The latent weight that the optimizer trains.
        step_size: Returns the current step sizes, in the weight's units, broadcastable to it.
        surrogate: The backward rule whose smoothing law sets the perturbation; rounding with
            the identity unless you say otherwise.
        model: Its model. Known, its buffers and modes come back unchanged from every probe.
        rotate: The orthonormal, self-inverse change of basis in which the weight is rounded, and
            so the one in which it is perturbed; None perturbs the weight itself. It is
            given this rank's shard of a sharded weight.
        codes: Returns the current integer codes, for counting flips.
        grid: The levels, in step sizes; None stands for evenly spaced ones, one apart.
        held: True where an entry must not move, such as the row of an embedding's ``padding_idx``;
            broadcastable to the weight. A weight that does not require a gradient is held whole.
        hold_step_size: A context in which the quantizer keeps its present step sizes although its
            weights move, for scales that are measured from the weights.
        of_experts: Whether the first dimension counts experts. Each then takes noise by its own
            gradient, and none in a step that did not use it.
        has_constant_step_size: False where it is learned, or measured in every forward pass.
        fan_in: The number of inputs of an output; None takes the first dimension for outputs.
    """

    name: str
    param: nn.Parameter
    step_size: StepSize
    surrogate: Surrogate = _IDENTITY
    model: nn.Module | None = None
    rotate: Callable[[Tensor], Tensor] | None = None
    codes: Callable[[], Tensor] | None = None
    grid: Grid | None = None
    held: Tensor | None = None
    hold_step_size: Callable[[], AbstractContextManager[None]] = nullcontext
    of_experts: bool = False
    has_constant_step_size: bool = True
    fan_in: int | None = None

    @property
    def inputs(self) -> int:
        """`fan_in`, or what stands for it."""
        return self.fan_in or inputs_of_an_output(self.param, 0)


WeightLike = QuantizedWeight | tuple[str, nn.Parameter, StepSize | Tensor | float]


def inputs_of_an_output(weight: Tensor, output_dim: int, groups: int = 1) -> int:
    """How many inputs an output has.

    Args:
        weight: Of the layer.
        output_dim: Which dimension counts outputs; of a transposed convolution, those of a group.
        groups: Of that convolution.
    """
    outputs = weight.shape[output_dim] * (groups if output_dim == 1 else 1)
    return weight.numel() // outputs


def as_quantized_weights(weights: Iterable[WeightLike]) -> list[QuantizedWeight]:
    """Checked records, from records or plain ``(name, param, step_size)`` triples.

    Raises:
        ValueError: If the list is empty, a weight appears twice, is not a floating-point
            parameter with memory of its own, or has a step size or held entries that do not fit it.
    """
    if isinstance(weights, nn.Module) or not isinstance(weights, Iterable):
        raise ValueError(
            f"expected a list of quantized weights, got {type(weights).__name__}: "
            "FogzoEstimator(fogzo.quantized_weights(model), ...)"
        )
    records = [_as_record(weight) for weight in weights]
    if not records:
        raise ValueError(
            "got no quantized weights: quantize the model first, "
            "fogzo.quantize_(model, fogzo.lsq(bits=2)), then "
            "FogzoEstimator(fogzo.quantized_weights(model), ...)"
        )
    seen: dict[int, str] = {}
    for record in records:
        check_parameter(record.name, record.param)
        check_placements(record.name, record.param)
        if id(record.param) in seen:
            raise ValueError(
                f"{record.name!r} and {seen[id(record.param)]!r} are the same parameter: "
                "list a tied weight once"
            )
        seen[id(record.param)] = record.name
        _check_step(record)
        _check_held(record)
    _check_memory(records)
    return records


def _check_memory(records: Iterable[QuantizedWeight]) -> None:
    """Raise a `ValueError` if two parameters begin in the same memory: each would move both."""
    seen: dict[int, str] = {}
    for record in records:
        if type(record.param) is not nn.Parameter or not record.param.numel():
            continue
        memory = record.param.data_ptr()
        if memory in seen:
            first = seen[memory]
            raise ValueError(
                f"{first!r} and {record.name!r} are two parameters in the same memory, as after "
                f"{record.name}.data = {first}.data, and each would move the other: tie the "
                f"parameter itself, {record.name} = {first}, before fogzo.quantize_"
            )
        seen[memory] = record.name


def check_parameter(name: str, param: object) -> None:
    """Raise a `ValueError` unless it is a real floating-point parameter."""
    if not isinstance(param, nn.Parameter):
        raise ValueError(
            f"{name!r} must be an nn.Parameter, the latent weight that the optimizer trains, "
            f"got {type(param).__name__}"
        )
    if not param.is_floating_point():
        raise ValueError(
            f"{name!r} holds {param.dtype}: latent weights must be floating point; "
            "quantize the float model, before any conversion to integers"
        )
    if param.is_meta:
        raise ValueError(
            f"{name!r} is on the meta device and has no values yet: load the weights first, "
            'for example model.to_empty(device="cpu"); model.load_state_dict(...)'
        )


def _as_record(weight: WeightLike) -> QuantizedWeight:
    if isinstance(weight, QuantizedWeight):
        return weight
    if not (isinstance(weight, tuple) and len(weight) == 3):
        raise ValueError(
            f"got {weight!r:.80} among the weights: expected the list of "
            'fogzo.quantized_weights(model), or triples ("name", parameter, step_size)'
        )
    name, param, step = weight
    if callable(step):
        return QuantizedWeight(name, param, step)
    try:
        constant = torch.as_tensor(step)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"the step size of {name!r} must be a number, a tensor or a function that returns "
            f'one, got {step!r:.80}: ("{name}", parameter, 0.05)'
        ) from None
    return QuantizedWeight(name, param, partial(_same, constant))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _check_step(record: QuantizedWeight) -> None:
    step = record.step_size()
    if not isinstance(step, Tensor):
        raise ValueError(
            f"step_size() of {record.name!r} returned {type(step).__name__}: return a tensor"
        )
    shape = tuple(record.param.shape)
    if not _broadcasts(step, shape):
        raise ValueError(
            f"the step size of {record.name!r} has shape {tuple(step.shape)}, which does not "
            f"broadcast to the weight's {shape}: give a scalar, or "
            f"step.reshape({', '.join(['-1'] + ['1'] * (len(shape) - 1))}) for one per channel"
        )
    step = full(step.detach())
    if not (step.isfinite().all() and (step >= 0).all() and (step > 0).any()):
        raise ValueError(
            f"the step size of {record.name!r} must be positive and finite, got "
            f"{step.min().item():g} to {step.max().item():g}: the distance of neighbouring levels "
            "of the quantized weight, (name, parameter, step_size)"
        )


def _check_held(record: QuantizedWeight) -> None:
    held, shape = record.held, tuple(record.param.shape)
    if held is None:
        return
    is_tensor = isinstance(held, Tensor)
    if not (is_tensor and held.dtype == torch.bool and _broadcasts(held, shape)):
        came = f"{held.dtype} of shape {tuple(held.shape)}" if is_tensor else type(held).__name__
        raise ValueError(
            f"held of {record.name!r} must be a tensor of torch.bool, True where an entry must not "
            f"move, that broadcasts to the weight's {shape}, got {came}: held=mask.bool()"
        )


def _broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    try:
        return torch.broadcast_shapes(tensor.shape, shape) == shape
    except RuntimeError:
        return False
