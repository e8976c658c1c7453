"""Fake quantization: the exact staircase forward, the surrogate's slope backward."""

import inspect
from typing import Any, cast

import torch
from torch import Tensor

from fogzo.quantizers.grids import Grid
from fogzo.quantizers.surrogates import Surrogate


def fake_quantize(
    weight: Tensor,
    step: Tensor,
    grid: Grid,
    surrogate: Surrogate,
    grad_scale: float = 1.0,
    dither: Tensor | None = None,
) -> Tensor:
    """``w_q = a Q(w / a)`` with ``dw_q/dw = h'(x)`` and ``dw_q/da = Q(x) - x h'(x)``, x = w / a.

    For the clipped identity the second is LSQ's scale gradient, and so it is for rules that pass
    gradients beyond the range (`Surrogate.pull_back_for_step`). The backward pass keeps the inputs
    and, for a learned step, the result, all of which the layer itself holds on to.

    Args:
        weight: The latent weight.
        step: Step sizes that broadcast against it.
        grid: The levels Q rounds to.
        surrogate: Whose slope is h'.
        grad_scale: Multiplies the gradient of the step sizes.
        dither: Added to x before rounding, for stochastic rounding; the slope stays that at x.
    """
    arguments = (weight, step, grid, surrogate, grad_scale, dither)
    if not _needs_grad(weight, step):
        return _FakeQuantize.forward(*arguments)
    return cast(Tensor, _FakeQuantize.apply(*arguments))


def _needs_grad(*tensors: Tensor) -> bool:
    # Applying an autograd function costs more than the arithmetic of a small layer, so the
    # probes, which run without gradient, go around it.
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _FakeQuantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        step: Tensor,
        grid: Grid,
        surrogate: Surrogate,
        grad_scale: float,
        dither: Tensor | None,
    ) -> Tensor:
        x = weight / step
        return grid.round_(x if dither is None else x.add_(dither)).mul_(step)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, step, ctx.grid, ctx.surrogate, ctx.grad_scale, dither = inputs
        if ctx.needs_input_grad[1]:
            # Under autocast the layer keeps a copy of lower precision, and only that.
            half = torch.is_autocast_enabled(weight.device.type)
            ctx.save_for_backward(weight, step, dither, None if half else output)
        elif ctx.surrogate.passes_all:
            ctx.save_for_backward(None, None, None, None)  # the gradient passes as it is
        else:
            ctx.save_for_backward(weight, step, None, None)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        weight, step, dither, output = ctx.saved_tensors
        if weight is None:
            return grad, None, None, None, None, None
        grid, surrogate = ctx.grid, ctx.surrogate
        grad_weight, grad_step = surrogate.pull_back(grad, weight, step, grid), None
        if ctx.needs_input_grad[1]:
            shared = surrogate.range_slack in (None, 0.0)
            masked = grad_weight
            if not shared:
                masked = surrogate.pull_back_for_step(grad, weight, step, grid)
            if output is None:
                output = _FakeQuantize.forward(weight, step, grid, surrogate, 1.0, dither)
            # Both parts of Q(x) - x h'(x), times the step size, are at hand.
            total = _sum_to(step, grad, output) - _sum_to(step, masked, weight)
            grad_step = (total / step * ctx.grad_scale).to(step.dtype)
        return grad_weight, grad_step, None, None, None, None


def _sum_to(step: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The products a * b, summed over what shares a step, in float32 or finer."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    if step.numel() == 1:
        return torch.dot(a.reshape(-1), b.reshape(-1)).view_as(step)
    return (a * b).sum_to_size(step.shape)


# apply() binds this signature at every call; looking it up is most of what a call costs.
setattr(  # noqa: B010
    _FakeQuantize.forward, "__signature__", inspect.signature(_FakeQuantize.forward)
)
