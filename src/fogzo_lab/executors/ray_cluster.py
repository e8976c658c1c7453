"""Calls as tasks of a Ray cluster, or of one that Ray starts on this machine.

Needs ``pip install 'fogzo[ray]'``. The packages themselves travel to the cluster, so that every
machine computes by the code of this one.
"""

import logging
import os
import signal
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import Any

from fogzo_lab.executors.calls import Call, Died, Executor, outcome
from fogzo_lab.system.signals import held_back

_LOG = logging.getLogger(__name__)
_LOOK = 0.5  # seconds of a wait, after which a signal takes effect


class RayTasks(Executor[Any]):
    """Each call is one task with the CPUs and GPUs that it was promised.

    Args:
        at_once: How many tasks are given to the cluster at a time.
        address: Of a cluster, ``auto`` for the one this machine belongs to, or ``local`` for one
            that is started here with as many CPUs and GPUs as the tasks need, and ends with the
            block.
        cpus: CPUs of each task; its threads.
        gpus: GPUs of each task, such as 0.5 for two tasks on one.
        packages: Packages that travel to the cluster.

    Raises:
        ValueError: If Ray is not installed or does not answer there, or cannot begin a call.
    """

    advice = "If memory ran out, promise each run more --cpus-per-run; what is finished is kept"

    def __init__(
        self,
        at_once: int,
        address: str = "local",
        cpus: float = 1,
        gpus: float = 0,
        packages: Collection[ModuleType] = (),
    ) -> None:
        super().__init__(at_once)
        self._address, self._cpus, self._gpus = address, cpus, gpus
        self._packages = packages
        self._ray = _import_ray()

    def __enter__(self) -> "RayTasks":
        here = self._address == "local"
        options: dict[str, Any] = {"include_dashboard": False} if here else {}
        if here:
            options["num_cpus"] = max(1, round(self._at_once * self._cpus))
            if self._gpus:
                options["num_gpus"] = max(1, round(self._at_once * self._gpus))
        with _signals_kept():
            try:
                self._ray.init(
                    address=self._address,
                    runtime_env={"py_modules": list(self._packages)},
                    log_to_driver=False,
                    logging_level="error",
                    **options,
                )
            except ValueError as error:
                raise ValueError(
                    f"no address of a Ray cluster: {self._address!r}. It is that of its head and a "
                    "port, --ray-address 10.0.0.1:6379; auto for the one that this machine is part "
                    "of; or local, one of its own"
                ) from error
            except (ConnectionError, RuntimeError) as error:
                raise ValueError(
                    f"no Ray cluster answers at {self._address!r} ({error}): start one by "
                    "`ray start --head` and pass its address, or leave --ray-address out"
                ) from error
        if not here:
            self._warn_of_too_small_machines()
        self._compute = self._ray.remote(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            max_retries=0,
            # A process stays on the GPU that it saw first, whichever Ray lends it later, and keeps
            # memory there while it waits. On a CPU it is kept, as starting another takes seconds.
            max_calls=1 if self._gpus else 0,
        )(outcome)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for handle in self._computing:
            self._ray.cancel(handle, force=True)
        self._computing.clear()
        with _signals_kept():
            self._ray.shutdown()

    def _warn_of_too_small_machines(self) -> None:
        """Say so if nobody could begin a task, for which Ray would wait in silence."""
        needed = {"CPU": self._cpus, "GPU": self._gpus}
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(all(m.get(k, 0) >= n for k, n in needed.items()) for m in machines):
            _LOG.warning(
                "no machine of the Ray cluster has the %g CPUs and %g GPUs of a run: all wait "
                "until one joins. --cpus-per-run and --gpus-per-run say what a run is promised",
                self._cpus,
                self._gpus,
            )

    def _start(self, call: Call) -> Any:
        return self._compute.options(name=call.name).remote(call.function, call.arguments)

    def _wait(self, computing: Collection[Any]) -> Iterable[Any]:
        ended: list[Any] = []
        # Ray would turn what SIGTERM and SIGHUP raise within its wait into an exit without a word.
        with held_back() as waiting:
            while not ended and not waiting():
                ended, _ = self._ray.wait(list(computing), num_returns=1, timeout=_LOOK)
        return ended

    def _answer(self, handle: Any) -> Any:
        lost = self._ray.exceptions
        try:
            value, error = self._ray.get(handle)
        except (
            lost.WorkerCrashedError,
            lost.LocalRayletDiedError,
            lost.NodeDiedError,
            lost.OutOfMemoryError,
            lost.ObjectLostError,
        ) as death:
            raise Died(f"{type(death).__name__} of Ray") from None
        except (lost.RuntimeEnvSetupError, lost.TaskUnschedulableError) as refusal:
            reason = " ".join(str(refusal).split())
            raise ValueError(
                f"the Ray cluster could not begin a run: {reason:.300}. Every machine of it needs "
                "the Python, torch and fogzo[lab] of this one, and one of them the CPUs and GPUs "
                "that a run is promised: --cpus-per-run 1 --gpus-per-run 0"
            ) from None
        if error is not None:
            raise error
        return value


def _import_ray() -> Any:
    # Ray tells its makers of its use over the network unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ValueError(
            "runs on a Ray cluster need Ray: pip install 'fogzo[ray]', or --executor local"
        ) from error
    return ray


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back the handlers that Ray replaces."""
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in ours.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
