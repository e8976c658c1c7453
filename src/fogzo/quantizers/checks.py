"""Checks of arguments: what came, what was expected and the corrected call."""

import math
import operator
from numbers import Real
from typing import TypeGuard, cast


def is_int(value: object) -> bool:
    """Whether it is an integer, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, and not a truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def require_positive(name: str, value: object, example: str) -> None:
    """Raise a `ValueError` unless it is a positive, finite number."""
    if not (is_number(value) and math.isfinite(value) and value > 0):
        raise ValueError(
            f"{name} must be a positive, finite number, got {value!r}: for example {example}"
        )


def require_type(name: str, value: object, types: type | tuple[type, ...], example: str) -> None:
    """Raise a `ValueError` unless it is an instance of one of the types."""
    if not isinstance(value, types):
        expected = types if isinstance(types, tuple) else (types,)
        words = " or ".join("None" if t is type(None) else t.__name__ for t in expected)
        raise ValueError(
            f"{name} must be of type {words}, got {value!r:.80}: for example {example}"
        )


def require_count(name: str, value: object, example: str) -> int:
    """The value as an int.

    Raises:
        ValueError: If it is no positive integer, of Python or NumPy.
    """
    try:
        count = 0 if isinstance(value, bool) else operator.index(cast(int, value))
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}: {example}")
    return count


def require_seed(seed: object) -> int:
    """The seed as an int.

    Raises:
        ValueError: If it is no integer, of Python or NumPy.
    """
    try:
        if not isinstance(seed, bool):
            return operator.index(cast(int, seed))
    except TypeError:
        pass
    raise ValueError(f"seed must be an integer, the same on every rank, got {seed!r:.80}: seed=0")
