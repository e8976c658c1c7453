"""Which machines compute the runs of a comparison, and how their results come back."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch

import fogzo
import fogzo_lab
from fogzo_lab.comparison.run_cache import RunCache, code_version
from fogzo_lab.comparison.runs import Run, run_in
from fogzo_lab.comparison.timing import run_seconds
from fogzo_lab.executors.calls import Call, Executor
from fogzo_lab.executors.local import Workers
from fogzo_lab.options import Example, NonNegativeFloat, Options, PathOrName, PositiveInt
from fogzo_lab.system.environment import environment, library_versions
from fogzo_lab.system.json_files import dumps, read_json, write_text
from fogzo_lab.training.config import TrainConfig

_MACHINE = "machine.json"
_MACHINE_WORDS = "{processor}, {cores} cores, accelerator {accelerator}, torch {torch}"

Files = dict[str, bytes]
"""A folder's files by their path in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionConfig(Options):
    """Where runs are computed; none of it changes their numbers but for rounding."""

    executor: Literal["local", "ray", "slurm"] = "local"
    """Processes of this machine, tasks of a Ray cluster, or jobs of Slurm."""
    cpus_per_run: PositiveInt = 1
    """Threads of a run, and the CPUs it is promised on a cluster."""
    gpus_per_run: NonNegativeFloat = 0.0
    """GPUs it is promised on a cluster; Ray also takes parts, such as 0.5."""
    ray_address: PathOrName = "local"
    """Of a Ray cluster; auto is the one of this machine, local one that is started for the
    comparison."""
    slurm_partition: Annotated[str | None, Example("gpu")] = None
    """Partition of the Slurm cluster."""
    slurm_minutes: PositiveInt = 240
    """After which Slurm ends a run."""
    slurm_cluster: Literal["slurm", "local"] = "slurm"
    """local tries the jobs on this machine, without Slurm."""

    @property
    def on_this_machine(self) -> bool:
        """Whether this machine computes all runs, in whichever way."""
        tried_here = {"ray": self.ray_address, "slurm": self.slurm_cluster}
        return tried_here.get(self.executor, "local") == "local"

    def check_together(self, prefix: str) -> None:
        """Raise a `ValueError` where options, each of which can be meant, do not go together."""
        if self.executor == "local" and self.gpus_per_run:
            raise ValueError(
                "processes of this machine share its GPUs, which --gpus-per-run cannot promise: "
                "--executor ray"
            )
        if self.executor == "slurm" and self.gpus_per_run % 1:
            raise ValueError(
                f"Slurm promises whole GPUs, got --gpus-per-run {self.gpus_per_run:g}: "
                "--gpus-per-run 1, or --executor ray"
            )


def start_executor(config: ExecutionConfig, at_once: int, folder: Path) -> Executor[Any]:
    """What computes runs, so many at once.

    Args:
        config: Where.
        at_once: Maximum number of runs at a time.
        folder: The comparison's, for the scripts and logs of Slurm's jobs.

    Raises:
        ValueError: If a package or the cluster is missing.
    """
    if config.executor == "ray":
        from fogzo_lab.executors.ray_cluster import RayTasks

        return RayTasks(
            at_once,
            config.ray_address,
            config.cpus_per_run,
            config.gpus_per_run,
            packages=(fogzo, fogzo_lab),
        )
    if config.executor == "slurm":
        from fogzo_lab.executors.slurm_jobs import SlurmJobs

        return SlurmJobs(
            at_once,
            folder / "slurm",
            config.cpus_per_run,
            int(config.gpus_per_run),
            config.slurm_minutes,
            config.slurm_partition,
            config.slurm_cluster,
        )
    return Workers(at_once)


def execute(
    executor: Executor[Any],
    cache: RunCache,
    runs: Iterable[Run],
    threads: int,
    on_run: Callable[[], None],
) -> None:
    """Run what is not finished; what trains comes before what is quantized from it."""
    runs = list(runs)
    for wave in ([run.trained for run in runs], [run for run in runs if run.trained is not run]):
        waiting = {run.path(cache): run for run in wave if cache.result(run.path(cache)) is None}
        if executor.shares_files:
            calls = (
                Call(run.label, run_here, (run, path, run.trained.path(cache), threads))
                for path, run in waiting.items()
            )
            for _ in executor.results(calls):
                on_run()
        else:
            for path, files in executor.results(_sent(cache, waiting, threads)):
                receive(path, files)
                on_run()


def _sent(cache: RunCache, waiting: dict[Path, Run], threads: int) -> Iterator[Call]:
    """The calls of machines that see no file of this one."""
    for path, run in waiting.items():
        trained = {} if run.trained is run else read_files(run.trained.path(cache))
        yield Call(run.label, run_elsewhere, (run, path, trained, threads, cache.code))


def run_here(run: Run, path: Path, trained: Path, threads: int) -> None:
    """Compute a run in its folder."""
    torch.set_num_threads(threads)
    run_in(run, path, trained)
    _sign(path)


def run_elsewhere(
    run: Run, path: Path, trained: Files, threads: int, code: str
) -> tuple[Path, Files]:
    """Compute a run in a temporary folder of this machine, whose files go back.

    Raises:
        ValueError: If this machine holds other code or other data, as its numbers would be others.
    """
    if code_version() != code:
        raise ValueError(
            f"a worker has another version of fogzo or of its libraries ({code_version()}) than "
            f"the driver ({code}): install the same fogzo, torch, {', '.join(library_versions())} "
            "on all machines"
        )
    if f"-{replace(run).key}-" not in path.name:  # by the data of this machine
        raise ValueError(
            f"a worker has other data than the driver at {run.config.data}: copy the same files "
            "there, or name a data set of a hub"
        )
    torch.set_num_threads(threads)
    with TemporaryDirectory(prefix="fogzo-") as temporary:
        here, source = Path(temporary, path.name), Path(temporary, "trained")
        receive(source, trained)
        run_in(run, here, source)
        _sign(here)
        return path, read_files(here)


def measure_seconds(
    configs: Mapping[str, TrainConfig], rounds: int, steps: int, threads: int
) -> dict[str, float]:
    """Training seconds of a run of each config, on the machine that computes this."""
    torch.set_num_threads(threads)
    return run_seconds(configs, rounds, steps)


def _sign(path: Path) -> None:
    """Write down which machine has computed a run; its folder may be carried to another."""
    write_text(path / _MACHINE, dumps({**environment(), **library_versions()}) + "\n")


def machines(paths: Iterable[Path]) -> dict[str, str]:
    """How many of these runs which machines computed, in words; empty if only this one did."""
    found: Counter[str] = Counter()
    for path in paths:
        if (path / _MACHINE).exists():
            facts = read_json(path / _MACHINE, dict[str, str | int], "delete the file")
            try:
                found[_MACHINE_WORDS.format_map(facts)] += 1
            except KeyError as name:
                raise ValueError(f"{path / _MACHINE} has no {name}: delete the file") from name
    if set(found) <= {_MACHINE_WORDS.format_map(environment())}:
        return {}
    return {"machines": "; ".join(f"{n} runs: {m}" for m, n in found.items())}


def read_files(folder: Path) -> Files:
    """All files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def receive(folder: Path, files: Files) -> None:
    """Write a run's folder, with its result last, as that is what marks it as finished."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in sorted(files, key=lambda name: name == "result.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "result.json":
            write_text(path, files[name].decode())
        else:
            path.write_bytes(files[name])
