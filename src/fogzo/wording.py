"""How messages name several things at once."""

from collections.abc import Sequence


def listed(names: Sequence[str], most: int = 5) -> str:
    """Quoted names, the first of them where there are many.

    >>> listed(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
