"""What the measured slopes are combined to."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fogzo.probing.directions import Probe


class Combination(NamedTuple):
    """The refined gradient ``guide * g + sum_i noise_i * u_i / eps``."""

    guide: float
    noise: list[tuple[int, float]]
    agreement: float | None = None


def mean_along_probes(probes: Sequence[Probe], slopes: Sequence[float], norm: float) -> Combination:
    """The two-point estimate: the mean over probes of ``slope * v``."""
    count = len(probes)
    guide = math.fsum(s * probe.guide for s, probe in zip(slopes, probes, strict=True)) / count
    noise = [(p.sample, s * p.noise / count) for s, p in zip(slopes, probes, strict=True)]
    return Combination(guide / norm if guide else 0.0, noise)
