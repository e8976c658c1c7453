"""Surrogates: what the backward pass pretends that rounding did, and which noise makes it true.

A surrogate that comes from a smoothing law takes its slope from that law, on any grid, so the
backward rule and the perturbation of FOGZO cannot disagree. Those that no law explains (an
unmasked identity, QuEST's trust mask, heavy-tailed kernels) say ``law=None`` and carry the law
that perturbs instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import NoneType

import torch
from torch import Tensor

from fogzo.quantizers.checks import is_number, require_type
from fogzo.quantizers.grids import Grid
from fogzo.quantizers.reading import can_be_read
from fogzo.quantizers.smoothing import (
    Crest,
    Logistic,
    Normal,
    SmoothingLaw,
    Triangular,
    Uniform,
)

Kernel = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Surrogate:
    """A backward rule and its smoothing law.

    Attributes:
        name: What recipes, reports and ``surrogate=`` arguments call it.
        law: The law p with ``E Q(x + z) = h(x)``, or None where no law gives this slope.
        perturbation: The law FOGZO perturbs with: ``law`` itself, or what is used instead of one.
        range_slack: For identity-like rules: the slope is 1 up to this many step sizes beyond
            the end levels and 0 outside (infinity: never masked). None where the slope is a sum of
            kernels.
        kernel: The density summed over thresholds where there is no law of finite variance, for
            example ``lambda z: gamma / (math.pi * (z * z + gamma**2))`` for an arctangent.
        least_probability: For rules whose slope depends on the level that was drawn, the least
            probability that they divide by (`adjacent`). None for all others.
    """

    name: str
    law: SmoothingLaw | None
    perturbation: SmoothingLaw
    range_slack: float | None = None
    kernel: Kernel | None = None
    least_probability: float | None = None
    # Of the grid that a rule as wide as its spacing was made for, by its name alone; see
    # `resolve_surrogate`.
    _spacing: float | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        example = 'Surrogate("wide", Uniform(2.0), Uniform(2.0))'
        require_type("name", self.name, str, example)
        require_type("law", self.law, (SmoothingLaw, NoneType), example)
        require_type("perturbation", self.perturbation, SmoothingLaw, example)
        slack = self.range_slack
        if slack is not None and not (is_number(slack) and slack >= 0):
            raise ValueError(
                f"range_slack must be a number of step sizes, 0 or more, or None, got {slack!r}: "
                "for example 0.0 for a mask at the end levels, math.inf for none"
            )
        if self.kernel is not None and not callable(self.kernel):
            raise ValueError(
                f"kernel must be a function from tensor to tensor, got {self.kernel!r:.80}: "
                "for example the pdf of a law, Uniform(2.0).pdf"
            )
        if slack is not None and self.kernel is not None:
            raise ValueError(
                f"the slope is either 1 up to range_slack={slack!r} beyond the range or a sum of "
                "kernels, got both: leave one out, for example "
                f"Surrogate({self.name!r}, None, Uniform(2.0), kernel=kernel)"
            )
        least = self.least_probability
        if least is not None and not (is_number(least) and 0 < least <= 1):
            raise ValueError(
                "least_probability must be above 0 and at most 1, as slopes are divided by it, "
                f"got {least!r}: for example adjacent(least_probability=0.1)"
            )

    @property
    def radius(self) -> float:
        """Perturbation radius in step sizes, the paper's epsilon-bar."""
        return self.perturbation.radius

    @property
    def is_of_drawn_level(self) -> bool:
        """Whether the slope depends on the level that was drawn, so that one must be drawn."""
        return self.least_probability is not None

    @property
    def passes_all(self) -> bool:
        """Whether the slope (its mean over draws) is 1 everywhere, so no mask is needed."""
        return self.range_slack == math.inf

    def noise(self, grid: Grid) -> SmoothingLaw:
        """The law by which stochastic rounding draws levels."""
        return self.law or Uniform(grid.spacing)

    def slope(self, x: Tensor, grid: Grid) -> Tensor:
        """``h'(x)`` for ``x = weight / step_size``, in x's shape; a bool mask if it is 0 or 1."""
        if self.range_slack is not None:
            return (x >= grid.low - self.range_slack) & (x <= grid.high + self.range_slack)
        law = self.law or self.perturbation
        density = self.kernel or law.pdf
        total = density(x - grid.thresholds[0])
        for threshold in grid.thresholds[1:]:
            total = total + density(x - threshold)
        if self.kernel is None and isinstance(law, Uniform):
            # Exactly where the noise of one threshold ends and that of another begins, one counts.
            total = total.clamp(max=math.ceil(law.width / grid.spacing) / law.width)
        return total if grid.spacing == 1 else total * grid.spacing

    def slope_of_drawn(self, x: Tensor, level: Tensor, grid: Grid) -> Tensor:
        """``(f_in + f_out) / 2p`` at x where this level was drawn (see `adjacent`)."""
        law, half = self.noise(grid), grid.spacing / 2
        enter, leave = x - (level - half - grid.margin), x - (level + half - grid.margin)
        lowest, highest = level < grid.low + half, level > grid.high - half
        density = law.pdf(enter).where(~lowest, 0) + law.pdf(leave).where(~highest, 0)
        probability = law.cdf(enter).where(~lowest, 1) - law.cdf(leave).where(~highest, 0)
        assert self.least_probability is not None
        slope = grid.spacing * density / (2 * probability.clamp(min=self.least_probability))
        if self.law is None:  # and so no mask
            return slope.where((x > grid.low) & (x < grid.high), 1)
        return slope

    def pull_back(
        self, grad: Tensor, weight: Tensor, step: Tensor, grid: Grid, drawn: Tensor | None = None
    ) -> Tensor:
        """``grad * h'(weight / step)``: what the backward pass makes of a gradient.

        Args:
            grad: Of the quantized weight.
            weight: The latent weight.
            step: Step sizes that broadcast against it.
            grid: The levels.
            drawn: The quantized weight, for the slope of the level that was drawn; without it a
                rule with such a slope takes its mean over draws.
        """
        if drawn is not None and self.is_of_drawn_level:
            wide = torch.promote_types(weight.dtype, torch.float32)  # or 1 - |x - k| is coarse
            step = step.to(wide)
            slope = self.slope_of_drawn(weight.to(wide) / step, drawn.to(wide) / step, grid)
            return (grad * slope).to(grad.dtype)
        if self.range_slack is None:
            return grad * self.slope(weight / step, grid)
        return grad if self.passes_all else _masked(grad, weight, step, grid, self.range_slack)

    def pull_back_for_step_size(
        self, grad: Tensor, weight: Tensor, step: Tensor, grid: Grid, drawn: Tensor | None = None
    ) -> Tensor:
        """The same with the slope in the step size's gradient ``Q(x) - x h'(x)``.

        It is h' where a law gives one. A rule that lets gradients pass outside the range would
        pull the step size without bound there, against the levels that are really used, so it
        gets LSQ's gradient, masked at the range.
        """
        if self.range_slack is None or self.is_of_drawn_level:
            grad = self.pull_back(grad, weight, step, grid, drawn)
        return grad if self.range_slack is None else _masked(grad, weight, step, grid, 0.0)


def _masked(grad: Tensor, weight: Tensor, step: Tensor, grid: Grid, slack: float) -> Tensor:
    """The gradient where x is no further than the slack outside the range, else 0."""
    low, high = grid.low - slack, grid.high + slack
    if weight.dtype.itemsize < 4:
        x = weight / step
        return torch.where((x >= low) & (x <= high), grad, 0)
    # One pass instead of four. This kernel drops the ends of its range, so it gets a wider one.
    eps = 4 * torch.finfo(weight.dtype).eps
    below, above = low - eps * max(abs(low), eps), high + eps * max(abs(high), eps)
    if step.numel() == 1 and can_be_read(step):
        scale = step.item()
        return torch.ops.aten.hardtanh_backward(grad, weight, below * scale, above * scale)
    return torch.ops.aten.hardtanh_backward(grad, weight / step, below, above)


def identity(spacing: float = 1.0) -> Surrogate:
    """Slope 1 between the end levels, 0 outside: LSQ's mask and the paper's "identity".

    >>> from fogzo.quantizers import Quantizer, fixed_scale, uniform
    >>> w = torch.tensor([[0.2, 9.0]], requires_grad=True)
    >>> q = Quantizer(uniform(2, "half"), fixed_scale(1.0), identity())(w, torch.ones(1, 1))
    >>> q.sum().backward()
    >>> q.tolist(), w.grad.tolist()
    ([[0.5, 1.5]], [[1.0, 0.0]])
    """
    law = Uniform(spacing)
    return Surrogate("identity", law, law, range_slack=0.0)


def identity_unmasked(spacing: float = 1.0) -> Surrogate:
    """Slope 1 everywhere, as in BitNet. No law gives it outside the range; perturbs uniformly.

    >>> from fogzo.quantizers import Quantizer, fixed_scale, uniform
    >>> w = torch.tensor([[0.2, 9.0]], requires_grad=True)
    >>> quantizer = Quantizer(uniform(2, "half"), fixed_scale(1.0), identity_unmasked())
    >>> quantizer(w, torch.ones(1, 1)).sum().backward()
    >>> w.grad.tolist()
    [[1.0, 1.0]]
    """
    return Surrogate("identity_unmasked", None, Uniform(spacing), range_slack=math.inf)


def trust(spacing: float = 1.0) -> Surrogate:
    """QuEST's trust mask: slope 1 where the rounding error is at most half a step size.

    That reaches half a step size beyond the end levels (arXiv 2502.05003). No smoothing law gives
    it; perturbs uniformly.

    >>> from fogzo.quantizers import Quantizer, fixed_scale, uniform
    >>> w = torch.tensor([[1.9, 2.1]], requires_grad=True)
    >>> quantizer = Quantizer(uniform(2, "half"), fixed_scale(1.0), trust())
    >>> quantizer(w, torch.ones(1, 1)).sum().backward()
    >>> w.grad.tolist()
    [[1.0, 0.0]]
    """
    return Surrogate("trust", None, Uniform(spacing), range_slack=spacing / 2)


def adjacent(
    law: SmoothingLaw | None = None, spacing: float = 1.0, least_probability: float | None = None
) -> Surrogate:
    """The slope that fits a drawn level: for weights that are rounded at random.

    The level k was drawn with the probability p_k, and the densities of the noise at the thresholds
    on either side of it are f_in and f_out. The slope is ``m_k = (f_in + f_out) / (2 p_k)``. Then
    the mean over draws of ``L'(k) m_k`` is a sum over thresholds of f times the mean of L' at the
    two levels there. Where L is quadratic in each weight, that is exactly the slope of
    ``E L(Q(x + z))``. The mean of m_k is the slope that the same law has without draws.

    Without a law the noise is uniform over one step, so a weight between two levels takes one of
    them, with probability ``1 - |x - k|``, and ``m = 1 / (2 (1 - |x - k|))``. Beyond the range,
    where nothing is drawn, the slope is 1. A law of unbounded support, ``adjacent(Logistic(3.0))``,
    needs no such rule.

    >>> from fogzo.quantizers import uniform
    >>> x, level = torch.tensor([0.25, 0.25, 9.0]), torch.tensor([0.0, 1.0, 3.0])
    >>> [round(slope, 3) for slope in adjacent().slope_of_drawn(x, level, uniform(3)).tolist()]
    [0.667, 2.0, 1.0]

    Args:
        law: Of the noise that draws.
        spacing: Of the grid's levels, where there is no law.
        least_probability: What p_k is raised to, which bounds the slope and biases it where levels
            so unlikely are drawn. By default 0.1, and 0.001 where there is a law.
    """
    noise = law or Uniform(spacing)
    if least_probability is None:
        least_probability = 0.1 if law is None else 1e-3
    slack = math.inf if law is None else None
    return Surrogate("adjacent", law, noise, slack, least_probability=least_probability)


def hardtanh() -> Surrogate:
    """Sign becomes clip(x, -1, 1); on finer grids each threshold is smoothed over two step sizes.

    >>> from fogzo.quantizers import SIGN, Quantizer, fixed_scale
    >>> w = torch.tensor([[0.2, -0.9, 1.1]], requires_grad=True)
    >>> q = Quantizer(SIGN, fixed_scale(1.0), hardtanh())(w, torch.ones(1, 1))
    >>> q.sum().backward()
    >>> q.tolist(), w.grad.tolist()
    ([[1.0, -1.0, 1.0]], [[1.0, 1.0, 0.0]])
    """
    return _from_law("hardtanh", Uniform(2.0))


def tanh(tau: float = 1.0) -> Surrogate:
    """The slope of tanh: sign becomes tanh(tau x), finer grids a sum of tanh steps, as in DSQ.

    >>> from fogzo.quantizers import SIGN, Quantizer, fixed_scale
    >>> w = torch.tensor([[0.0, 1.0]], requires_grad=True)
    >>> Quantizer(SIGN, fixed_scale(1.0), tanh())(w, torch.ones(1, 1)).sum().backward()
    >>> [round(slope, 4) for slope in w.grad[0].tolist()]  # 1 - tanh(x)^2
    [1.0, 0.42]
    """
    return _from_law("tanh", Logistic(tau))


def approx_sign() -> Surrogate:
    """Sign becomes the polynomial 2x - x|x| on (-1, 1) (Bi-Real Net's ApproxSign).

    On unit-spaced grids the same triangle is TPDF dither: the identity inside, ramps at the ends.

    >>> from fogzo.quantizers import SIGN, Quantizer, fixed_scale
    >>> w = torch.tensor([[0.0, -0.5, 1.5]], requires_grad=True)
    >>> Quantizer(SIGN, fixed_scale(1.0), approx_sign())(w, torch.ones(1, 1)).sum().backward()
    >>> w.grad.tolist()  # 2 - 2|x|
    [[2.0, 1.0, 0.0]]
    """
    return _from_law("approx_sign", Triangular(1.0))


def erf(sigma: float = 0.5) -> Surrogate:
    """Gaussian smoothing: sign becomes erf(x / (sqrt(2) sigma))."""
    return _from_law("erf", Normal(sigma))


def stable_qat(
    spacing: float = 1.0, amplitude: float = 0.21, normalized: bool = False
) -> Surrogate:
    """StableQAT's slope: 1 at thresholds, .03 at the centres of levels, 0 beyond the range.

    Its mean is .30, so plain SGD needs a larger learning rate than with the identity;
    ``normalized=True`` divides by the mean. Adam hardly notices either way. Where weights are
    spread evenly FOGZO measures an agreement of 6.1 (normalized 1.8) and not 1, as weights round
    differently just where this slope, and so their move, is largest.

    >>> from fogzo.quantizers import uniform
    >>> x = torch.tensor([0.0, 0.25, 0.5, 1.0, 9.0])
    >>> [round(slope, 4) for slope in stable_qat().slope(x, uniform(3)).tolist()]
    [0.0347, 0.205, 1.0, 0.0347, 0.0]

    Args:
        spacing: Of the grid's levels.
        amplitude: A of the paper; 0 is the masked identity.
        normalized: Divide by the mean, which makes it the slope of a smoothed staircase.
    """
    law = Crest(amplitude, spacing)
    if normalized:
        return Surrogate("stable_qat", law, law)
    return Surrogate("stable_qat", None, law, kernel=_SlopeOfCrest(law))


@dataclass(frozen=True)
class _SlopeOfCrest:
    """No partial function, of which no two are equal, as quantizers should be."""

    law: Crest

    def __call__(self, z: Tensor) -> Tensor:
        return self.law.slope(z) / self.law.width


def _from_law(name: str, law: SmoothingLaw) -> Surrogate:
    return Surrogate(name, law, law)


# Identity-like rules are as wide as the grid's spacing, so on the sign grid they are hardtanh's.
_AS_WIDE_AS_THE_GRID: dict[str, Callable[[float], Surrogate]] = {
    "identity": identity,
    "identity_unmasked": identity_unmasked,
    "trust": trust,
    "stable_qat": stable_qat,
    "adjacent": lambda spacing: adjacent(spacing=spacing),
}
_FIXED_WIDTH: dict[str, Callable[[], Surrogate]] = {
    "hardtanh": hardtanh,
    "tanh": tanh,
    "approx_sign": approx_sign,
    "erf": erf,
}
DRAWN_SURROGATE_NAMES = ("adjacent",)
"""Of those whose slope depends on the level that was drawn: for ``stochastic=True``."""
SURROGATE_NAMES = tuple(
    name for name in (*_AS_WIDE_AS_THE_GRID, *_FIXED_WIDTH) if name not in DRAWN_SURROGATE_NAMES
)
"""Of surrogates for any kind of rounding."""


def resolve_surrogate(surrogate: str | Surrogate, grid: Grid) -> Surrogate:
    """The surrogate of that name for that grid; a `Surrogate` is returned as it is.

    One that was made here for a grid of another spacing is made anew, so that a quantizer's grid
    can be replaced.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(surrogate, Surrogate):
        if surrogate._spacing is None or surrogate._spacing == grid.spacing:
            return surrogate
        surrogate = surrogate.name
    if isinstance(surrogate, str) and surrogate in _AS_WIDE_AS_THE_GRID:
        require_type("grid", grid, Grid, f'resolve_surrogate("{surrogate}", uniform(2))')
        made = _AS_WIDE_AS_THE_GRID[surrogate](grid.spacing)
        object.__setattr__(made, "_spacing", grid.spacing)
        return made
    if isinstance(surrogate, str) and surrogate in _FIXED_WIDTH:
        return _FIXED_WIDTH[surrogate]()
    names = (*SURROGATE_NAMES, *DRAWN_SURROGATE_NAMES)
    close = get_close_matches(str(surrogate), SURROGATE_NAMES, n=1)
    suggestion = close[0] if close else "identity"
    raise ValueError(
        f"unknown surrogate {surrogate!r}: use one of {', '.join(names)}, "
        f'for example fogzo.fixed(bits=2, surrogate="{suggestion}"), or a Surrogate object'
    )
