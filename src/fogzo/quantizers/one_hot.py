"""Drawing one of several categories, with a gradient for the logits: discrete latent variables.

A draw D ~ softmax(theta) has no derivative. Each rule here takes ``v = df/dD`` at the hard D, as
autograd computes it, and makes an estimate of ``d E f(D) / d theta`` of it by the derivative of a
softmax, ``S * (v - <S, v>)``, at points S that the rules choose differently.
"""

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fogzo.quantizers.checks import is_int, require_positive, require_type
from fogzo.quantizers.grids import Grid
from fogzo.quantizers.reading import can_be_read, needs_grad
from fogzo.quantizers.smoothing import Logistic, Normal, to_be_drawn

Backward = Literal["gumbel_rao", "reinmax", "st"]

_SAMPLES = 10


def one_hot_sample(
    logits: Tensor,
    backward: Backward = "reinmax",
    *,
    temperature: float = 1.0,
    samples: int | None = None,
) -> Tensor:
    """One-hot draws of ``softmax(logits)``, differentiable by an estimator of one's choice.

    - ``"reinmax"``: a trapezoid between what was drawn and its probability
      (Liu et al., arXiv 2304.08612). At temperature 1 its mean is exact for quadratic functions of
      the draw; for others it may be worse than the rest.
    - ``"gumbel_rao"``: the slope of ``softmax(y / temperature)``, averaged over perturbed logits y
      that lead to this draw (Paulus et al., arXiv 2010.04838). One sample is the straight-through
      Gumbel-softmax; more have the same mean and less variance. A low temperature has less bias and
      more variance; 0.1 to 0.5 do well.
    - ``"st"``: the slope of ``softmax(logits / temperature)``, whatever was drawn.

    Draws come from torch's global stream: one set in the forward pass, which FOGZO's probes replay,
    those of ``"gumbel_rao"`` in the backward pass.

    >>> logits = torch.zeros(2, 5, 16, requires_grad=True)  # 5 variables of 16 categories
    >>> z = one_hot_sample(logits, "gumbel_rao", temperature=0.5, samples=10)
    >>> z.shape, z.sum(-1).unique().tolist()
    (torch.Size([2, 5, 16]), [1.0])

    Args:
        logits: Of shape (..., categories), finite.
        backward: The rule.
        temperature: Of the softmax whose slope is taken; lower it over a run by passing another.
        samples: Of y per draw, 10 by default; for ``"gumbel_rao"`` alone.

    Returns:
        A tensor of the logits' shape and dtype. Where reading the logits would wait for a device,
        draws from logits that are not finite are NaN; elsewhere they are an error.

    Raises:
        ValueError: If an argument is not as described.
    """
    _check_logits(logits)
    if not (isinstance(backward, str) and backward in get_args(Backward)):
        raise ValueError(
            f"backward must be one of {', '.join(get_args(Backward))}, got {backward!r:.80}: "
            'one_hot_sample(logits, "reinmax")'
        )
    require_positive("temperature", temperature, "one_hot_sample(logits, temperature=0.5)")
    if samples is not None and backward != "gumbel_rao":
        raise ValueError(
            f'samples={samples!r} are of "gumbel_rao" alone, and {backward!r} draws once: '
            f'one_hot_sample(logits, "{backward}")'
        )
    samples = _SAMPLES if samples is None else samples
    if not is_int(samples) or samples < 1:
        raise ValueError(
            f"samples must be an integer, 1 or more, got {samples!r}: "
            'one_hot_sample(logits, "gumbel_rao", samples=10)'
        )
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    category = (wide - _exponential(wide).log()).argmax(-1, keepdim=True)
    drawn = torch.arange(logits.shape[-1], device=logits.device) == category
    # One that is not finite may win or lose; either way the draw means nothing.
    one_hot = drawn.to(logits.dtype).where(wide.isfinite().all(-1, keepdim=True), torch.nan)
    if not needs_grad(logits):
        return one_hot
    return cast(Tensor, _Follow.apply(logits, one_hot, backward, float(temperature), samples))


def conditional_gumbels(logits: Tensor, one_hot: Tensor) -> Tensor:
    """``logits + Gumbel noise``, given which of them is the largest.

    With E_j ~ Exp(1) and ``Z = sum exp(logits)``, the chosen one is ``-log E_i + log Z`` and the
    others are ``-log(E_j exp(-logits_j) + E_i / Z)`` (arXiv 2010.04838).

    >>> logits = torch.tensor([1.0, 2.0, 3.0])
    >>> bool(conditional_gumbels(logits, torch.tensor([1.0, 0.0, 0.0])).argmax() == 0)
    True

    Args:
        logits: Of shape (..., categories).
        one_hot: Of the same shape: the draw to agree with.

    Returns:
        Perturbed logits of that shape, without history, in float32 or finer.

    Raises:
        ValueError: If the shapes differ.
    """
    if one_hot.shape != logits.shape:
        raise ValueError(
            f"one_hot must have the shape {tuple(logits.shape)} of the logits, 1 at what was drawn "
            f"and else 0, got {tuple(one_hot.shape)}: conditional_gumbels(logits, "
            "one_hot_sample(logits)), or torch.nn.functional.one_hot(drawn, logits.shape[-1])"
        )
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    chosen = one_hot != 0
    log_e = _exponential(wide).log()
    log_top = log_e.where(chosen, 0).sum(-1, keepdim=True) - wide.logsumexp(-1, keepdim=True)
    # Not the exponential of -logits, which overflows where a category is out of the question.
    return -log_top.where(chosen, torch.logaddexp(log_e - wide, log_top))


def level_logits(x: Tensor, grid: Grid, law: Logistic | Normal) -> Tensor:
    """Logarithms of the probabilities of a grid's levels, ``P(Q(x + z) = level)`` for z of a law.

    Args:
        x: Weights divided by their step sizes.
        grid: The levels.
        law: One that reaches every level, or some would have the logarithm of 0.

    Returns:
        Logits of shape ``(*x.shape, grid.num_levels)``, ascending levels, in float32 or finer.

    Raises:
        ValueError: If the law is another one, or the weights are no floating-point numbers.
    """
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        kind = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"x must be a tensor of floating-point numbers, weights in step sizes, got {kind}: "
            "draw_levels(weight / step_size, uniform(2), Logistic(tau=2.0))"
        )
    require_type("grid", grid, Grid, "level_logits(weight / step_size, uniform(2), Logistic())")
    if not isinstance(law, Logistic | Normal):
        raise ValueError(
            f"a draw of levels needs a law of unbounded support, or some levels have probability 0 "
            f"and no logarithm, got {law!r:.80}: Logistic(tau=2.0) or Normal(sigma=0.5), both of "
            "fogzo.quantizers.smoothing"
        )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    thresholds = torch.tensor(grid.thresholds, dtype=wide.dtype, device=x.device)
    distance = wide.unsqueeze(-1) - thresholds
    above, below = law.cdf(distance), law.cdf(-distance)  # P(x + z > threshold), and the rest
    one, zero = torch.ones_like(above[..., :1]), torch.zeros_like(above[..., :1])
    beyond = torch.cat([above, zero], -1)  # the level
    # Differences of numbers next to 1 have lost a small share: levels below x take the other ends.
    shares = torch.where(
        beyond > 0.5,
        torch.cat([below, one], -1) - torch.cat([zero, below], -1),
        torch.cat([one, above], -1) - beyond,
    )
    return shares.clamp(min=torch.finfo(wide.dtype).tiny).log()


def draw_levels(
    x: Tensor,
    grid: Grid,
    law: Logistic | Normal,
    backward: Backward = "reinmax",
    *,
    temperature: float = 1.0,
    samples: int | None = None,
) -> Tensor:
    """``Q(x + z)``, a level per weight, as a draw of `one_hot_sample` with its gradient.

    It draws what ``Quantizer(..., stochastic=True)`` draws with a surrogate of this law, and only
    its backward pass differs: categories instead of a slope. That costs as many numbers per weight
    as there are levels, for each sample.

    >>> from fogzo.quantizers import uniform
    >>> from fogzo.quantizers.smoothing import Logistic
    >>> weight, step_size = torch.zeros(64, 64, requires_grad=True), 0.1
    >>> levels = draw_levels(weight / step_size, uniform(2), Logistic(tau=2.0))
    >>> quantized = step_size * levels

    Args:
        x: Weights divided by their step sizes.
        grid: The levels.
        law: Of the noise z, in step sizes.
        backward: As in `one_hot_sample`, as are the others.
        temperature: Of the softmax whose slope is taken.
        samples: Of ``"gumbel_rao"``.

    Returns:
        Levels in step sizes, of x's shape and dtype.

    Raises:
        ValueError: If an argument is not as described.
    """
    logits = level_logits(x, grid, law)
    drawn = one_hot_sample(logits, backward, temperature=temperature, samples=samples)
    codes = torch.arange(grid.low_code, grid.high_code + 1, dtype=drawn.dtype, device=x.device)
    # Not a matrix product, which autocast, or a GPU in TF32, would round levels for.
    return (drawn * grid.level(codes)).sum(-1).to(x.dtype)


class _Follow(Function):
    """The draw itself, and the estimator as its backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor, one_hot: Tensor, backward: Backward, temperature: float, samples: int
    ) -> Tensor:
        return one_hot.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, one_hot, ctx.backward_rule, ctx.temperature, ctx.samples = inputs
        ctx.save_for_backward(logits, one_hot)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, one_hot = ctx.saved_tensors
        wide = torch.promote_types(logits.dtype, torch.float32)
        theta, hard, grad = (t.to(wide) for t in (logits, one_hot, grad_outputs[0]))
        rule, temperature = ctx.backward_rule, ctx.temperature
        if rule == "st":
            found = _pull_back(grad, _softmax(theta, temperature)) / temperature
        elif rule == "reinmax":
            middle = (hard + _softmax(theta, temperature)) / 2
            found = 2 * _pull_back(grad, middle) - _pull_back(grad, _softmax(theta)) / 2
        else:
            found = torch.zeros_like(theta)
            # Drawn here, as probes without a backward pass must draw as much as other forward
            # passes do; one by one, as together they would take as many times the memory.
            for _ in range(ctx.samples):
                # No gradient runs through what y owes to the draw: it makes the estimate wrong.
                y = conditional_gumbels(theta, hard)
                found += _pull_back(grad, _softmax(y, temperature))
            found /= ctx.samples * temperature
        return found.to(logits.dtype), None, None, None, None


def _pull_back(grad: Tensor, shares: Tensor) -> Tensor:
    """The derivative of a softmax whose value is ``shares``, times a gradient."""
    return shares * (grad - (shares * grad).sum(-1, keepdim=True))


def _softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    # Less the largest before the division, which might overflow.
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)


def _exponential(like: Tensor) -> Tensor:
    """Independent values of Exp(1), never 0, from operations that vmap and the compiler know."""
    uniform = to_be_drawn(like).uniform_()
    # A uniform number of 0 stands for those below half of their spacing. Taken for the smallest
    # number there is, it would win every draw, also of a category that is masked by its logit.
    return -torch.log1p(-uniform).clamp(max=-torch.finfo(like.dtype).eps / 4)


def _check_logits(logits: object) -> None:
    if not (isinstance(logits, Tensor) and logits.is_floating_point()):
        kind = str(logits.dtype) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"logits must be a tensor of floating-point numbers, got {kind}: "
            "one_hot_sample(encoder(x).view(-1, variables, categories))"
        )
    if logits.dim() == 0 or logits.shape[-1] < 2:
        raise ValueError(
            f"the last dimension of logits must hold two categories or more, got the shape "
            f"{tuple(logits.shape)}: one_hot_sample(encoder(x).view(-1, variables, categories))"
        )
    if can_be_read(logits) and not logits.isfinite().all():
        raise ValueError(
            "logits hold NaN or infinity. For a category that is never to be drawn use a finite "
            "value, logits.masked_fill(mask, -30); NaN comes from earlier, "
            "torch.autograd.set_detect_anomaly(True) finds where"
        )
