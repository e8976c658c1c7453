"""What each executor of `fogzo compare` costs its driver: runs of no length.

    python experiments/executors.py [--runs 1000] [--only ray]

Every run is a call that returns at once, so that only giving it away and taking its answer costs.
Slurm itself is not needed: submitit starts the same jobs as processes. Writes
experiments/executors/results.json.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from fogzo_lab.comparison.execution import ExecutionConfig, start_executor
from fogzo_lab.comparison.tables import where
from fogzo_lab.executors.calls import Call
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table

FOLDER = Path(__file__).parent / "executors"
WAYS = {
    "local": ExecutionConfig(),
    "ray": ExecutionConfig(executor="ray"),
    "slurm": ExecutionConfig(executor="slurm", slurm_cluster="local"),
}
LABELS = {"local": "processes here", "ray": "Ray, on this machine", "slurm": "submitit, no Slurm"}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=WAYS, action="append")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    path = arguments.output_dir / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    rows = {
        name: measure(name, arguments.runs, arguments.at_once) for name in arguments.only or WAYS
    }
    results = {
        "environment": environment(),
        "at_once": arguments.at_once,
        "rows": before | rows,
    }
    write_text(path, dumps(results, indent=1) + "\n")


def measure(name: str, runs: int, at_once: int) -> dict[str, Any]:
    """Seconds of an executor: to start with its first answer, then per run."""
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        start_executor(WAYS[name], at_once, Path(folder)) as executor,
    ):
        list(executor.results([Call("the first", os.getpid, ())]))
        started, used = time.perf_counter(), time.process_time()
        answers = list(executor.results(Call(f"run {i}", abs, (-i,)) for i in range(runs)))
        ended, driver = time.perf_counter(), time.process_time() - used
    assert sorted(answers) == list(range(runs)), "an answer was lost"
    return {
        "runs": runs,
        "seconds_to_start": round(started - began, 2),
        "seconds_per_run": (ended - started) / runs,
        "driver_cpu_seconds_per_run": driver / runs,
    }


def table(results: dict[str, Any]) -> Table:
    """For docs/comparing.md."""
    heading = ["executor", "runs", "start, s", "per run, ms", "of it the driver's CPU, ms"]
    rows = [
        [
            LABELS[name],
            str(row["runs"]),
            f"{row['seconds_to_start']:.1f}",
            f"{1000 * row['seconds_per_run']:.1f}",
            f"{1000 * row['driver_cpu_seconds_per_run']:.2f}",
        ]
        for name, row in results["rows"].items()
    ]
    caption = (
        f"Runs of no length, {results['at_once']} at once. With submitit each job is a process of "
        f"its own, whose start is most of its time. {where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


if __name__ == "__main__":
    main()
