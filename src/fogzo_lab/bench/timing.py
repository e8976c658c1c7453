"""Timing in turns: what is compared takes turns in one process, and ratios within a round count.

A machine is slow for a moment now and then. Where one alternative is timed after the other, such a
moment hits one of them; in turns it hits all alike and falls out of the ratio.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fogzo_lab.bench.config import Limits

Clock = Callable[[], float]
Alternatives = Mapping[str, Callable[[], object]]

_WARM_UPS = 2
_FEWEST_ROUNDS = 7
# Seconds. A shorter turn would measure the change of turns: cold caches, the clock itself.
_SHORTEST_TURN = 4e-3


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
    """What was timed: for every round the seconds of each alternative.

    Attributes:
        rounds: Seconds a call, or a step where a call makes several.
    """

    rounds: Sequence[Mapping[str, float]]

    def seconds(self) -> dict[str, float]:
        """The median seconds of each alternative."""
        return {name: statistics.median(r[name] for r in self.rounds) for name in self.rounds[0]}

    def ratio(self, name: str, base: str) -> Spread:
        """One alternative over another, within each round."""
        return self.spread(lambda seconds: seconds[name] / seconds[base])

    def spread(self, value: Callable[[Mapping[str, float]], float]) -> Spread:
        """Any number that follows from one round's seconds."""
        return Spread.of([value(seconds) for seconds in self.rounds])


def time_in_turns(
    alternatives: Alternatives,
    limits: Limits,
    device: torch.device,
    steps_a_call: int = 1,
    clock: Clock = time.perf_counter,
) -> Turns:
    """Time alternatives against each other, for about as long as the limits say.

    Args:
        alternatives: What to call, by name.
        limits: Most rounds, and seconds in all.
        device: Whose queue a turn waits for.
        steps_a_call: Seconds are divided by it.
        clock: Returns seconds.
    """
    for function in alternatives.values():
        for _ in range(_WARM_UPS):
            function()
    once = {name: _turn(function, 1, device, clock) for name, function in alternatives.items()}
    calls = {
        name: max(1, math.ceil(_SHORTEST_TURN / max(seconds, 1e-9)))
        for name, seconds in once.items()
    }
    round_seconds = sum(once[name] * calls[name] for name in alternatives)
    fitting = int(limits.seconds / max(round_seconds, 1e-9))
    rounds = min(limits.rounds, max(_FEWEST_ROUNDS, fitting))
    return take_turns(alternatives, calls, rounds, device, steps_a_call, clock)


def take_turns(
    alternatives: Alternatives,
    calls: Mapping[str, int],
    rounds: int,
    device: torch.device,
    steps_a_call: int = 1,
    clock: Clock = time.perf_counter,
) -> Turns:
    """Time alternatives for so many rounds, without warm-up.

    Args:
        alternatives: What to call, by name.
        calls: How often each is called in its turn.
        rounds: How many turns each has.
        device: Whose queue a turn waits for.
        steps_a_call: Seconds are divided by it.
        clock: Returns seconds.
    """
    measured = []
    order = list(alternatives)
    for _ in range(rounds):
        seconds = {
            name: _turn(alternatives[name], calls[name], device, clock) / steps_a_call
            for name in order
        }
        measured.append({name: seconds[name] for name in alternatives})
        order.reverse()  # so that nobody always follows the same neighbour
    return Turns(measured)


def _turn(function: Callable[[], object], calls: int, device: torch.device, clock: Clock) -> float:
    """Seconds of one call, the mean of so many."""
    _synchronize(device)
    began = clock()
    for _ in range(calls):
        function()
    _synchronize(device)
    return (clock() - began) / calls


def _synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
