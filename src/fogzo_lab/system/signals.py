"""The signals that ask a process to end: what they become, and when they may strike."""

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

# Within so many seconds a launcher passes on to its ranks the Ctrl-C that reached them already.
_PASSED_ON = 0.5


class Terminated(SystemExit):
    """SIGTERM or SIGHUP has arrived; ``code`` is 128 + its number, as shells have it.

    What must happen before the end belongs into a ``finally``, or into an
    ``except (KeyboardInterrupt, SystemExit)`` that raises again. A note added to the exception
    (`add_note`) becomes a part of the line that the command prints.
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
    """Let signals end the process where it stands, with one line on stderr.

    For imports: an exception out of the middle of one may be swallowed or come out as another.
    """

    def end(number: int, _: FrameType | None) -> NoReturn:
        os.write(2, f"{line}\n".encode())
        os._exit(128 + number)

    with _handled(end, ENDING):
        yield


@contextmanager
def held_back() -> Iterator[Callable[[], int]]:
    """Let a signal take effect only at the end of the block, so that the block is done whole.

    A training step, say: in the middle of one there is no state to save. What is yielded says
    which signal waits, 0 if none does. A second Ctrl-C takes effect at once; other signals may
    come twice by themselves, from a scheduler and from a launcher that passes its own on.
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
    """Let signals do nothing from now on."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handled(handler: Handler, numbers: Iterable[int]) -> Iterator[None]:
    """Give signals a handler for the block, but for those that this process is to ignore."""
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
