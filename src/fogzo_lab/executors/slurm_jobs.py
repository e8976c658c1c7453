"""Calls as jobs of Slurm, through submitit.

Needs ``pip install 'fogzo[slurm]'`` and, as Slurm itself does, a folder that the computing machines
share; the answers come back through it.
"""

import time
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from fogzo_lab.executors.calls import Call, Died, Executor, outcome

Cluster = Literal["slurm", "local"]
# Seconds between two looks at the jobs; doubled while nothing happens.
_FIRST_LOOK, _LAST_LOOK = 0.05, 10.0


class SlurmJobs(Executor[Any]):
    """Each call is one job.

    Args:
        at_once: How many jobs are in the queue at a time.
        folder: Where submitit keeps its scripts, logs and answers.
        cpus: CPUs of each job; its threads.
        gpus: GPUs of each job.
        minutes: After which Slurm ends a job.
        partition: The partition of the cluster, by default its own.
        cluster: ``local`` tries the same on this machine, by processes.

    Raises:
        ValueError: If submitit or Slurm is missing.
    """

    advice = "Its log is in the folder slurm; --slurm-minutes may be too few"

    def __init__(
        self,
        at_once: int,
        folder: Path,
        cpus: int = 1,
        gpus: int = 0,
        minutes: int = 240,
        partition: str | None = None,
        cluster: Cluster = "slurm",
    ) -> None:
        super().__init__(at_once)
        submitit = _import_submitit()
        if cluster == "slurm" and submitit.SlurmExecutor.affinity() < 0:
            raise ValueError(
                "there is no Slurm on this machine (no srun): submit from a login node, or try it "
                "out by --slurm-cluster local"
            )
        self._lost = submitit.core.utils.UncompletedJobError
        self._executor = submitit.AutoExecutor(folder, cluster=cluster)
        self._executor.update_parameters(
            name="fogzo", cpus_per_task=cpus, gpus_per_node=gpus, timeout_min=minutes
        )
        if partition is not None:
            self._executor.update_parameters(slurm_partition=partition)

    def __enter__(self) -> "SlurmJobs":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for job in self._computing:
            job.cancel(check=False)
        self._computing.clear()

    def _start(self, call: Call) -> Any:
        return self._executor.submit(outcome, call.function, call.arguments)

    def _wait(self, computing: Collection[Any]) -> Iterable[Any]:
        pause = _FIRST_LOOK
        while not (ended := [job for job in computing if job.done()]):
            time.sleep(pause)
            pause = min(2 * pause, _LAST_LOOK)
        return ended

    def _answer(self, job: Any) -> Any:
        try:
            value, error = job.result()
        except self._lost as death:
            raise Died(str(death).strip().splitlines()[-1]) from None
        if error is not None:
            raise error
        return value


def _import_submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ValueError(
            "runs as Slurm jobs need submitit: pip install 'fogzo[slurm]', or --executor local"
        ) from error
    return submitit
