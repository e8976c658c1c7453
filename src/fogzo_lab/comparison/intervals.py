"""What differences between seeds allow one to say.

Winners are called by Student's interval of the differences, paired by seed. The percentile
bootstrap stands beside it and calls nothing: of five seeds it misses the truth one time in six
instead of one in twenty, because resampling so few differences shows too little of their spread.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch

RESAMPLES = 10_000
_SEED = 2510_23926


def paired_interval(gaps: Sequence[float]) -> dict[str, float]:
    """The mean of differences, with 95% intervals; those of one seed, or of infinite ones, are nan.

    >>> [round(x, 2) for x in paired_interval([1.0, 2.0, 3.0]).values()]
    [2.0, -0.48, 4.48, 1.0, 3.0]
    """
    low, high = student_interval(gaps)
    bootstrap_low, bootstrap_high = bootstrap_interval(gaps)
    return {
        "mean": mean(gaps),
        "low": low,
        "high": high,
        "bootstrap_low": bootstrap_low,
        "bootstrap_high": bootstrap_high,
    }


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95% interval of the mean."""
    if not _enough(values):
        return math.nan, math.nan
    from scipy.stats import t

    quantile = float(t.ppf(0.975, len(values) - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """The percentile bootstrap's 95% interval of the mean, the same at every call."""
    if not _enough(values):
        return math.nan, math.nan
    numbers = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(_SEED)
    picked = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = numbers[picked].mean(1).quantile(ends).tolist()
    return low, high


def mean(values: Iterable[float | None]) -> float:
    """The mean; infinite where one is not finite or missing, as the losses of diverged runs are."""
    numbers = [math.inf if value is None else value for value in values]
    return math.fsum(numbers) / len(numbers) if all(map(math.isfinite, numbers)) else math.inf


def spread(values: Sequence[float | None]) -> float:
    """The standard deviation, nan where there is none."""
    numbers = [value for value in values if value is not None]
    enough = len(numbers) == len(values) and _enough(numbers)
    return statistics.stdev(numbers) if enough else math.nan


def verdict(interval: dict[str, Any], more_is_better: bool) -> str | None:
    """``"better"`` or ``"worse"`` where the interval excludes zero, ``"open"`` where it does not.

    None where there is no interval.
    """
    low, high = interval["low"], interval["high"]
    if low is None or math.isnan(low):
        return None
    if low <= 0 <= high:
        return "open"
    return "better" if (low > 0) == more_is_better else "worse"


def _enough(values: Sequence[float]) -> bool:
    return len(values) > 1 and all(map(math.isfinite, values))
