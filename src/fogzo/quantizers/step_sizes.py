"""Step sizes: the smallest that can be used, and how a learned one stays positive."""

import torch
from torch import Tensor

from fogzo.quantizers.reading import can_be_read, needs_grad

MIN_STEP_SIZE = 1e-8
# A group whose step size is this much smaller than the layer's mean adds 1e-8 of a typical group's
# energy to the output, below what bfloat16 and float16 resolve: a dead channel, not a small one.
_DEAD = 1e-4


def effective_step_size(step: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The step size that the forward pass uses: positive, and rounded to ``dtype`` if one is given.

    The gradient passes straight through.
    """
    value = step.detach()
    if dtype is None:
        if step.numel() == 1 and can_be_read(step) and step.item() >= MIN_STEP_SIZE:
            return step
        value = value.clamp(min=_minimum(step.dtype))
    else:
        own, limits = torch.finfo(step.dtype), torch.finfo(dtype)
        # Float16 steps of a wider dtype stay within float16.
        smallest = max(limits.smallest_normal, _minimum(step.dtype))
        # A bfloat16 step size clamped at float16's maximum would round up, and then to infinity;
        # a power of two of half of it does not (float8_e8m0fnu, whose eps is 1).
        largest = min(limits.max, own.max * (1 - min(limits.eps, 0.5))) * (1 - own.eps)
        value = value.clamp(smallest, largest).to(dtype).to(step.dtype)
    return _straight_through(step, value)


def knee_of(step: Tensor) -> Tensor:
    """The knee of a learned step size (see `positive_step_size`): half of what was measured."""
    return step.detach() / 2


def loaded_knee(step: Tensor, own: Tensor) -> Tensor:
    """The knee for a loaded step size whose checkpoint, older than knees, has none.

    Args:
        step: Its forward remains the same to the bit, as long as it has not crossed zero.
        own: The knee of the layer that it is loaded into, for where it has.
    """
    knee = knee_of(step)
    if step.shape != own.shape:
        return knee  # of another model, as loading will say
    return knee.where(step > MIN_STEP_SIZE, own.to(knee)).clamp(min=_minimum(knee.dtype))


def positive_step_size(step: Tensor, knee: Tensor) -> Tensor:
    """The step size that a learned parameter stands for: positive, whatever an optimizer did.

    It is the parameter ``s`` itself from the knee ``k`` up, so LSQ to the bit, and
    ``k / (2 - s / k)`` below, which continues it smoothly and approaches zero like ``1 / |s|``:
    n optimizer steps of size k beyond the knee leave it at ``k / (1 + n)``.

    The gradient passes straight through, which makes an optimizer's step on ``s`` a step of mirror
    descent on the step size, with a logarithmic barrier at zero. The derivative of the map would
    instead hold a step that has become small where it is.

    >>> positive_step_size(torch.tensor([0.2, 0.1, 0.05, 0.0, -1.0]), torch.tensor(0.1))
    tensor([0.2000, 0.1000, 0.0667, 0.0500, 0.0083])
    """
    knee = knee.to(step)
    if can_be_read(step, knee):
        one = step.numel() == 1  # and numbers are compared in a tenth of the time
        if step.item() >= knee.item() if one else (step >= knee).all():
            return step
    value = step.detach()
    return _straight_through(step, torch.maximum(value, knee / (2 - value / knee).clamp(min=1)))


def smallest_step_size(*dtypes: torch.dtype | None) -> float:
    """The smallest step size that is worth keeping in all of these dtypes.

    Twice the minimum, as some rules add the minimum to what they measure. A quarter of a dtype's
    smallest normal number still has 8 significant bits in float16.
    """
    return max(
        2 * MIN_STEP_SIZE, *(torch.finfo(dtype).smallest_normal / 4 for dtype in dtypes if dtype)
    )


def without_a_step_size(steps: Tensor, smallest: float) -> Tensor:
    """Which of a layer's measured step sizes are those of zeros, or of next to nothing."""
    measurable = steps >= smallest
    typical = steps.where(measurable, 0).sum() / measurable.sum().clamp(min=1)
    return (steps < smallest) | (steps < _DEAD * typical)


def _minimum(dtype: torch.dtype) -> float:
    # float16 has no MIN_STEP_SIZE: there, its smallest number (subnormal) is the minimum.
    limits = torch.finfo(dtype)
    return max(limits.tiny * limits.eps, MIN_STEP_SIZE)


def _straight_through(step: Tensor, value: Tensor) -> Tensor:
    """``value`` with the gradient of ``step``."""
    forward = torch.autograd.forward_ad._current_level >= 0
    # The difference is exactly zero, and differentiable in either mode and by any transform.
    return value + (step - step.detach()) if forward or needs_grad(step) else value
