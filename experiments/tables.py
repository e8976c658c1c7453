"""Rewrite the tables of README.md and docs/, and the reports, from the committed JSON.

With --check nothing is written, and tables that differ are an error.

    python experiments/tables.py [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, where NAME is a folder of
experiments/ with a results.json, a table of several such folders (overview.py), or
bench-FOLDER-SECTION of a folder of benchmarks/. Those of `fogzo compare` have a config.json too.

Either way it is an error if a comment is no such mark, a mark has no results, a table is empty, a
page of docs/ with generated tables has others too, a plot that a page shows does not exist, or
committed results or plots stand on no page.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from overview import GROUPS, MIXTURES, mixture, overview

from fogzo_lab.cli.bench import tables
from fogzo_lab.comparison import tables as comparison
from fogzo_lab.comparison.compare import CompareConfig
from fogzo_lab.comparison.report import write_compare_report
from fogzo_lab.training.config import from_dict

ROOT = Path(__file__).parent.parent
COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
BEGIN = re.compile(r"<!-- table: ([\w.-]+) -->")
END = "<!-- end -->"
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)")


def main() -> None:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    checks = parser.parse_args().check
    try:
        pages = rebuilt_pages(ROOT)
    except ValueError as error:
        sys.exit(str(error))
    for page, text in pages.items():
        if not checks:
            page.write_text(text, encoding="utf-8")
        elif text != page.read_text(encoding="utf-8"):
            sys.exit(f"{page.name} differs from the committed results: run make results")
    if not checks:
        with chdir(ROOT):  # where the configs' output folders begin
            for path in Path("experiments").glob("*/config.json"):
                config = from_dict(CompareConfig, read(path))
                write_compare_report(config, read(path.with_name("results.json")))


class Results:
    """The committed JSON below a folder, and which of it has been asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.used: set[str] = set()

    def experiment(self, name: str) -> dict[str, Any]:
        """The results of an experiment.

        Raises:
            ValueError: If there are none.
        """
        self.used.add(name)
        return self._read("experiments", name)

    def bench(self, name: str) -> tuple[dict[str, Any], str]:
        """The results of a benchmark and the section that the table ``bench-FOLDER-SECTION`` shows.

        Raises:
            ValueError: If there are none.
        """
        folder, _, section = name.removeprefix("bench-").rpartition("-")
        results = self._read("benchmarks", folder)
        if section not in results["sections"]:
            known = ", ".join(results["sections"])
            raise ValueError(f"benchmarks/{folder} has no section {section!r}, but {known}")
        self.used.add(name)
        return results, section

    def unused(self) -> list[str]:
        """What was committed and not asked for."""
        names = {path.parent.name for path in self.root.glob("experiments/*/results.json")}
        for path in self.root.glob("benchmarks/*/results.json"):
            names |= {f"bench-{path.parent.name}-{section}" for section in read(path)["sections"]}
        return sorted(names - self.used)

    def _read(self, *parts: str) -> dict[str, Any]:
        path = self.root.joinpath(*parts, "results.json")
        if not path.is_file():
            raise ValueError(f"no results: {path.relative_to(self.root)} does not exist")
        return read(path)


def rebuilt_pages(root: Path) -> dict[Path, str]:
    """README.md and the pages of docs/, with all tables made anew.

    Raises:
        ValueError: If anything of a table is missing, or anything that is committed has no table.
    """
    results, shown = Results(root), set[Path]()
    pages: dict[Path, str] = {}
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        before = page.read_text(encoding="utf-8")
        try:
            pages[page] = rebuilt(before, lambda name: table(name, results))
            if page.parent != root:
                check_all_generated(pages[page])
        except ValueError as error:
            raise ValueError(f"{page.name}: {error}") from None
        shown |= {(page.parent / link).resolve() for link in IMAGE.findall(before)}
    missing = sorted(str(path) for path in shown if not path.is_file())
    left = results.unused()
    left += [str(p) for p in root.glob("experiments/*/*.svg") if p.resolve() not in shown]
    if missing:
        raise ValueError(f"a page shows a plot that does not exist: {', '.join(missing)}")
    if left:
        raise ValueError(f"committed, but on no page: {', '.join(left)}")
    return pages


def rebuilt(text: str, make: Callable[[str], str]) -> str:
    """A page with what stands between its marks made anew.

    Raises:
        ValueError: If a comment is no mark or out of place, or a table cannot be made.
    """
    parts, start, name = [], 0, None
    for comment in COMMENT.finditer(text):
        mark, begin = comment[0], BEGIN.fullmatch(comment[0])
        line = text.count("\n", 0, comment.start()) + 1
        if name is None and begin:
            name = begin[1]
            parts.append(text[start : comment.end()] + "\n")
        elif name is not None and mark == END:
            try:
                parts.append(make(name))
            except ValueError as error:
                raise ValueError(f"line {line}: the table {name!r}: {error}") from None
            start, name = comment.start(), None
        else:
            expected = "<!-- table: NAME -->" if name is None else f"{END} of the table {name!r}"
            raise ValueError(f"line {line}: expected {expected}, got {mark[:80]!r}")
    if name is not None:
        raise ValueError(f"the table {name!r} has no {END}")
    return "".join(parts) + text[start:]


def check_all_generated(text: str) -> None:
    """Raise a `ValueError` if a page has a table of its own beside those between marks."""
    outside = rebuilt(text, lambda name: "")
    if outside == text:
        return  # no marks: a page of prose, whose tables hold no results
    for row in re.findall(r"^\|.*", outside, re.MULTILINE):
        raise ValueError(f"a table that no results make: {row[:80]!r}")


def table(name: str, results: Results) -> str:
    """The table of that name.

    Raises:
        ValueError: If it has no results, or no rows.
    """
    if name.startswith("bench-"):
        return bench_table(*results.bench(name))
    if name == "embedded":
        return embedded_table(results.experiment(name))
    if name in ("agreement", "synthetic-law", "regression", "forwards", "step-cost"):
        script = importlib.import_module(name.replace("-", "_"))
        return with_note(*script.table(results.experiment(name)))
    if name == "mixture":
        return with_note(*mixture(MIXTURES, results.experiment))
    if name in GROUPS:
        return with_note(*overview(GROUPS[name], results.experiment))
    return comparison_table(results.experiment(name))


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
    """A Markdown table, numbers to the right.

    Raises:
        ValueError: If it has no rows, or one that does not fit the heading.
    """
    if not rows:
        raise ValueError("it has no rows")
    for row in rows:
        if len(row) != len(heading):
            raise ValueError(f"{len(heading)} headings, but the row {', '.join(row)!r:.80}")
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
