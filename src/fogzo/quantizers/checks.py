"""Checks of arguments: what came, what was expected and the corrected call."""

import math
from numbers import Real


def is_int(value: object) -> bool:
    """Whether it is an integer, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
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
