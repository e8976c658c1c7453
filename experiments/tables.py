"""Rewrite the tables of README.md and docs/, and the reports, from the committed JSON.

With --check nothing is written, and tables that differ are an error.

    python experiments/tables.py [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, where NAME is a folder of
experiments/ with a results.json, or step_cost. Those of `fogzo compare` have a config.json too.
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
    if name == "step_cost":
        text = cost_table(read(ROOT / "benchmarks" / "step_cost.json"))
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


def cost_table(report: dict[str, Any]) -> str:
    """What a step costs beside its floor."""
    heading = ("model", "quantized weights", "FOGZO step / floor", "FOGZO step / STE step")
    heading += ("extra memory / quantized weights",)
    rows = [
        [
            case["case"],
            f"{case['quantized_weights']:,}",
            f"{case['fogzo_over_floor']:.2f}",
            f"{case['fogzo_over_ste']:.2f}",
            f"{case['extra_peak_mib'] / case['weights_mib']:.2f}",
        ]
        for case in report["cases"]
    ]
    facts = report["environment"]
    note = (
        f"Medians of paired measurements, {report['threads']} thread(s), {facts['processor']}, "
        f"torch {facts['torch']}, {facts['date']}. `import fogzo` takes "
        f"{report['import_seconds']:.2f} s after `import torch`.\n"
    )
    return markdown(heading, rows) + "\n" + note


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
