"""Strengths over training: functions of the step, counted from 0."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor

from fogzo.quantizers.checks import is_number, require_count

Strength = Callable[[int], float]


@dataclass(frozen=True)
class _Ramp:
    strength: float
    total_steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        _check_ramp(self.strength, self.total_steps, self.start)


@dataclass(frozen=True)
class LinearRamp(_Ramp):
    """0 up to ``start``, then linear to ``strength`` in the last of ``total_steps``.

    >>> [round(LinearRamp(10.0, 10, 0.8)(step), 1) for step in (0, 7, 8, 9)]
    [0.0, 0.0, 5.0, 10.0]
    """

    def __call__(self, step: int) -> float:
        """The strength at a step."""
        # Not in the last step in float of `quantize_from` with this start, which rounds so.
        if step < min(round(self.start * self.total_steps), self.total_steps - 1):
            return 0.0
        return self.strength * _done((step + 1) / self.total_steps, self.start)


@dataclass(frozen=True)
class CosineRamp(_Ramp):
    """0 up to ``start``, then half a cosine up to ``strength`` at ``total_steps``.

    >>> [round(CosineRamp(0.1, 8, 0.5)(step), 3) for step in (0, 4, 6, 8)]
    [0.0, 0.0, 0.05, 0.1]
    """

    def __call__(self, step: int) -> float:
        """The strength at a step."""
        done = _done(step / self.total_steps, self.start)
        return self.strength * (1 - math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Periodic:
    """``strength`` in every ``every``-th step, 0 in the others.

    >>> [Periodic(0.8, 3)(step) for step in range(6)]
    [0.0, 0.0, 0.8, 0.0, 0.0, 0.8]
    """

    strength: float
    every: int

    def __post_init__(self) -> None:
        check_strength(self.strength)
        check_count("every", self.every, "every=100")

    def __call__(self, step: int) -> float:
        """The strength at a step."""
        return 0.0 if (step + 1) % self.every else self.strength


def as_strength(strength: float | Strength) -> Strength:
    """A function of the step, from one or from a number.

    Raises:
        ValueError: If it is neither, or negative.
    """
    if callable(strength):
        return strength
    check_strength(strength)
    return Periodic(float(strength), 1)


def strength_at(strength: Strength, step: int) -> float:
    """What a function of the step says at one.

    Raises:
        ValueError: If that is no number, negative or not finite.
    """
    value: object = strength(step)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not _is_strength(value):
        raise ValueError(
            f"strength must be a finite number, 0 or more, at every step, got {value!r:.80} at "
            f"step {step}: strength=lambda step: 10.0 * min(step / 1000, 1.0)"
        )
    return float(value)


def check_strength(strength: object) -> None:
    """Raise a `ValueError` unless it is a number, 0 or more."""
    if not _is_strength(strength):
        raise ValueError(
            f"strength must be 0 or more, or a function of the step, got {strength!r}: "
            "strength=10.0, or strength=lambda step: 10.0 * step / 1000"
        )


def check_count(name: str, value: int, example: str) -> None:
    """Raise a `ValueError` unless it is a positive integer, of Python or NumPy."""
    require_count(name, value, f"for example {example}")


def check_start(start: object) -> None:
    """Raise a `ValueError` unless it is a fraction of a run, 0 to 1."""
    if not (is_number(start) and 0 <= start <= 1):
        raise ValueError(
            f"start must be a fraction of the run, from 0 to 1, got {start!r}: for example "
            "start=0.5, which is step 500 of total_steps=1000"
        )


def _is_strength(value: object) -> TypeGuard[float]:
    return is_number(value) and 0 <= value < math.inf


def _check_ramp(strength: float, total_steps: int, start: float) -> None:
    check_strength(strength)
    check_count("total_steps", total_steps, "total_steps=10_000")
    check_start(start)
    if start == 1:
        raise ValueError("got start=1, at which the run is over: for example start=0.8")


def _done(progress: float, start: float) -> float:
    """How much of a ramp lies behind, 0 to 1."""
    return min(max((progress - start) / (1 - start), 0.0), 1.0)
