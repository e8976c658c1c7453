"""What a loop counts in attributes, put back after its code ran again for a probe."""

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_CONTAINERS = (dict, defaultdict, OrderedDict, Counter, list, set, deque)


@contextmanager
def counters_put_back(owners: Iterable[object], but_for: Iterable[object]) -> Iterator[None]:
    """Let code change the attributes of objects, and put them back at the end.

    Meanwhile the attributes hold copies of tensors and of plain containers with what is in them.
    Of all other objects it is put back which attributes they are, and not what is in them.

    Args:
        owners: Whose attributes.
        but_for: What is never copied, wherever it is held.
    """
    own = [(vars(owner), dict(vars(owner))) for owner in owners]
    copies = {id(value): value for value in but_for}
    for held, attributes in own:
        held.update({name: _lent(value, copies) for name, value in attributes.items()})
    try:
        yield
    finally:
        for held, attributes in own:
            held.clear()
            held.update(attributes)


def _lent(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of a tensor, or of a plain container and what is in it; anything else itself.

    Args:
        value: Of an attribute.
        copies: By the identity of what was copied, so that what is one thing stays one.
    """
    kind = type(value)
    if id(value) in copies:
        return copies[id(value)]
    if kind is Tensor:
        copied = copies[id(value)] = value.detach().clone()
        return copied
    if kind is tuple:
        return tuple(_inside(value, copies))
    if kind not in _CONTAINERS:
        return value
    # Shallow, for what else a container knows: its default, its greatest length.
    copied = copies[id(value)] = copy.copy(value)
    if isinstance(value, dict):
        for key, item in zip(value, _inside(value.values(), copies), strict=True):
            copied[key] = item
    else:
        items = _inside(value, copies)
        copied.clear()
        (copied.update if kind is set else copied.extend)(items)
    return copied


def _inside(items: Iterable[Any], copies: dict[int, Any]) -> list[Any]:
    """What a container holds, lent likewise, but for tensors that nothing has changed in place.

    There may be many of these, rows of data or losses that were collected. What the code changes
    in place it has changed before, as it runs again.
    """
    return [item if _is_as_made(item) else _lent(item, copies) for item in items]


def _is_as_made(item: object) -> bool:
    return type(item) is Tensor and not item.is_inference() and item._version == 0
