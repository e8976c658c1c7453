"""What all executors share: a call, and the loop that computes calls and repeats lost ones."""

import logging
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Generic, TypeVar

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """A call to compute in another process.

    Attributes:
        name: Its name in messages.
        function: A function that can be pickled, as can its arguments and its result.
        arguments: Its arguments.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Died(Exception):
    """The process of a call has ended without an answer; the message says how."""


HandleT = TypeVar("HandleT")


class Executor(ABC, Generic[HandleT]):
    """Computes calls elsewhere, so many at once.

    Within the ``with`` block `results` may be called repeatedly. If the block ends with an
    exception, what is being computed ends with it.

    Args:
        at_once: How many calls are given away at a time.
    """

    shares_files: ClassVar[bool] = False
    """Whether calls see the files of this machine under the same paths."""
    advice: ClassVar[str] = ""
    """What to do where processes die repeatedly."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        # With each call, whether its process died before: it may die once.
        self._computing: dict[HandleT, tuple[Call, bool]] = {}

    @abstractmethod
    def __enter__(self) -> "Executor[HandleT]": ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None: ...

    @abstractmethod
    def _start(self, call: Call) -> HandleT:
        """Give a call away."""

    @abstractmethod
    def _wait(self, computing: Collection[HandleT]) -> Iterable[HandleT]:
        """Wait until some have ended; returns these."""

    @abstractmethod
    def _answer(self, handle: HandleT) -> Any:
        """What an ended call returned, or raise what it raised, or `Died`."""

    def results(self, calls: Iterable[Call]) -> Iterator[Any]:
        """Compute calls, and yield their results in the order of completion.

        A call whose process dies (killed for memory, say) is computed again, once. After an
        exception nothing more is computed.

        Args:
            calls: Taken one by one, when there is a place for them.

        Raises:
            ChildProcessError: If a process dies in a call for the second time.
            Exception: The exception of a call, with the worker's traceback as a note.
        """
        computing = self._computing
        assert not computing, "its results were not taken, or it has raised an exception"
        waiting = ((call, False) for call in calls)
        again: list[tuple[Call, bool]] = []
        while True:
            while len(computing) < self._at_once:
                one = again.pop() if again else next(waiting, None)
                if one is None:
                    break
                computing[self._start(one[0])] = one
            if not computing:
                return
            for ended in self._wait(computing.keys()):
                call, died_before = computing.pop(ended)
                try:
                    value = self._answer(ended)
                except Died as death:
                    if died_before:
                        raise ChildProcessError(
                            f"{call.name}: its process died twice, now {death}. {self.advice}"
                        ) from None
                    _LOG.warning("%s: its process died (%s); it runs again", call.name, death)
                    again.append((call, True))
                    continue
                yield value


def outcome(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Any, Exception | None]:
    """What a call returned, or the exception with its traceback as a note: a worker's side."""
    try:
        return function(*arguments), None
    except Exception as error:
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
        return None, error
