"""Fake quantization: the exact staircase forward, the surrogate's slope backward."""

from typing import Any

import torch
from torch import Tensor

from fogzo.quantizers.grids import Grid
from fogzo.quantizers.scales import MIN_STEP
from fogzo.quantizers.surrogates import Surrogate


class FakeQuantize(torch.autograd.Function):
    """``w_q = a Q(w / a)`` with ``dw_q/dw = h'(x)`` and ``dw_q/da = Q(x) - x h'(x)``, x = w / a.

    For the clipped identity the second is LSQ's scale gradient. Only the inputs are saved, so a
    quantized layer keeps no activation-sized tensor for its backward pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, step: Tensor, grid: Grid, surrogate: Surrogate, grad_scale: float
    ) -> Tensor:
        """Quantize ``weight`` with step sizes that broadcast against it."""
        return grid.round(weight / step) * step

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs for the backward pass."""
        weight, step, ctx.grid, ctx.surrogate, ctx.grad_scale = inputs
        if ctx.surrogate.passes_all and not ctx.needs_input_grad[1]:
            return  # the gradient passes as it is, so nothing has to be kept alive
        ctx.save_for_backward(weight, step)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the weight (by the surrogate) and of the step size."""
        (grad,) = grad_outputs
        if ctx.surrogate.passes_all and not ctx.needs_input_grad[1]:
            return grad, None, None, None, None
        weight, step = ctx.saved_tensors
        x = weight / step
        slope = ctx.surrogate.slope(x, ctx.grid)
        grad_weight = grad * slope if ctx.needs_input_grad[0] else None
        grad_step = None
        if ctx.needs_input_grad[1]:
            per_weight = grad * (ctx.grid.round(x) - x * slope)
            grad_step = per_weight.sum_to_size(step.shape) * ctx.grad_scale
        return grad_weight, grad_step, None, None, None


class EffectiveStep(torch.autograd.Function):
    """The step size that the forward uses: positive, and rounded if a file format asks for it.

    The gradient passes straight through, so a learned step that has strayed below the minimum
    can come back.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(step: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Clamp, and round to ``dtype`` and back."""
        if dtype is None:
            return step.clamp(min=MIN_STEP)
        limits = torch.finfo(dtype)
        smallest = max(limits.smallest_normal, MIN_STEP)
        return step.clamp(smallest, limits.max).to(dtype).to(step.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient as it is."""
        return grad_outputs[0], None
