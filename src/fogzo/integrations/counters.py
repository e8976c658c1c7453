"""What a loop counts in attributes, as it was, while its code runs again for a probe."""

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

_CONTAINERS = (dict, defaultdict, OrderedDict, Counter, list, set, deque)


class Counters:
    """The attributes of objects as they are now: copies of tensors and of plain containers.

    Of all other objects it is known which attributes they are, and not what is in them.

    Args:
        owners: Whose attributes.
        but_for: What is never copied, wherever it is held.
    """

    def __init__(self, owners: Iterable[object], but_for: Iterable[object]) -> None:
        self._but_for = {id(value): value for value in but_for}
        self._kept = self._copies([(vars(owner), vars(owner)) for owner in owners])

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let code begin with these attributes, and give the present ones back at the end."""
        present = [(held, dict(held)) for held, _ in self._kept]
        for held, attributes in self._copies(self._kept):
            _fill(held, attributes)
        try:
            yield
        finally:
            for held, attributes in present:
                _fill(held, attributes)

    def _copies(
        self, kept: Iterable[tuple[dict[str, Any], dict[str, Any]]]
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        copies = dict(self._but_for)
        return [
            (held, {name: _lent(value, copies) for name, value in attributes.items()})
            for held, attributes in kept
        ]


class Replayed:
    """A function that counts in attributes of objects, and counts each call once.

    Called again, it begins with what its first call began with, and leaves no trace.

    Args:
        call: The function.
        counters: As they are before its first call.
        quietly: What else keeps a later call from leaving traces.
        causes: Why a later call may return another loss all the same; what to do about it.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        counters: Counters,
        quietly: Callable[[], AbstractContextManager[None]],
        causes: str,
    ) -> None:
        self._call, self._counters, self._quietly = call, counters, quietly
        self.causes = causes
        self._was_called = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        if not self._was_called:
            self._was_called = True
            return self._call(*args, **kwargs)
        with self._counters.lent(), self._quietly():
            return self._call(*args, **kwargs)


def _fill(held: dict[str, Any], attributes: dict[str, Any]) -> None:
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
        torch.autograd.graph.increment_version(copied)  # changed in place, as the other one is
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
    in place it has changed before, but for its first call.
    """
    return [item if _is_as_made(item) else _lent(item, copies) for item in items]


def _is_as_made(item: object) -> bool:
    return type(item) is Tensor and not item.is_inference() and item._version == 0
