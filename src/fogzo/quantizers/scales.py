"""Scales: where the step size of each group of values comes from."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fogzo.quantizers.checks import require_positive
from fogzo.quantizers.grids import Grid
from fogzo.quantizers.step_sizes import MIN_STEP_SIZE, without_a_step_size

Rule = Literal["mse", "rms", "quest", "abs_mean", "lsq", "max", "range", "bell", "bell_wide"]
_KINDS = ("fixed", "learned", "dynamic")


@dataclass(frozen=True)
class Scale:
    """A rule that finds step sizes from weights, and when it is applied.

    Attributes:
        rule: How `measure` finds a step size.
        kind: ``"fixed"`` measures once and keeps it in a buffer, ``"learned"`` measures once and
            trains it (LSQ), ``"dynamic"`` measures the current weights at every forward pass.
        value: For fixed scales, the step size itself instead of a rule.
        detached: Whether gradients stop at a measured step size. If not, they pass through the
            rms, for dynamic scales that are a multiple of it.
    """

    rule: Rule
    kind: Literal["fixed", "learned", "dynamic"]
    value: float | None = None
    detached: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.rule, str) and self.rule in _RULES):
            raise ValueError(
                f"unknown rule {self.rule!r} for a step size: use one of {', '.join(_RULES)}, "
                'for example fixed_scale(init="mse")'
            )
        if self.kind not in _KINDS:
            raise ValueError(
                f"kind must be one of {', '.join(_KINDS)}, got {self.kind!r}: "
                'for example Scale("mse", "fixed"), or learned_scale()'
            )
        if not self.detached and (self.kind != "dynamic" or self.rule not in _MULTIPLES_OF_RMS):
            raise ValueError(
                "gradients pass through dynamic multiples of the rms only, of the rules "
                f"{', '.join(_MULTIPLES_OF_RMS)}, got the rule {self.rule!r} of a {self.kind} "
                "scale: for example rms_scale(detached=False), or fogzo.bbq(2, learned=False)"
            )
        if self.value is None:
            return
        example = "fogzo.fixed(2, step_size=0.05) or fixed_scale(0.05), or none to measure it"
        require_positive("step_size", self.value, example)
        if self.value < MIN_STEP_SIZE:
            raise ValueError(
                f"step_size must be {MIN_STEP_SIZE:g} or more, the smallest that is used, got "
                f"{self.value!r}: for example {example}"
            )
        if self.kind == "dynamic":
            raise ValueError(
                f"a dynamic scale measures its step size in every forward pass, but "
                f"value={self.value!r} was given: fixed_scale({self.value!r})"
            )
        object.__setattr__(self, "value", float(self.value))

    @property
    def has_state(self) -> bool:
        """Whether the step sizes are kept between forward passes."""
        return self.kind != "dynamic"

    def measure(self, groups: Tensor, grid: Grid) -> Tensor:
        """Step sizes, of shape (groups, 1), for weights of shape (groups, group size)."""
        if self.value is not None:
            return groups.new_full((len(groups), 1), self.value)
        return _RULES[self.rule](groups.detach(), grid)

    def measure_once(
        self, groups: Tensor, grid: Grid, fan_in: int, smallest: float
    ) -> tuple[Tensor, Tensor]:
        """Step sizes to keep, of shape (groups, 1), and which of them could not be measured.

        A group of zeros, or of weights that are next to nothing beside the layer's others, has no
        step size with which it could be trained. It gets the median of the other groups; where all
        are such groups, what the rule finds for torch's default initialization.

        Args:
            groups: Weights of shape (groups, group size).
            grid: The levels.
            fan_in: Inputs that each output of the layer has.
            smallest: The smallest step size that is worth keeping.
        """
        step = self.measure(groups, grid)
        empty = without_a_step_size(step, smallest)
        if self.value is not None or not bool(empty.any()):
            return step, torch.zeros_like(empty)
        others = step[~empty]
        if not len(others):
            bound = 1 / math.sqrt(fan_in)
            default = torch.linspace(-bound, bound, 1001, dtype=step.dtype, device=step.device)
            others = self.measure(default.reshape(1, -1), grid)
        return step.where(~empty, others.median()), empty

    def grad_scale(self, size: int, grid: Grid) -> float:
        """LSQ's gradient scale ``1 / sqrt(size * largest level)`` (arXiv 1902.08153).

        Args:
            size: Weights that share the step, or features of an activation.
            grid: The levels.
        """
        return 1 / math.sqrt(size * _largest(grid)) if self.kind == "learned" else 1.0


def fixed_scale(value: float | None = None, init: Rule | None = None) -> Scale:
    """A constant step size: `value`, or what a rule finds when the layer is quantized.

    Args:
        value: The step size.
        init: The rule, by default ``"mse"``.

    Raises:
        ValueError: If both are given, or one is none.
    """
    if value is not None and init is not None:
        raise ValueError(
            f"a step size of {value!r} needs no rule to measure it by, got init={init!r}: "
            f"fogzo.fixed(2, step_size={value!r}) or fixed_scale({value!r}), or init alone"
        )
    return Scale("mse" if init is None else init, "fixed", value)


def learned_scale(init: Rule = "lsq") -> Scale:
    """A trained step size (LSQ). ``init="rms"`` is LSQ+'s start, the optimum for a Gaussian."""
    return Scale(init, "learned")


def rms_scale(rule: Literal["rms", "quest"] = "rms", detached: bool = True) -> Scale:
    """The best step size for a Gaussian of the weights' current rms.

    ``"quest"`` takes the constants that QuEST published (arXiv 2502.05003), so that its models
    quantize to the same weights here; ``"rms"`` solves for the optimum (1% wider at 8 bits).
    Not detached, the step size's own dependence on the weights has a gradient, too.

    Raises:
        ValueError: If the rule is another.
    """
    if rule not in ("rms", "quest"):
        raise ValueError(
            f'rms_scale takes the rule "rms" or "quest", got {rule!r}: for example '
            'rms_scale("quest"); any rule makes a dynamic scale by Scale("mse", "dynamic")'
        )
    return Scale(rule, "dynamic", detached=detached)


def abs_mean_scale() -> Scale:
    """The weights' current mean magnitude (BitNet b1.58, XNOR-Net)."""
    return Scale("abs_mean", "dynamic")


def max_scale() -> Scale:
    """The current largest magnitude falls on the largest level (BitNet's activations)."""
    return Scale("max", "dynamic")


def _largest(grid: Grid) -> float:
    """The largest level; of the 1-bit integer grid {-1, 0}, where that is zero, its other one."""
    return grid.high or -grid.low


def _rms(groups: Tensor, grid: Grid) -> Tensor:
    return grid.gaussian_step_size * groups.square().mean(1, keepdim=True).sqrt() + MIN_STEP_SIZE


# QuEST's end level of a half-integer grid on a unit Gaussian, by number of levels.
_QUEST_EDGE = {2: 0.7978845, 4: 1.4935346, 8: 2.0510684, 16: 2.5139306, 256: 3.884939}


def _quest(groups: Tensor, grid: Grid) -> Tensor:
    if grid.offset == 0 or grid.num_levels not in _QUEST_EDGE:
        return _rms(groups, grid)
    rms = groups.square().mean(1, keepdim=True).sqrt()
    return (_QUEST_EDGE[grid.num_levels] * rms + MIN_STEP_SIZE) / grid.high


def _abs_mean(groups: Tensor, grid: Grid) -> Tensor:
    return groups.abs().mean(1, keepdim=True)


def _lsq(groups: Tensor, grid: Grid) -> Tensor:
    # LSQ's Qp, generalised to the largest level so that half-integer grids have one too.
    return 2 * groups.abs().mean(1, keepdim=True) / math.sqrt(_largest(grid))


def _max(groups: Tensor, grid: Grid) -> Tensor:
    return groups.abs().amax(1, keepdim=True) / _largest(grid)


def _range(groups: Tensor, grid: Grid) -> Tensor:
    # The largest magnitude falls on the outer edge of the end cell: ParetoQ's SEQ levels.
    return groups.abs().amax(1, keepdim=True) * 2 / (grid.num_levels * grid.spacing)


def _bell(groups: Tensor, grid: Grid, reach: float = 1.694) -> Tensor:
    rms = groups.square().mean(1, keepdim=True).sqrt()
    return reach * rms * 2 / (grid.num_levels * grid.spacing) + MIN_STEP_SIZE


def _bell_wide(groups: Tensor, grid: Grid) -> Tensor:
    return _bell(groups, grid, reach=2.45)


def _mse(groups: Tensor, grid: Grid) -> Tensor:
    """The step size of least squared error on these weights: a scan, then finer ones.

    Layers are often initialised uniformly, not as Gaussians, so the closed form is only the start.
    """
    centre = _rms(groups, grid)
    low, high = torch.full_like(centre, 0.05), (_max(groups, grid) / centre).clamp(min=2.0)
    for count in (32, 16, 16):
        # In equal ratios, as outliers can put the best one far from the Gaussian's.
        ratio = (high / low) ** (1 / count)
        best, best_error = centre, torch.full_like(centre, math.inf)
        for power in range(count + 1):
            step = centre * low * ratio**power
            error = (grid.round(groups / step) * step - groups).square().mean(1, keepdim=True)
            best, best_error = (
                torch.where(error < best_error, step, best),
                torch.minimum(error, best_error),
            )
        centre, low, high = best, 1 / ratio, ratio
    return centre


_RULES = {
    "mse": _mse,
    "rms": _rms,
    "quest": _quest,
    "abs_mean": _abs_mean,
    "lsq": _lsq,
    "max": _max,
    "range": _range,
    "bell": _bell,
    "bell_wide": _bell_wide,
}
_MULTIPLES_OF_RMS = ("rms", "quest", "bell", "bell_wide")
