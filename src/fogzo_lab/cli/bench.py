"""fogzo bench: measures, writes results.json and bench.svg, and prints a table a section."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.markup import escape

from fogzo_lab.bench.config import BenchConfig
from fogzo_lab.bench.plot import plot
from fogzo_lab.bench.suite import Results, run_suite
from fogzo_lab.cli import display
from fogzo_lab.cli.parsing import parse
from fogzo_lab.comparison.tables import Table
from fogzo_lab.system.devices import find_device
from fogzo_lab.system.json_files import dumps, write_text


def run(arguments: Sequence[str]) -> None:
    """Run the command with these options."""
    config = parse(BenchConfig, arguments, "fogzo bench", BenchConfig.__doc__)
    find_device(config.device)  # before anything is written
    folder = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written should fail at once
    with display.progress(len(config.sections), "measuring") as advance:
        results = run_suite(config, advance)
    write_text(folder / "results.json", dumps(results, indent=1) + "\n")
    plot(results, folder / "bench.svg")
    for table in tables(results):
        cells = [[escape(cell) for cell in row] for row in table.rows]
        display.print_table(replace(table, rows=cells), table.title)
        print(table.caption)
    print(f"results: {folder / 'results.json'}\nplot: {folder / 'bench.svg'}")


def tables(results: Results) -> list[Table]:
    """A table a section, from what results.json holds."""
    return [_table(_VIEWS[name], section["cases"]) for name, section in results["sections"].items()]


CaseResults = Mapping[str, Any]


@dataclass(frozen=True)
class _Column:
    heading: str
    text: Callable[[CaseResults], str]


@dataclass(frozen=True)
class _View:
    """What of a section's cases is shown."""

    title: str
    caption: str
    columns: Sequence[_Column]


def _table(view: _View, cases: Sequence[CaseResults]) -> Table:
    columns = list(view.columns)
    if any(case["skipped"] for case in cases):
        columns.append(_Column("skipped", lambda case: case["skipped"] or ""))
    rows = [[column.text(case) for column in columns] for case in cases]
    return Table(view.title, view.caption, [column.heading for column in columns], rows)


def _fact(heading: str, name: str, form: str = "") -> _Column:
    return _Column(heading, lambda case: _number(case["facts"].get(name), form))


def _mib(heading: str, name: str) -> _Column:
    def text(case: CaseResults) -> str:
        value = case["facts"].get(name)
        return "" if value is None else f"{value / 2**20:.2f}"

    return _Column(heading, text)


def _milliseconds(heading: str, name: str) -> _Column:
    def text(case: CaseResults) -> str:
        value = case["seconds"].get(name)
        if value is None:
            return ""
        return f"{1e3 * value:,.0f}" if value >= 0.1 else f"{1e3 * value:.3g}"

    return _Column(f"{heading}, ms", text)


def _ratio(heading: str, name: str) -> _Column:
    def text(case: CaseResults) -> str:
        found = case["ratios"].get(name)
        if found is None:
            return ""
        return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"

    return _Column(heading, text)


def _met(case: CaseResults) -> str:
    """Whether the overhead meets its aim: beyond its quartiles, as medians vary between runs."""
    overhead, aim = case["ratios"].get("overhead"), case["facts"].get("target")
    if overhead is None or aim is None:
        return ""
    return "yes" if overhead["high"] <= aim else "no" if overhead["low"] > aim else "open"


def _number(value: float | str | bool | None, form: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, form)


_NAME = _Column("case", lambda case: case["name"])
_WEIGHTS = _fact("quantized weights", "quantized_weights", ",")

_VIEWS = {
    "steps": _View(
        "Steps: FOGZO beside STE and the floor",
        "Overhead is (FOGZO step - STE step) / two forwards without gradient; own work the same of "
        "a step whose probes cost nothing. The floor is an STE step and the two forwards. Medians "
        "of ratios within a round, with quartiles; an aim between them is open.",
        (
            _NAME,
            _WEIGHTS,
            _milliseconds("STE", "STE step"),
            _milliseconds("FOGZO", "FOGZO step"),
            _ratio("FOGZO / STE", "FOGZO / STE"),
            _ratio("FOGZO / floor", "FOGZO / floor"),
            _ratio("own work", "own work"),
            _ratio("overhead", "overhead"),
            _fact("aim", "target", ".2f"),
            _Column("met", _met),
        ),
    ),
    "memory": _View(
        "Memory: peak of a FOGZO step above an STE step's",
        "In copies of the quantized weights; of two steps, so that what the first leaves behind "
        "counts.",
        (
            _NAME,
            _WEIGHTS,
            _mib("weights, MiB", "weight_bytes"),
            _mib("STE peak, MiB", "ste_peak_bytes"),
            _fact("default", "default_copies", ".2f"),
            _fact("lean", "lean_copies", ".2f"),
        ),
    ),
    "layers": _View(
        "Layers: forward and backward of one layer",
        "Over the float layer, medians of ratios within a round, with quartiles.",
        (
            _NAME,
            _milliseconds("pass", "step"),
            _ratio("over float", "over base"),
        ),
    ),
    "compiled": _View(
        "Compiled: whole steps with and without torch.compile",
        "Compiled over eager, medians of ratios within a round, with quartiles. Nothing was "
        "compiled anew while it was timed.",
        (
            _NAME,
            _milliseconds("STE, compiled", "STE step, compiled"),
            _milliseconds("FOGZO, compiled", "FOGZO step, compiled"),
            _ratio("STE", "STE step, compiled / eager"),
            _ratio("FOGZO", "FOGZO step, compiled / eager"),
        ),
    ),
    "probes": _View(
        "Probes: kinds of probes, and n-SPSA in place",
        "Over the row of the same comparison that has 1, medians of ratios within a round, with "
        "quartiles. An n-SPSA row is a gradient without optimizer, the others are whole steps.",
        (
            _NAME,
            _milliseconds("time", "step"),
            _ratio("over base", "over base"),
        ),
    ),
    "scaling": _View(
        "Scaling: FOGZO step over STE step",
        "An MLP with one hidden layer, one thing varied at a time; each rank is a process on CPUs, "
        "with a batch of its own. Memory as in its own section. Medians of ratios within a round, "
        "with quartiles.",
        (
            _NAME,
            _WEIGHTS,
            _milliseconds("STE", "STE step"),
            _milliseconds("FOGZO", "FOGZO step"),
            _ratio("FOGZO / STE", "FOGZO / STE"),
            _fact("memory, default", "default_copies", ".2f"),
            _fact("memory, lean", "lean_copies", ".2f"),
        ),
    ),
}
