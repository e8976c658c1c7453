"""How messages name several things at once, the one that was meant, or where to read on."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def listed(names: Sequence[str], most: int = 5) -> str:
    """Quoted names, the first of them where there are many.

    >>> listed(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def alternatives(ways: Sequence[str]) -> str:
    """Things to try, the last of them after "or".

    >>> alternatives(["a", "b", "c"]), alternatives(["a"])
    ('a, b, or c', 'a')
    """
    *others, last = ways
    return ", or ".join([", ".join(others), last] if others else [last])


def nearest(name: object, choices: Iterable[object]) -> str | None:
    """The choice that was probably meant by a name that is none of them.

    >>> nearest("fogso", ["ste", "fogzo"])
    'fogzo'
    """
    return next(iter(get_close_matches(str(name), [str(choice) for choice in choices], n=1)), None)


def caveat(section: str) -> str:
    """Where the documentation says more, for the end of a message.

    >>> caveat("Same batch")
    '. See "Same batch" in docs/caveats.md'
    """
    return f'. See "{section}" in docs/caveats.md'
