"""A pool of processes that outlive neither their pool nor their parent.

Every worker holds the reading end of a pipe, the lifeline, whose other end only the parent has.
However the parent dies, even by SIGKILL, the system closes that end, and a thread in the worker
ends the process. The pool ends its workers in the same way. Workers of joblib outlive a parent
that is killed.
"""

import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children, connection, get_context
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any

from fogzo_lab.executors.calls import Call, Died, Executor, outcome
from fogzo_lab.system.signals import ENDING, held_back

_SPAWN = get_context("spawn")
# Seconds after which an ending worker is killed.
_PATIENCE = 5.0
_PATIENCE_AFTER_ERROR = 0.5


class Workers(Executor["_Worker"]):
    """Processes that compute one call at a time each, started when there is work for them.

    Args:
        at_once: Maximum number of processes.
        prepare: Function that each calls first.
    """

    shares_files = True
    advice = "If memory ran out, use fewer --workers; what is finished is kept"

    def __init__(self, at_once: int, prepare: Callable[[], object] = object) -> None:
        super().__init__(at_once)
        self._prepare = pickle.dumps(prepare)
        self._all: list[_Worker] = []
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

    def _start(self, call: Call) -> "_Worker":
        worker = next((one for one in self._all if one not in self._computing), None)
        if worker is None:
            with held_back():  # so that a started process is always one of the pool
                worker = _Worker(self._lifeline, self._prepare)
                self._all.append(worker)
        worker.give(call)
        return worker

    def _wait(self, computing: Collection["_Worker"]) -> Iterable["_Worker"]:
        ready = connection.wait([worker.connection for worker in computing])
        return [worker for worker in computing if worker.connection in ready]

    def _answer(self, worker: "_Worker") -> Any:
        try:
            answer = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._all.remove(worker)
            raise Died(worker.death()) from None
        value, error = pickle.loads(answer)
        if error is not None:
            raise error
        return value


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
        value, failure = outcome(_call, (sent,))
        try:
            answer = pickle.dumps((value, failure))
            if failure is not None:
                pickle.loads(answer)  # some errors can be written and not read
        except Exception as error:
            said = "".join(traceback.format_exception(failure or error))
            answer = pickle.dumps((None, RuntimeError(f"a worker has failed:\n{said}")))
        with suppress(OSError):  # the parent no longer waits for it
            calls.send_bytes(answer)


def _call(sent: bytes) -> Any:
    function, arguments = pickle.loads(sent)
    return function(*arguments)


def _die_with(lifeline: connection.Connection) -> None:
    with suppress(OSError):
        lifeline.poll(None)  # until the other end is closed, as nothing is ever sent
    for child in active_children():  # workers of data loaders
        child.kill()
    os._exit(1)
