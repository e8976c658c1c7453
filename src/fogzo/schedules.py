"""The share q = 1 - beta of noise in a direction, over training.

The paper's beta falls linearly from 1. Its complement is what is stored here, as a Python float:
beta itself would lose q = 1e-9 to float32, and the choice of a good q depends on how many
weights are perturbed, which ``kappa = q d / (n beta)``, the noise-to-signal power of one
refined gradient, takes into account.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

NoiseShare = Callable[[int], float | None]
"""The noise share at a step, or None while the first-order gradient is to be left alone."""


def default_kappa(num_weights: int) -> float:
    """1 up to about 1e5 weights, .01 from about 1e6: Adam on deep nets wants less noise."""
    return 1.0 if num_weights < 300_000 else 0.01


def noise_share_from_kappa(kappa: float, num_weights: int, num_samples: int = 1) -> float:
    """``q = kappa n / (d + kappa n)``.

    Raises:
        ValueError: If kappa is negative or not finite, or a count is not positive.
    """
    if not (kappa >= 0 and math.isfinite(kappa)):
        raise ValueError(
            f"kappa is a noise-to-signal power, 0 or more and finite, got {kappa}: try kappa=1.0 "
            "below 1e5 weights, kappa=0.01 for Adam and 1e6 or more"
        )
    _require_count("num_weights", num_weights, "sum(w.param.numel() for w in weights)")
    _require_count("num_samples", num_samples, "1")
    return kappa * num_samples / (num_weights + kappa * num_samples)


def kappa_from_noise_share(noise_share: float, num_weights: int, num_samples: int = 1) -> float:
    """``kappa = q d / (n beta)``, infinite for pure noise."""
    if noise_share == 1:
        return math.inf
    return noise_share * num_weights / (num_samples * (1 - noise_share))


@dataclass(frozen=True)
class LinearNoiseShare:
    """Zero at ``start_step``, then linear to ``final`` at ``total_steps``; None before.

    Attributes:
        final: Noise share at the end, the paper's 1 - beta_min.
        start_step: First step that is refined at all.
        total_steps: Steps of the whole run.
    """

    final: float
    start_step: int
    total_steps: int

    def __call__(self, step: int) -> float | None:
        """The share at a step counted from 0."""
        if step < self.start_step:
            return None
        done = (step - self.start_step) / (self.total_steps - self.start_step)
        return self.final * min(done, 1.0)


def linear_noise_share(
    *,
    num_weights: int,
    total_steps: int,
    kappa: float | None = None,
    num_samples: int = 1,
    start: float = 0.0,
) -> LinearNoiseShare:
    """The paper's schedule: beta = 1 at switch-on, falling linearly to the end of training.

    Args:
        num_weights: d, how many weights are perturbed.
        total_steps: Optimizer steps of the whole run.
        kappa: Noise-to-signal power at the end; by default chosen from ``num_weights``.
        num_samples: n, as given to the estimator.
        start: Fraction of the run that is plain STE before; .7 is the paper's
            "70% STE + 30% FOGZO".

    Raises:
        ValueError: If a count is not positive, kappa is negative or start is outside [0, 1).

    >>> schedule = linear_noise_share(num_weights=999, total_steps=100, kappa=1.0, start=0.5)
    >>> [schedule(step) for step in (0, 50, 75, 100)]
    [None, 0.0, 0.0005, 0.001]
    """
    _require_count("total_steps", total_steps, "1000")
    if not 0 <= start < 1:
        raise ValueError(
            f"start is the fraction of steps before FOGZO, in [0, 1), got {start}: "
            "start=0.7 for 70% STE and 30% FOGZO"
        )
    if kappa is None:
        kappa = default_kappa(num_weights)
    final = noise_share_from_kappa(kappa, num_weights, num_samples)
    return LinearNoiseShare(final, round(start * total_steps), total_steps)


@dataclass(frozen=True)
class EveryNoiseShare:
    """A schedule at every ``interval``-th step, and None, plain STE, in between.

    Attributes:
        interval: Steps from one refined step to the next.
        noise_share: The schedule.
    """

    interval: int
    noise_share: NoiseShare

    def __call__(self, step: int) -> float | None:
        """The share at a step counted from 0."""
        return None if step % self.interval else self.noise_share(step)


def every(interval: int, noise_share: float | NoiseShare) -> EveryNoiseShare:
    """Probe at every ``interval``-th step only, for 1/interval of the extra forwards.

    The mean over steps is then the mixture of ``1 - 1/interval`` of STE's gradient and
    ``1/interval`` of FOGZO's, and the noise of the probes is as much rarer.

    Raises:
        ValueError: If the interval is not a positive integer.

    >>> schedule = every(2, linear_noise_share(num_weights=999, total_steps=4, kappa=1.0))
    >>> [schedule(step) for step in range(5)]
    [0.0, None, 0.0005, None, 0.001]
    """
    _require_count("interval", interval, "4")
    return EveryNoiseShare(interval, as_noise_share(noise_share))


def as_noise_share(noise_share: float | NoiseShare) -> NoiseShare:
    """A checked function of the step, from one or from a constant.

    Raises:
        ValueError: If a constant is outside [0, 1); the function raises it too.
    """
    if not callable(noise_share):
        share = check_noise_share(noise_share)
        return lambda step: share

    def checked(step: int) -> float | None:
        share = noise_share(step)
        return None if share is None else check_noise_share(share)

    return checked


def check_noise_share(noise_share: float) -> float:
    """The share as a Python float.

    Raises:
        ValueError: If it is outside [0, 1).
    """
    share = float(noise_share)
    if not 0 <= share < 1:
        raise ValueError(
            f"noise_share is q = 1 - beta, in [0, 1), got {noise_share}: beta = 0.999 is "
            "noise_share=1e-3; for pure noise use fogzo.SpsaEstimator"
        )
    return share


def _require_count(name: str, value: int, example: str) -> None:
    if not (isinstance(value, int) and value >= 1):
        raise ValueError(f"{name} must be a positive integer, got {value!r}: {name}={example}")
