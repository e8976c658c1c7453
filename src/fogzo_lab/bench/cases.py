"""Cases: the rows of a benchmark, of what was measured and of what could not be."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fogzo_lab.interleaved import Spread, Turns

Facts = Mapping[str, float | str | bool | None]


class NotHereError(Exception):
    """This machine lacks what a case needs; the message says what."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row.

    Attributes:
        name: What people call it.
        facts: What was measured on, and numbers that no clock gave.
        rounds: How many rounds were timed.
        seconds: The median of each alternative, per step.
        ratios: Medians and quartiles over rounds of ratios within a round.
        skipped: Why there are no numbers, or None.
    """

    name: str
    facts: Facts = field(default_factory=dict)
    rounds: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    ratios: Mapping[str, Spread] = field(default_factory=dict)
    skipped: str | None = None


def timed(name: str, turns: Turns, ratios: Mapping[str, Spread], facts: Facts) -> Case:
    """A case of an interleaved comparison."""
    return Case(
        name=name, facts=facts, rounds=len(turns.rounds), seconds=turns.seconds(), ratios=ratios
    )


def attempt(name: str, facts: Facts, measure: Callable[[], Case]) -> Case:
    """What a function measures, or a row with the reason why it could not.

    One case that fails must not cost the others, which may have taken minutes: hence any error.
    """
    try:
        return measure()
    except Exception as error:
        return Case(name=name, facts=facts, skipped=reason(error))


def reason(error: Exception) -> str:
    """Why a case was skipped, in one line."""
    if isinstance(error, NotHereError):
        return str(error)
    if isinstance(error, ImportError) and error.name:
        return f"{error.name.partition('.')[0]} is not installed"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.150}" if lines else type(error).__name__
