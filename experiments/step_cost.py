"""The cost of steps with this code beside that of earlier commits, by interleaved timing.

    python experiments/step_cost.py [--before COMMIT ...] [--rounds 20] [--output-dir FOLDER]

Each code has a process of its own on one thread, and all live at the same time: round by round they
take turns of a fraction of a second, in alternating order, so that what else the machine does falls
on all of them. A turn counts by its fastest steps. The C library keeps memory between the steps:
whether it would else is an accident of where the first tensors lie, and decides a third of a step.
Needs git. Writes results.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fogzo_lab.comparison.tables import where
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
}
FOLDER = Path(__file__).parent / "step-cost"
EARLIER = {
    "f8fbd56": "before agreements had a standard error",
    "edc780c": "before the core computed in tensors only",
}
Round = dict[str, dict[str, float]]
NUM_NETWORKS = 5  # of the suite "quick" of `fogzo bench`
KINDS = ("STE step", "FOGZO step")


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--before", nargs="+", default=list(EARLIER), help="commits to compare with"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    options = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as temporary:
        trees = {commit: Path(temporary) / commit for commit in options.before}
        try:
            for commit, tree in trees.items():
                subprocess.run([*git, "worktree", "add", "-q", str(tree), commit], check=True)
            codes = trees | {"now": ROOT}
            measured = [measure(codes, i, options.rounds) for i in range(NUM_NETWORKS)]
        finally:
            for tree in trees.values():
                subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=False)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    results = {
        "environment": environment(),
        "before": options.before,
        "now": head.stdout.strip()[:7],
        "rounds": options.rounds,
        "cases": [case(name, rounds) for name, rounds in measured],
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(options.output_dir / "results.json", dumps(results, indent=1) + "\n")


SERVER = """
import sys, time, warnings
import torch
try:
    from fogzo_lab.bench.sections.steps import NETWORKS
    from fogzo_lab.bench.stepping import Steps
except ImportError:  # the laboratory was part of the library until 2026-11-29
    from fogzo.bench.sections.steps import NETWORKS
    from fogzo.bench.stepping import Steps
from fogzo import FogzoEstimator
warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
network = list(NETWORKS["quick"].values())[int(sys.argv[1])](torch.device("cpu"))
steps = Steps(network)
estimator = FogzoEstimator(network.weights)
kinds = {"STE step": steps.ste, "FOGZO step": lambda: steps.refined(estimator)}
for step in kinds.values():
    for _ in range(3):
        step()
print(network.name, flush=True)
for kind in sys.stdin:
    times, end = [], time.perf_counter() + 0.15
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        kinds[kind.strip()]()
        times.append(time.perf_counter() - start)
    print(sorted(times)[len(times) // 10], flush=True)
"""


def measure(codes: dict[str, Path], index: int, count: int) -> tuple[str, list[Round]]:
    """The name of one network, and the seconds of each kind of step with each code, by round."""
    servers = {}
    for code, root in codes.items():
        environ = os.environ | ENVIRONMENT | {"PYTHONPATH": str(root / "src")}
        servers[code] = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
    try:
        names = [ask(server) for server in servers.values()]  # when all are ready
        rounds: list[Round] = []
        for number in range(count):
            order = sorted(servers, reverse=number % 2 == 1)
            rounds.append(
                {kind: {code: float(ask(servers[code], kind)) for code in order} for kind in KINDS}
            )
    finally:
        for server in servers.values():
            server.kill()
            server.wait()
    return names[0], rounds


def ask(server: "subprocess.Popen[str]", question: str | None = None) -> str:
    """A line of a server's, after a question if there is one."""
    assert server.stdin is not None and server.stdout is not None
    if question is not None:
        server.stdin.write(question + "\n")
        server.stdin.flush()
    answer = server.stdout.readline().strip()
    if not answer:
        raise RuntimeError(f"a process ended with exit code {server.wait()}")
    return answer


def case(name: str, rounds: list[Round]) -> dict[str, Any]:
    """The seconds of one network's steps, and their ratios to those of earlier commits."""
    row: dict[str, Any] = {"name": name}
    for kind in KINDS:
        times = [found[kind] for found in rounds]
        row[kind] = {"seconds": statistics.median(time["now"] for time in times), "ratios": {}}
        for commit in set(times[0]) - {"now"}:
            ratios = [time["now"] / time[commit] for time in times]
            low, median, high = statistics.quantiles(ratios, n=4)
            row[kind]["ratios"][commit] = {"median": median, "low": low, "high": high}
    return row


def table(results: dict[str, Any]) -> Table:
    """The steps of every network beside those of earlier commits, for docs/costs.md."""
    heading = ["network", "FOGZO step, ms"]
    heading += [f"{kind} / {commit}" for commit in results["before"] for kind in KINDS]
    rows = []
    for found in results["cases"]:
        cells = [found["name"], f"{1e3 * found['FOGZO step']['seconds']:.2f}"]
        for commit in results["before"]:
            for kind in KINDS:
                of = found[kind]["ratios"][commit]
                cells.append(f"{of['median']:.2f} [{of['low']:.2f}, {of['high']:.2f}]")
        rows.append(cells)
    dates = ", ".join(f"{commit} is {EARLIER[commit]}" for commit in results["before"])
    caption = (
        f"Steps of commit {results['now']} over those of earlier commits ({dates}): median and "
        f"quartiles of {results['rounds']} interleaved rounds, one thread. "
        f"{where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


if __name__ == "__main__":
    main()
