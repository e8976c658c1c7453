"""The signals that ask a process to end: how and when they take effect."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NoReturn

Handler = Callable[[int, FrameType | None], Any]

# Windows has no SIGHUP.
ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
"""Ctrl-C; a scheduler, a container or `timeout`; a terminal that closes."""

# Seconds within which a launcher forwards to its ranks a Ctrl-C that has reached them already.
_PASSED_ON = 0.5


class Terminated(SystemExit):
    """SIGTERM or SIGHUP has arrived; ``code`` is 128 + its number, as shells have it.

    Cleanup belongs into a ``finally``, or into an ``except (KeyboardInterrupt, SystemExit)`` that
    raises again. A note added to the exception (`add_note`) becomes part of the line that the
    command prints.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.code: int = 128 + number
        self.name = signal.Signals(number).name


@contextmanager
def raised() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise `Terminated`, as SIGINT raises `KeyboardInterrupt`."""

    def terminate(number: int, _: FrameType | None) -> NoReturn:
        raise Terminated(number)

    with _handled(terminate, [number for number in ENDING if number != signal.SIGINT]):
        yield


@contextmanager
def ending_at_once(line: str) -> Iterator[None]:
    """Let signals end the process immediately, with one line on stderr.

    For imports: an exception raised within one may be swallowed or turned into another.
    """

    def end(number: int, _: FrameType | None) -> NoReturn:
        os.write(2, f"{line}\n".encode())
        os._exit(128 + number)

    with _handled(end, ENDING):
        yield


@contextmanager
def held_back() -> Iterator[Callable[[], int]]:
    """Delay signals to the end of the block, so that the block is completed.

    In the middle of a training step, for example, there is no state to save. Yields a function that
    returns the number of the waiting signal, or 0. A second Ctrl-C takes effect at once; other
    signals may come twice without intent, from a scheduler and from a launcher that forwards its
    own.
    """
    arrived: list[int] = []
    since = 0.0
    with ExitStack() as handlers:

        def hold(number: int, _: FrameType | None) -> None:
            nonlocal since
            impatient = arrived and time.monotonic() - since > _PASSED_ON
            if number == signal.SIGINT and impatient:
                handlers.close()
                signal.raise_signal(number)
            if not arrived:
                since = time.monotonic()
            arrived.append(number)

        handlers.enter_context(_handled(hold, ENDING))
        yield lambda: arrived[0] if arrived else 0
    if arrived:
        signal.raise_signal(arrived[0])


def ignore() -> None:
    """Ignore signals from now on."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handled(handler: Handler, numbers: Iterable[int]) -> Iterator[None]:
    """Give signals a handler within the block, except those that this process ignores."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers are the main thread's
        return
    previous = {number: signal.getsignal(number) for number in numbers}
    ours = [n for n, old in previous.items() if old not in (signal.SIG_IGN, None)]
    try:
        for number in ours:
            signal.signal(number, handler)
        yield
    finally:
        for number in ours:
            signal.signal(number, previous[number])
