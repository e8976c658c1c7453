"""Interleaved timing: what is compared takes turns in one process, and ratios in a round count.

A machine is slow for a moment now and then. Where one alternative is timed after the other, such a
moment hits one of them; interleaved, it hits all alike and cancels in the ratio.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Timed = Callable[[int], float]
"""Runs so many times and returns the seconds that took."""


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value or more.

        >>> Spread.of([1.0, 2.0, 3.0, 4.0, 9.0])
        Spread(median=3.0, low=2.0, high=4.0)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Turns:
    """What was timed.

    Attributes:
        rounds: For every round, the seconds per call of each alternative.
    """

    rounds: Sequence[Mapping[str, float]]

    def seconds(self) -> dict[str, float]:
        """The median seconds of each alternative."""
        return {name: statistics.median(r[name] for r in self.rounds) for name in self.rounds[0]}

    def ratio(self, name: str, base: str) -> Spread:
        """One alternative over another, within each round."""
        return self.spread(lambda seconds: seconds[name] / seconds[base])

    def spread(self, value: Callable[[Mapping[str, float]], float]) -> Spread:
        """Any number that follows from the seconds of one round."""
        return Spread.of([value(seconds) for seconds in self.rounds])


def take_turns(alternatives: Mapping[str, Timed], calls: Mapping[str, int], rounds: int) -> Turns:
    """Time alternatives for so many rounds, without warm-up.

    Args:
        alternatives: What to time, by name.
        calls: How often each runs in its turn.
        rounds: How many turns each has.
    """
    measured = []
    order = list(alternatives)
    for _ in range(rounds):
        seconds = {name: alternatives[name](calls[name]) / calls[name] for name in order}
        measured.append({name: seconds[name] for name in alternatives})
        order.reverse()  # so that nobody always follows the same neighbour
    return Turns(measured)
