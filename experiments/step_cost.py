"""The cost of steps with this code beside that of earlier commits, by interleaved timing.

    python experiments/step_cost.py [--before COMMIT ...] [--rounds 5] [--output-dir FOLDER]

Each round runs `fogzo bench --suite quick --only steps` with every code, in alternating order, each
in a process of its own on one thread. Needs git and an idle machine. Writes results.json.
"""

import argparse
import json
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
FOLDER = Path(__file__).parent / "step-cost"
EARLIER = {
    "f8fbd56": "before agreements had a standard error",
    "edc780c": "before the core computed in tensors only",
}
KINDS = ("STE step", "FOGZO step")


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--before", nargs="+", default=list(EARLIER), help="commits to compare with"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    options = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as temporary:
        trees = {commit: Path(temporary) / commit for commit in options.before}
        try:
            for commit, tree in trees.items():
                subprocess.run([*git, "worktree", "add", "-q", str(tree), commit], check=True)
            codes = trees | {"now": ROOT}
            rounds = [measure(codes, i % 2 == 1, Path(temporary)) for i in range(options.rounds)]
        finally:
            for tree in trees.values():
                subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=False)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    results = {
        "environment": environment(),
        "before": options.before,
        "now": head.stdout.strip()[:7],
        "rounds": options.rounds,
        "cases": [case(name, options.before, rounds) for name in rounds[0]["now"]],
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(options.output_dir / "results.json", dumps(results, indent=1) + "\n")


def measure(
    codes: dict[str, Path], reverse: bool, temporary: Path
) -> dict[str, dict[str, dict[str, float]]]:
    """One round: the seconds of each kind of step, by code and network."""
    found = {}
    for name in sorted(codes, reverse=reverse):
        source, folder = codes[name] / "src", temporary / "bench" / name
        # The command lived in the library until 2026-11-29.
        package = "fogzo_lab" if (source / "fogzo_lab").exists() else "fogzo"
        command = [sys.executable, "-m", f"{package}.cli.main", "bench", "--suite", "quick"]
        command += ["--only", "steps", "--output-dir", str(folder)]
        environ = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environ, stdout=subprocess.DEVNULL)
        sections = json.loads((folder / "results.json").read_text(encoding="utf-8"))["sections"]
        found[name] = {row["name"]: row["seconds"] for row in sections["steps"]["cases"]}
    return found


def case(
    name: str, before: list[str], rounds: list[dict[str, dict[str, dict[str, float]]]]
) -> dict[str, Any]:
    """The seconds of one network's steps, and their ratios to those of earlier commits."""
    row: dict[str, Any] = {"name": name}
    for kind in KINDS:
        now = [found["now"][name][kind] for found in rounds]
        row[kind] = {"seconds": statistics.median(now), "ratios": {}}
        for commit in before:
            ratios = [
                time / found[commit][name][kind] for time, found in zip(now, rounds, strict=True)
            ]
            row[kind]["ratios"][commit] = {
                "median": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
            }
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
        f"range of {results['rounds']} interleaved rounds, one thread. "
        f"{where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


if __name__ == "__main__":
    main()
