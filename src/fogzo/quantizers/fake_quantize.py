"""Fake quantization: the exact staircase forward pass, the surrogate's slope backward."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fogzo.quantizers.grids import Grid
from fogzo.quantizers.reading import needs_grad
from fogzo.quantizers.surrogates import Surrogate


def fake_quantize(
    weight: Tensor,
    step: Tensor,
    grids: Sequence[Grid],
    surrogate: Surrogate,
    grad_scales: Sequence[float] = (1.0, 1.0),
    dither: Tensor | None = None,
    second: Tensor | None = None,
) -> Tensor:
    """``w_q = a Q(w / a)`` with ``dw_q/dw = h'(x)`` and ``dw_q/da = Q(x) - x h'(x)``, x = w / a.

    For the clipped identity the second is LSQ's scale gradient, and so it is for rules that pass
    gradients beyond the range (`Surrogate.pull_back_for_step_size`). The backward pass keeps the
    inputs and, for a learned step size, the result, all of which the layer itself holds on to.
    Forward-mode derivatives (`torch.func.jvp`) are the same ones.

    Args:
        weight: The latent weight.
        step: Step sizes that broadcast against it.
        grids: The levels Q rounds to: one grid, or two to choose from.
        surrogate: Whose slope is h'.
        grad_scales: Multiplies the gradient of the step sizes, for each grid.
        dither: Added to x before rounding, for stochastic rounding; the slope stays that at x, or
            is that of the level that was drawn (`surrogates.adjacent`).
        second: A bool tensor of one element, true for the second of two grids. Its value is part
            of the arithmetic, so nothing waits for a device to read it.
    """
    arguments = (weight, step, grids, surrogate, grad_scales, dither, second)
    if forward_ad._current_level >= 0:  # where no tensor says that it requires a gradient
        return _fake_quantize_in_forward_mode(arguments)
    # Applying an autograd function costs more than the arithmetic of a small layer, so the
    # probes, which run without gradient, go around it.
    if not needs_grad(weight, step):
        return _FakeQuantize.forward(*arguments)
    return cast(Tensor, _FakeQuantize.apply(*arguments))


def _fake_quantize_in_forward_mode(arguments: tuple[Any, ...]) -> Tensor:
    if torch.compiler.is_compiling():
        # The compiler would leave the function's derivative out and say nothing.
        torch._dynamo.graph_break("fogzo's quantizers have no compiled forward-mode derivatives")
    if torch._functorch.eager_transforms.JVP_NESTING > 1:
        raise ValueError(
            "torch drops the outer of two forward-mode derivatives of a quantizer: for second "
            "derivatives take a forward-mode one of a gradient, "
            "torch.func.jvp(torch.func.grad(f), (params,), (tangents,)) or torch.func.hessian(f)"
        )
    return cast(Tensor, _ForwardModeFakeQuantize.apply(*arguments))


def _of_chosen(
    second: Tensor | None, grids: Sequence[Grid], make: Callable[[Grid], Tensor]
) -> Tensor:
    """``make(grid)`` for the grid in use."""
    first = make(grids[0])
    return first if second is None else torch.where(second, make(grids[1]), first)


class _FakeQuantize(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        step: Tensor,
        grids: Sequence[Grid],
        surrogate: Surrogate,
        grad_scales: Sequence[float],
        dither: Tensor | None,
        second: Tensor | None,
    ) -> Tensor:
        # In the noise's dtype, as half precision would round the sum onto thresholds.
        x = (weight if dither is None else weight.to(dither.dtype)) / step
        if dither is not None:
            x.add_(dither)
        rounded = grids[0].round_(x) if second is None else _of_chosen(second, grids, _round(x))
        return rounded.mul_(step).to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, step, ctx.grids, ctx.surrogate, ctx.grad_scales, dither, second = inputs
        ctx.is_drawn = dither is not None and ctx.surrogate.is_of_drawn_level
        if ctx.needs_input_grad[1]:
            # Under autocast the layer keeps a copy of lower precision, and only that.
            kind = weight.device.type
            half = kind != "meta" and torch.is_autocast_enabled(kind)
            ctx.save_for_backward(weight, step, dither, second, None if half else output)
        elif ctx.is_drawn:
            ctx.save_for_backward(weight, step, None, second, output)
        elif ctx.surrogate.passes_all:
            # The gradient passes as it is.
            ctx.save_for_backward(None, None, None, None, None)
        else:
            ctx.save_for_backward(weight, step, None, second, None)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        weight, step, dither, second, output = ctx.saved_tensors
        if weight is None:
            return grad, None, None, None, None, None, None
        grids, surrogate, grad_scales = ctx.grids, ctx.surrogate, ctx.grad_scales
        if output is None and ctx.needs_input_grad[1]:
            output = fake_quantize(weight, step, grids, surrogate, grad_scales, dither, second)
        drawn = output if ctx.is_drawn else None
        grad_weight = _of_chosen(
            second, grids, lambda grid: surrogate.pull_back(grad, weight, step, grid, drawn)
        )
        grad_step = None
        if ctx.needs_input_grad[1]:
            masked = grad_weight
            if surrogate.range_slack not in (None, 0.0):
                masked = _of_chosen(
                    second,
                    grids,
                    lambda grid: surrogate.pull_back_for_step_size(grad, weight, step, grid, drawn),
                )
            # Both parts of Q(x) - x h'(x), times the step size, are at hand.
            total = _sum_to(step, grad, output) - _sum_to(step, masked, weight)
            grad_step = (total / step * _chosen_scale(second, grad_scales)).to(step.dtype)
        return grad_weight, grad_step, None, None, None, None, None


class _ForwardModeFakeQuantize(_FakeQuantize):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _FakeQuantize.setup_context(ctx, inputs, output)
        weight, step, *_, second = inputs
        ctx.save_for_forward(weight, step, second, output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        along_weight, along_step, *_ = tangents
        weight, step, second, output = ctx.saved_tensors
        grids, surrogate = ctx.grids, ctx.surrogate
        # A slope acts on each element alone, so what it does to a gradient it does to a tangent.
        tangent, drawn = torch.zeros_like(output), output if ctx.is_drawn else None
        if along_weight is not None:
            tangent = tangent + _of_chosen(
                second,
                grids,
                lambda grid: surrogate.pull_back(along_weight, weight, step, grid, drawn),
            )
        if along_step is not None:
            masked = _of_chosen(
                second,
                grids,
                lambda grid: surrogate.pull_back_for_step_size(weight, weight, step, grid, drawn),
            )
            scale = _chosen_scale(second, ctx.grad_scales)
            tangent = tangent + (output - masked) / step * (scale * along_step).to(output.dtype)
        return tangent


def _round(x: Tensor) -> Callable[[Grid], Tensor]:
    return lambda grid: grid.round(x)


def _chosen_scale(second: Tensor | None, grad_scales: Sequence[float]) -> float | Tensor:
    if second is None:
        return grad_scales[0]
    return torch.where(second, grad_scales[1], grad_scales[0])


def _sum_to(step: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The products a * b, summed over what shares a step size, in float32 or finer."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    if step.numel() == 1:
        return torch.dot(a.reshape(-1), b.reshape(-1)).view_as(step)
    return (a * b).sum_to_size(step.shape)


# apply() binds this signature at every call; looking it up is most of what a call costs.
setattr(  # noqa: B010
    _FakeQuantize.forward, "__signature__", inspect.signature(_FakeQuantize.forward)
)
