"""A pool of processes that outlive neither their pool nor their parent.

Every worker holds the reading end of a pipe, the lifeline, whose other end only the parent has.
However the parent dies, even by SIGKILL, the system closes that end, and a thread in the worker
ends the process. The pool ends its workers in the same way. Workers of joblib outlive a parent
that is killed.
"""

import logging
import os
import pickle
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import active_children, connection, get_context
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any

from fogzo_lab.system.signals import ENDING, held_back

_LOG = logging.getLogger(__name__)
_SPAWN = get_context("spawn")
# Seconds after which an ending worker is killed.
_PATIENCE = 5.0
_PATIENCE_AFTER_ERROR = 0.5


@dataclass(frozen=True)
class Call:
    """A call for a worker to compute.

    Attributes:
        name: Its name in messages.
        function: A function that can be pickled, as can its arguments and its result.
        arguments: Its arguments.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Workers:
    """Processes that compute one call at a time each, started when there is work for them.

    Within the ``with`` block `results` may be called repeatedly. If the block ends with an
    exception, calls that are being computed end with it.

    Args:
        count: Maximum number of processes.
        prepare: Function that each calls first.
    """

    def __init__(self, count: int, prepare: Callable[[], object] = object) -> None:
        self._count = count
        self._prepare = pickle.dumps(prepare)
        self._all: list[_Worker] = []
        self._computing: dict[Any, tuple[_Worker, Call]] = {}  # by connection
        self._lifeline, self._hold = _SPAWN.Pipe(duplex=False)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with held_back():  # a second Ctrl-C leaves no process behind
            for worker in self._all:
                worker.connection.close()  # a worker that waits for a call then returns
            if kind is None:
                _join(self._all)
            self._hold.close()
            _join(self._all, _PATIENCE_AFTER_ERROR)
            self._lifeline.close()

    def results(self, calls: Iterable[Call]) -> Iterator[Any]:
        """Compute calls, and yield their results in the order of completion.

        A call whose process dies (killed for memory, say) is computed again, once. After an
        exception the pool computes nothing more.

        Raises:
            ChildProcessError: If a process dies in a call for the second time.
            Exception: The exception of a call, with the worker's traceback as a note.
        """
        waiting = deque(calls)
        deaths: Counter[int] = Counter()
        computing = self._computing
        assert not computing, "its results were not taken, or it has raised an exception"
        while waiting or computing:
            while waiting and (worker := self._idle()) is not None:
                call = waiting.popleft()
                worker.give(call)
                computing[worker.connection] = worker, call
            for ready in connection.wait(list(computing)):
                worker, call = computing.pop(ready)
                try:
                    answer = worker.connection.recv_bytes()
                except (EOFError, OSError):
                    self._all.remove(worker)
                    how = worker.death()
                    deaths[id(call)] += 1
                    if deaths[id(call)] > 1:
                        raise ChildProcessError(
                            f"{call.name}: its process died twice, now {how}. If memory ran out, "
                            "use fewer --workers; what is finished is kept"
                        ) from None
                    _LOG.warning("%s: its process died (%s); it runs again", call.name, how)
                    waiting.appendleft(call)
                    continue
                value, error = pickle.loads(answer)
                if error is not None:
                    raise error
                yield value

    def _idle(self) -> "_Worker | None":
        for worker in self._all:
            if worker.connection not in self._computing:
                return worker
        if len(self._all) == self._count:
            return None
        with held_back():  # so that a started process is always one of the pool
            self._all.append(_Worker(self._lifeline, self._prepare))
        return self._all[-1]


class _Worker:
    """One process, seen from its parent."""

    def __init__(self, lifeline: connection.Connection, prepare: bytes) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self.process: SpawnProcess = _SPAWN.Process(target=_work, args=(theirs, lifeline, prepare))
        with _blocked(ENDING):
            self.process.start()
        theirs.close()

    def give(self, call: Call) -> None:
        """Start a call; a process that has died is noticed when its answer is awaited."""
        with suppress(OSError):
            self.connection.send_bytes(pickle.dumps((call.function, call.arguments)))

    def death(self) -> str:
        """How the process ended."""
        self.connection.close()
        _join([self])
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"exit code {code}"
        return f"killed by {signal.Signals(-code).name}"


def _join(workers: Iterable[_Worker], patience: float = _PATIENCE) -> None:
    """Wait until the workers have ended, and kill those that do not in time."""
    deadline = time.monotonic() + patience
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.exitcode is None:
            worker.process.kill()
            worker.process.join()


@contextmanager
def _blocked(signals: Iterable[int]) -> Iterator[None]:
    """Block signals for processes started here: Ctrl-C reaches all, and the parent decides.

    Unlike ignoring them, this loses no signal that is sent to the parent meanwhile.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _work(calls: connection.Connection, lifeline: connection.Connection, prepare: bytes) -> None:
    """The worker's side: compute calls until the connection is closed."""
    threading.Thread(target=_die_with, args=(lifeline,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where signals cannot be blocked
    pickle.loads(prepare)()  # may take seconds to import modules: the watch has begun
    while True:
        try:
            sent = calls.recv_bytes()
        except (EOFError, OSError):
            return
        value, failure = None, None
        try:
            function, arguments = pickle.loads(sent)
            value = function(*arguments)
        except Exception as error:
            error.add_note(f"In a worker process:\n{traceback.format_exc()}")
            failure = error
        try:
            answer = pickle.dumps((value, failure))
            if failure is not None:
                pickle.loads(answer)  # some errors can be written and not read
        except Exception as error:
            said = "".join(traceback.format_exception(failure or error))
            answer = pickle.dumps((None, RuntimeError(f"a worker has failed:\n{said}")))
        with suppress(OSError):  # the parent no longer waits for it
            calls.send_bytes(answer)


def _die_with(lifeline: connection.Connection) -> None:
    with suppress(OSError):
        lifeline.poll(None)  # until the other end is closed, as nothing is ever sent
    for child in active_children():  # workers of data loaders
        child.kill()
    os._exit(1)
