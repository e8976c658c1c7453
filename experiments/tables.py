"""Rewrite the tables of README.md and docs/, and the reports, from the committed JSON.

With --check nothing is written, and tables that differ are an error.

    python experiments/tables.py [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, where NAME is a folder of
experiments/ with a results.json, or bench-FOLDER-SECTION of a folder of benchmarks/. Those of
`fogzo compare` have a config.json too.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from overview import GROUPS, MIXTURES, mixture, overview

from fogzo.cli import comparison
from fogzo.cli.bench import tables
from fogzo.cli.report import write_compare_report
from fogzo.recipes.compare import CompareConfig
from fogzo.recipes.config import from_dict

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def main() -> None:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    checks = parser.parse_args().check
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = MARKED.sub(lambda match: marked_table(match[1]), before)
        if not checks:
            page.write_text(after, encoding="utf-8")
        elif after != before:
            sys.exit(f"{page.name} differs from the committed results: run make results")
    if not checks:
        with chdir(ROOT):  # where the configs' output folders begin
            for path in Path("experiments").glob("*/config.json"):
                config = from_dict(CompareConfig, read(path))
                write_compare_report(config, read(path.with_name("results.json")))


def marked_table(name: str) -> str:
    """The table of that name, with its marks."""
    if name.startswith("bench-"):
        folder, _, section = name.removeprefix("bench-").rpartition("-")
        text = bench_table(read(ROOT / "benchmarks" / folder / "results.json"), section)
    elif name == "embedded":
        text = embedded_table(committed(name))
    elif name in ("synthetic-law", "regression", "forwards"):
        script = importlib.import_module(name.replace("-", "_"))
        text = with_note(*script.table(committed(name)))
    elif name == "mixture":
        text = with_note(*mixture(MIXTURES, committed))
    elif name in GROUPS:
        text = with_note(*overview(GROUPS[name], committed))
    else:
        text = comparison_table(committed(name))
    return f"<!-- table: {name} -->\n{text}<!-- end -->"


def comparison_table(results: dict[str, Any]) -> str:
    """Rows of a comparison, what their intervals say, and where they were measured."""
    table = comparison.summary_table(results)
    seeds = len(results["rows"][0]["seeds"])
    facts = results["environment"]
    note = (
        f"Mean ± standard deviation over {seeds} seeds; differences are paired by seed, with 95% "
        f"intervals. {facts['processor']}, {facts['cores']} cores, torch {facts['torch']}, "
        f"{facts['date']}."
    )
    return (
        markdown(table.heading, table.rows)
        + "\n"
        + " ".join(comparison.findings(results))
        + "\n\n"
        + note
        + "\n"
    )


def embedded_table(results: dict[str, Any]) -> str:
    """What the recipes with embedded data reach, beside what little knowledge does."""
    heading = ("recipe", "gradient", "test loss (nats)", "test accuracy %")
    heading += ("loss knowing nothing", "loss knowing frequencies", "accuracy of the commonest %")
    rows = []
    for row in results["rows"]:
        baseline = results["baselines"][row["recipe"]]
        loss, accuracy = row["test_loss"], row["test_accuracy"]
        rows.append(
            [
                f"`{row['recipe']}`",
                row["row"],
                f"{loss['mean']:.3f} ± {loss['sd']:.3f}",
                f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['sd']:.1f}",
                f"{baseline['uniform_loss']:.3f}",
                f"{baseline['frequency_loss']:.3f}",
                f"{100 * baseline['frequency_accuracy']:.1f}",
            ]
        )
    facts = results["environment"]
    note = (
        f"Mean ± standard deviation over {results['rows'][0]['seeds']} seeds. "
        f"{facts['processor']}, torch {facts['torch']}, Python {facts['python']}, {facts['date']}."
    )
    return markdown(heading, rows) + "\n" + note + "\n"


def bench_table(results: dict[str, Any], section: str) -> str:
    """One section of a benchmark, as `fogzo bench` prints it."""
    (table,) = tables({**results, "sections": {section: results["sections"][section]}})
    facts, count = results["environment"], results["threads"]
    where = (
        f"{count} thread{'' if count == 1 else 's'}, {facts['processor']}, torch "
        f"{facts['torch']}, {facts['date']}."
    )
    return with_note(table.heading, table.rows, f"{table.caption} {where}")


def with_note(heading: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    """A table and a paragraph below it."""
    return f"{markdown(heading, rows)}\n{note}\n"


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def committed(name: str) -> dict[str, Any]:
    """The results of an experiment."""
    return read(ROOT / "experiments" / name / "results.json")


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
