"""What differences between seeds allow one to say: means, spreads and Student's paired interval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "worse", "not significant"]

NO_NUMBER = math.nan
"""Where there is no interval or no spread: of one seed, or where one of them diverged."""

_ROUNDING = 1e-12  # of the mean; a spread below it is none


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over seeds.

    Attributes:
        mean: Infinite where a seed diverged.
        sd: NaN where a seed diverged, or there is only one.
    """

    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Summary":
        """Of one value per seed, None where the seed diverged.

        >>> Summary.of([1.0, 2.0, 3.0])
        Summary(mean=2.0, sd=1.0)
        """
        numbers = [math.inf if value is None else value for value in values]
        return cls(mean(numbers), statistics.stdev(numbers) if _enough(numbers) else NO_NUMBER)


@dataclass(frozen=True)
class Interval:
    """A mean difference and Student's 95% interval of it.

    Attributes:
        mean: Infinite where a difference is.
        low: Lower end; NaN where there is no interval.
        high: Upper end; NaN where there is no interval.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, gaps: Sequence[float]) -> "Interval":
        """Of differences, one per seed.

        >>> found = Interval.of([1.0, 2.0, 3.0])
        >>> round(found.low, 2), round(found.high, 2)
        (-0.48, 4.48)
        """
        return cls(mean(gaps), *student_interval(gaps))

    @classmethod
    def paired(cls, ours: Sequence[float | None], theirs: Sequence[float | None]) -> "Interval":
        """Of ours minus theirs, seed by seed; None where a seed diverged."""
        pairs = zip(ours, theirs, strict=True)
        return cls.of([math.inf if a is None or b is None else a - b for a, b in pairs])

    @property
    def exists(self) -> bool:
        """Whether there is an interval, and not only a mean."""
        return not math.isnan(self.low)

    def verdict(self, more_is_better: bool) -> Verdict | None:
        """What it says of the first of the two; None where there is no interval."""
        if not self.exists:
            return None
        if self.low <= 0 <= self.high:
            return "not significant"
        return "better" if (self.low > 0) == more_is_better else "worse"


def mean(values: Sequence[float]) -> float:
    """The mean; infinite where one is not finite, as the losses of diverged runs are."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95% interval of the mean; NaN where there is none.

    Equal values other than zero have none: two seeds that gain the same three test images say
    nothing of how much others would scatter.
    """
    if not _enough(values):
        return NO_NUMBER, NO_NUMBER
    from scipy.special import stdtrit  # scipy.stats takes three times as long to import

    centre, spread = mean(values), statistics.stdev(values)
    if spread <= _ROUNDING * abs(centre) and centre != 0:
        return NO_NUMBER, NO_NUMBER
    half = float(stdtrit(len(values) - 1, 0.975)) * spread / math.sqrt(len(values))
    return centre - half, centre + half


def _enough(values: Sequence[float]) -> bool:
    return len(values) > 1 and all(map(math.isfinite, values))
