"""Fake quantization: the exact staircase forward, the surrogate's slope backward."""

import inspect
from typing import Any, cast

import torch
from torch import Tensor

from fogzo.quantizers.grids import Grid
from fogzo.quantizers.scales import MIN_STEP
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
    gradients beyond the range (`Surrogate.step_slope`). Only the inputs are kept for the
    backward pass, so a quantized layer stores no tensor of its own.

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


def effective_step(step: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The step size that the forward uses: positive, and rounded to ``dtype`` if one is given.

    The gradient passes straight through, so a learned step that has strayed below the minimum
    can come back.
    """
    if not _needs_grad(step):
        return _EffectiveStep.forward(step, dtype)
    return cast(Tensor, _EffectiveStep.apply(step, dtype))


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
        return _rounded(weight / step, grid, dither) * step

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, step, ctx.grid, ctx.surrogate, ctx.grad_scale, dither = inputs
        if ctx.surrogate.passes_all and not ctx.needs_input_grad[1]:
            return  # the gradient passes as it is, so nothing has to be kept alive
        ctx.save_for_backward(weight, step, dither)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        if ctx.surrogate.passes_all and not ctx.needs_input_grad[1]:
            return grad, None, None, None, None, None
        weight, step, dither = ctx.saved_tensors
        x = weight / step
        grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_weight = grad * ctx.surrogate.slope(x, ctx.grid)
        grad_step = None
        if ctx.needs_input_grad[1]:
            slope = ctx.surrogate.step_slope(x, ctx.grid)
            per_weight = grad * (_rounded(x, ctx.grid, dither) - x * slope)
            grad_step = per_weight.sum_to_size(step.shape) * ctx.grad_scale
        return grad_weight, grad_step, None, None, None, None


def _rounded(x: Tensor, grid: Grid, dither: Tensor | None) -> Tensor:
    return grid.round(x if dither is None else x + dither)


class _EffectiveStep(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(step: Tensor, dtype: torch.dtype | None) -> Tensor:
        own = torch.finfo(step.dtype)
        if dtype is None:
            # float16 has no MIN_STEP: there, its smallest number (subnormal) is the minimum.
            return step.clamp(min=max(own.tiny * own.eps, MIN_STEP))
        limits = torch.finfo(dtype)
        smallest = max(limits.smallest_normal, MIN_STEP)
        # A bfloat16 step clamped at float16's maximum would round up, and then to infinity.
        largest = limits.max * (1 - own.eps)
        return step.clamp(smallest, largest).to(dtype).to(step.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None


for _function in (_FakeQuantize, _EffectiveStep):
    # apply() binds this signature at every call; looking it up is most of what a call costs.
    setattr(_function.forward, "__signature__", inspect.signature(_function.forward))  # noqa: B010
