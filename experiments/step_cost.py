"""What steps cost with this code beside an earlier commit's, by interleaved timing.

    python experiments/step_cost.py [--before COMMIT] [--rounds 5] [--output-dir FOLDER]

Each round runs `fogzo bench --suite quick --only steps` with either code, in alternating order, in
processes of their own on one thread. Needs git and an idle machine. Writes results.json.
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
KINDS = ("STE step", "FOGZO step")


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", default="f8fbd56", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    options = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as temporary:
        earlier = Path(temporary) / "before"
        subprocess.run([*git, "worktree", "add", "-q", str(earlier), options.before], check=True)
        try:
            sources = {"before": earlier / "src", "after": ROOT / "src"}
            rounds = [measure(sources, i % 2 == 1, Path(temporary)) for i in range(options.rounds)]
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(earlier)], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    results = {
        "environment": environment(),
        "before": options.before,
        "after": head.stdout.strip()[:7],
        "rounds": options.rounds,
        "cases": [case(name, rounds) for name in rounds[0]["after"]],
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(options.output_dir / "results.json", dumps(results, indent=1) + "\n")


def measure(
    sources: dict[str, Path], reverse: bool, temporary: Path
) -> dict[str, dict[str, dict[str, float]]]:
    """One round: the seconds of each kind of step, by code and network."""
    found = {}
    for name in sorted(sources, reverse=reverse):
        folder = temporary / name / "bench"
        command = [sys.executable, "-m", "fogzo_lab.cli.main", "bench", "--suite", "quick"]
        command += ["--only", "steps", "--output-dir", str(folder)]
        environ = os.environ | {"PYTHONPATH": str(sources[name]), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environ, stdout=subprocess.DEVNULL)
        sections = json.loads((folder / "results.json").read_text(encoding="utf-8"))["sections"]
        found[name] = {row["name"]: row["seconds"] for row in sections["steps"]["cases"]}
    return found


def case(name: str, rounds: list[dict[str, dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """Ratios after / before of one network: median and range over rounds."""
    row: dict[str, Any] = {"name": name}
    for kind in KINDS:
        pairs = [(r["before"][name][kind], r["after"][name][kind]) for r in rounds]
        ratios = [after / before for before, after in pairs]
        row[kind] = {
            "before": statistics.median(before for before, _ in pairs),
            "after": statistics.median(after for _, after in pairs),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    return row


def table(results: dict[str, Any]) -> Table:
    """Both kinds of steps of every network, for docs/costs.md."""
    heading = ("network", "STE step, ms", "after / before", "FOGZO step, ms", "after / before")
    rows = []
    for found in results["cases"]:
        cells = [found["name"]]
        for kind in KINDS:
            of = found[kind]
            cells += [
                f"{1e3 * of['after']:.2f}",
                f"{of['ratio']:.2f} [{of['low']:.2f}, {of['high']:.2f}]",
            ]
        rows.append(cells)
    caption = (
        f"Commit {results['after']} over {results['before']}: median and range of "
        f"{results['rounds']} interleaved rounds, one thread. {where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


if __name__ == "__main__":
    main()
