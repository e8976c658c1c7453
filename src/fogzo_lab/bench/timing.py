"""Functions timed against each other for as long as a benchmark's limits allow."""

import math
import time
from collections.abc import Callable, Mapping

import torch

from fogzo_lab.bench.config import Limits
from fogzo_lab.interleaved import Timed, Turns, take_turns
from fogzo_lab.system.devices import synchronize

Clock = Callable[[], float]
Alternatives = Mapping[str, Callable[[], object]]

_WARM_UPS = 2
_FEWEST_ROUNDS = 7
# Seconds. A shorter turn would measure the change of turns: cold caches, the clock itself.
_SHORTEST_TURN = 4e-3


def time_in_turns(
    alternatives: Alternatives,
    limits: Limits,
    device: torch.device,
    steps_per_call: int = 1,
    clock: Clock = time.perf_counter,
) -> Turns:
    """Time alternatives against each other, for about as long as the limits say.

    Args:
        alternatives: What to call, by name.
        limits: Most rounds, and seconds in all.
        device: Whose queue a turn waits for.
        steps_per_call: Seconds are divided by it.
        clock: Returns seconds.
    """
    timed = {name: stopwatch(f, device, steps_per_call, clock) for name, f in alternatives.items()}
    return turns_within(timed, limits, steps_per_call)


def turns_within(timed: Mapping[str, Timed], limits: Limits, steps_per_call: int = 1) -> Turns:
    """The turns of what measures its own seconds, after a warm-up, for as long as the limits say.

    Args:
        timed: By name, what makes so many calls and returns their seconds.
        limits: Most rounds, and seconds in all.
        steps_per_call: What its seconds were divided by.
    """
    for turn in timed.values():
        turn(_WARM_UPS)
    once = {name: turn(1) * steps_per_call for name, turn in timed.items()}
    calls = {
        name: max(1, math.ceil(_SHORTEST_TURN / max(seconds, 1e-9)))
        for name, seconds in once.items()
    }
    round_seconds = sum(once[name] * calls[name] for name in timed)
    fitting = int(limits.seconds / max(round_seconds, 1e-9))
    rounds = min(limits.rounds, max(_FEWEST_ROUNDS, fitting))
    return take_turns(timed, calls, rounds)


def stopwatch(
    function: Callable[[], object],
    device: torch.device,
    steps_per_call: int = 1,
    clock: Clock = time.perf_counter,
) -> Timed:
    """A function that makes so many calls and returns the seconds, once the device has done them.

    Args:
        function: What to call.
        device: Whose queue it waits for.
        steps_per_call: Seconds are divided by it.
        clock: Returns seconds.
    """

    def turn(calls: int) -> float:
        synchronize(device)
        began = clock()
        for _ in range(calls):
            function()
        synchronize(device)
        return (clock() - began) / steps_per_call

    return turn
