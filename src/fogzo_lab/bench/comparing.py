"""Comparing alternatives with one of them: a case each, and a reason where one does not work."""

from collections.abc import Callable, Iterator, Mapping

import torch

from fogzo_lab.bench.cases import Case, Facts, reason
from fogzo_lab.bench.config import Limits
from fogzo_lab.bench.timing import Alternatives, time_in_turns

Makers = Mapping[str, Callable[[], Callable[[], object]]]
"""By name, what builds the function to time."""


def compare(
    title: str,
    makers: Makers,
    base: str,
    facts: Facts,
    limits: Limits,
    device: torch.device,
    steps_per_call: int = 1,
) -> Iterator[Case]:
    """One case per alternative: its time over that of the base, by interleaved timing.

    Args:
        title: What is common to all.
        makers: The alternatives, the base among them.
        base: Which of them is 1.
        facts: Of every case, beside ``comparison``, ``alternative`` and ``base``.
        limits: Of the timing.
        device: Where the alternatives compute.
        steps_per_call: How many steps one call makes.
    """
    working, failures = _working(makers)
    turns = None
    if base in working:
        turns = time_in_turns(working, limits, device, steps_per_call)
    for name in makers:
        own = {"comparison": title, "alternative": name, "base": base, **facts}
        case_name = f"{title}: {name}"
        if turns is None or name in failures:
            why = failures.get(name) or f"{base} failed: {failures[base]}"
            yield Case(name=case_name, facts=own, skipped=why)
        else:
            yield Case(
                name=case_name,
                facts=own,
                rounds=len(turns.rounds),
                seconds={"step": turns.seconds()[name]},
                ratios={"over base": turns.ratio(name, base)},
            )


def _working(makers: Makers) -> tuple[Alternatives, dict[str, str]]:
    """What can be built and called, and why the rest cannot."""
    working, failures = {}, {}
    for name, make in makers.items():
        try:
            function = make()
            function()
        except Exception as error:  # another library's, or a compiler's, may be anything
            failures[name] = reason(error)
        else:
            working[name] = function
    return working, failures
