"""The share q = 1 - beta of noise in a direction, over training.

The paper's beta falls linearly from 1. Its complement is what is stored here, as a Python float:
beta itself would lose q = 1e-9 to float32, and the choice of a good q depends on how many
weights are perturbed, which ``kappa = q d / (n beta)``, the noise-to-signal power of one
refined gradient, takes into account.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from fogzo.quantizers.checks import is_number, require_count

NoiseShare = Callable[[int], float | None]
"""The noise share at a step, or None while the first-order gradient is to be left alone."""


DEFAULT_KAPPA = 1e-3
"""So little that no optimizer notices. Muon, which makes full steps of noise, loses by 0.01."""


def noise_share_from_kappa(kappa: float, num_weights: int, num_samples: int = 1) -> float:
    """``q = kappa n / (d + kappa n)``.

    Raises:
        ValueError: If kappa is negative or not finite, or a count is not positive.
    """
    check_kappa(kappa)
    require_count("num_weights", num_weights, "num_weights=sum(w.param.numel() for w in weights)")
    require_count("num_samples", num_samples, "num_samples=1")
    return kappa * num_samples / (num_weights + kappa * num_samples)


def kappa_from_noise_share(noise_share: float, num_weights: int, num_samples: int = 1) -> float:
    """``kappa = q d / (n beta)``, infinite for pure noise."""
    if noise_share == 1:
        return math.inf
    return noise_share * num_weights / (num_samples * (1 - noise_share))


@dataclass(frozen=True)
class LinearNoiseShare:
    """Zero at ``start_step``, then linear to kappa's share at ``total_steps``; None before.

    Attributes:
        kappa: Noise-to-signal power at the end; None is `DEFAULT_KAPPA`.
        start_step: First step that is refined at all.
        total_steps: Steps of the whole run.
        num_weights: d, which the estimator fills in, as it does n: kappa is said once.
        num_samples: n.
    """

    kappa: float | None
    start_step: int
    total_steps: int
    num_weights: int | None = None
    num_samples: int | None = None

    def bind(self, num_weights: int, num_samples: int) -> "LinearNoiseShare":
        """The schedule of an estimator with these numbers.

        Raises:
            ValueError: If it was made for others.
        """
        for name, own, given in (
            ("num_weights", self.num_weights, num_weights),
            ("num_samples", self.num_samples, num_samples),
        ):
            if own not in (None, given):
                raise ValueError(
                    f"the schedule was made for {name}={own}, but this estimator has {given}: "
                    f"leave {name} out, linear_noise_share(kappa=..., total_steps=...), and the "
                    "estimator fills it in"
                )
        return replace(self, num_weights=num_weights, num_samples=num_samples)

    def __call__(self, step: int) -> float | None:
        """The share at a step counted from 0.

        Raises:
            ValueError: If the number of weights is not known.
        """
        if step < self.start_step:
            return None
        done = (step - self.start_step) / (self.total_steps - self.start_step)
        return self.final * min(done, 1.0)

    @property
    def final(self) -> float:
        """Noise share at the end, the paper's 1 - beta_min."""
        if self.num_weights is None:
            raise ValueError(
                "the share depends on the number of weights, which the estimator fills in: "
                "FogzoEstimator(weights, noise_share=schedule); to read the schedule by itself, "
                "linear_noise_share(..., num_weights=sum(w.param.numel() for w in weights))"
            )
        kappa = DEFAULT_KAPPA if self.kappa is None else self.kappa
        return noise_share_from_kappa(kappa, self.num_weights, self.num_samples or 1)


def linear_noise_share(
    *,
    total_steps: int,
    kappa: float | None = None,
    start: float = 0.0,
    num_weights: int | None = None,
    num_samples: int | None = None,
) -> LinearNoiseShare:
    """The paper's schedule: beta = 1 at switch-on, falling linearly to the end of training.

    Args:
        total_steps: Optimizer steps of the whole run.
        kappa: Noise-to-signal power at the end, by default 1e-3. Small networks and plain SGD
            tolerate 0.1 to 1, which revives masked weights faster; Adam and Muon less.
        start: Fraction of the run that is plain STE before; .7 is the paper's
            "70% STE + 30% FOGZO".
        num_weights: d, how many weights are perturbed. Only to read a schedule that no estimator
            has: each knows its own.
        num_samples: n, likewise.

    Raises:
        ValueError: If a count is not positive, kappa is negative or start is outside [0, 1).

    >>> schedule = linear_noise_share(total_steps=100, kappa=1.0, start=0.5, num_weights=999)
    >>> [schedule(step) for step in (0, 50, 75, 100)]
    [None, 0.0, 0.0005, 0.001]
    """
    total_steps = require_count("total_steps", total_steps, "total_steps=1000")
    if not (is_number(start) and 0 <= start < 1):
        raise ValueError(
            f"start is the fraction of steps before FOGZO, in [0, 1), got {start!r}: "
            "start=0.7 for 70% STE and 30% FOGZO"
        )
    if kappa is not None:
        check_kappa(kappa)
        kappa = float(kappa)  # of NumPy perhaps, whose float32 would spread to every share
    if num_weights is not None:
        num_weights = require_count(
            "num_weights", num_weights, "num_weights=sum(w.param.numel() for w in weights)"
        )
    if num_samples is not None:
        num_samples = require_count("num_samples", num_samples, "num_samples=1")
    # At least the last step is refined, or a short run would never see what was asked for.
    start_step = min(round(start * total_steps), total_steps - 1)
    return LinearNoiseShare(kappa, start_step, total_steps, num_weights, num_samples)


@dataclass(frozen=True)
class EveryNoiseShare:
    """A schedule at every ``interval``-th step, and None, plain STE, in between.

    Attributes:
        interval: Steps from one refined step to the next.
        noise_share: The schedule.
    """

    interval: int
    noise_share: NoiseShare

    def bind(self, num_weights: int, num_samples: int) -> "EveryNoiseShare":
        """The schedule of an estimator with these numbers."""
        return replace(self, noise_share=bind(self.noise_share, num_weights, num_samples))

    def __call__(self, step: int) -> float | None:
        """The share at a step counted from 0."""
        return None if step % self.interval else self.noise_share(step)


def every(interval: int, noise_share: float | NoiseShare) -> EveryNoiseShare:
    """Probe at every ``interval``-th step only, for 1/interval of the extra forward passes.

    The mean over steps is then the mixture of ``1 - 1/interval`` of STE's gradient and
    ``1/interval`` of FOGZO's, and the noise of the probes is as much rarer.

    Raises:
        ValueError: If the interval is not a positive integer.

    >>> schedule = every(2, linear_noise_share(total_steps=4, kappa=1.0, num_weights=999))
    >>> [schedule(step) for step in range(5)]
    [0.0, None, 0.0005, None, 0.001]
    """
    interval = require_count("interval", interval, "interval=4")
    return EveryNoiseShare(interval, as_noise_share(noise_share))


@dataclass(frozen=True)
class ConstantNoiseShare:
    """The same share in every step."""

    share: float

    def __call__(self, step: int) -> float:
        """The share."""
        return self.share


@dataclass(frozen=True)
class _Checked:
    """A schedule of the user's, whose every value is checked."""

    noise_share: NoiseShare

    def bind(self, num_weights: int, num_samples: int) -> "_Checked":
        return replace(self, noise_share=bind(self.noise_share, num_weights, num_samples))

    def __call__(self, step: int) -> float | None:
        share = self.noise_share(step)
        return None if share is None else check_noise_share(share)


def bind(noise_share: NoiseShare, num_weights: int, num_samples: int) -> NoiseShare:
    """The schedule with an estimator's numbers, if it wants them."""
    own: Any = getattr(noise_share, "bind", None)
    return noise_share if own is None else cast(NoiseShare, own(num_weights, num_samples))


def as_noise_share(noise_share: float | NoiseShare) -> NoiseShare:
    """A checked function of the step, from one or from a constant.

    Raises:
        ValueError: If a constant is outside [0, 1); the function raises it too.
    """
    if callable(noise_share):
        return _Checked(noise_share)
    return ConstantNoiseShare(check_noise_share(noise_share))


def check_noise_share(noise_share: float) -> float:
    """The share as a Python float.

    Raises:
        ValueError: If it is outside [0, 1).
    """
    try:
        share = math.nan if isinstance(noise_share, bool | str) else float(noise_share)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 <= share < 1:
        raise ValueError(
            f"noise_share is q = 1 - beta, in [0, 1), got {noise_share!r:.80}: leave it out for "
            f"a kappa of {DEFAULT_KAPPA:g}, or noise_share=fogzo.linear_noise_share(total_steps="
            "1000, kappa=0.01); for pure noise use fogzo.SpsaEstimator"
        )
    return share


def check_kappa(kappa: float) -> None:
    """Raise a `ValueError` unless it is a power: 0 or more, and finite."""
    if not (is_number(kappa) and 0 <= kappa < math.inf):
        raise ValueError(
            f"kappa is a noise-to-signal power, 0 or more and finite, got {kappa!r}: for "
            "example kappa=1e-3; small networks under SGD bear 0.1 to 1"
        )
