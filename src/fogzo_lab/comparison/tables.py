"""A comparison in words and tables, for the terminal, the report and docs/results.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fogzo_lab.comparison.intervals import verdict
from fogzo_lab.comparison.rows import ROWS
from fogzo_lab.comparison.summary import MORE_IS_BETTER, Results


@dataclass(frozen=True)
class Table:
    """Cells of text, the first column names."""

    title: str
    caption: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Metric:
    """How a number is shown."""

    name: str
    unit: str
    factor: float
    digits: int

    def text(self, value: float | None, sign: str = "") -> str:
        """The value without its unit; a dash where there is none."""
        return "–" if value is None else f"{self.factor * value:{sign}.{self.digits}f}"

    def spread(self, summary: Results | None) -> str:
        """Mean and standard deviation."""
        if summary is None or summary["mean"] is None:
            return "diverged"
        return f"{self.text(summary['mean'])} ± {_or_nan(self, summary['sd'])}"

    def interval(self, found: Results, ends: tuple[str, str] = ("low", "high")) -> str:
        """A difference and its interval; nothing where there is none."""
        low, high = (found.get(end) for end in ends)
        if low is None:
            return ""
        return f"{self.text(found['mean'], '+')} [{self.text(low, '+')}, {self.text(high, '+')}]"


METRICS = {
    "test_accuracy": Metric("test accuracy", "points", 100, 2),
    "test_loss": Metric("test loss", "nats", 1, 4),
    "test_perplexity": Metric("test perplexity", "", 1, 2),
    "train_loss": Metric("train loss", "nats", 1, 4),
}
_BUDGETS = {
    "steps": "With equal steps",
    "time": "With equal time, each row taking as many steps as fit into FOGZO's seconds",
}


def row_label(row: Results) -> str:
    """A row's name for people, with its budget where it is not the usual one."""
    return ROWS[row["name"]].label + (", as long as FOGZO" if row["budget"] == "time" else "")


def quality(result: Results) -> str:
    """Test results in words, and the training loss where it was measured."""
    words = [f"test loss {result['test_loss']:.4f} nats"]
    words += [f"test accuracy {result['test_accuracy']:.2%}"]
    if "test_perplexity" in result:
        words += [f"test perplexity {result['test_perplexity']:.2f}"]
        words += [f"{result['test_bits_per_byte']:.3f} bits a byte"]
    if "train_loss" in result:
        words += [f"train loss {result['train_loss']:.4f}"]
    return ", ".join(words)


def main_metric(results: Results) -> str:
    """What rows are judged by: perplexity for text, accuracy for images."""
    text = any("test_perplexity" in row for row in results["rows"])
    return "test_perplexity" if text else "test_accuracy"


def metrics_of(results: Results) -> list[str]:
    """The metrics that were measured, the main one first."""
    main = main_metric(results)
    return [main, *(m for m in METRICS if m != main and any(m in r for r in results["rows"]))]


def difference(results: Results, row: Results) -> Any:
    """FOGZO minus the row, or None for FOGZO itself."""
    for entry in results["differences"]:
        if entry["name"] == row["name"] and entry["budget"] == row["budget"]:
            return entry
    return None


def summary_table(results: Results) -> Table:
    """One table of everything, as pages of results show it."""
    main = main_metric(results)
    keys = (main, "train_loss")
    heading = ["row", *map(_heading, keys), "lr", "kappa", "steps", "seconds", "extra forwards"]
    heading += [f"FOGZO minus row: {METRICS[key].name}" for key in keys]
    rows = []
    for row in results["rows"]:
        gap = difference(results, row) or {}
        kappa = row.get("kappa")
        cells = [row_label(row), *(METRICS[key].spread(row.get(key)) for key in keys), _rate(row)]
        cells += ["" if kappa is None else f"{kappa:g}", str(row["steps"])]
        cells += [f"{row['seconds']['mean']:.2f}", str(row["extra_forwards"])]
        rows.append([*cells, *(METRICS[key].interval(gap.get(key, {})) for key in keys)])
    return Table("", "", heading, rows)


def quality_table(results: Results) -> Table:
    """What every row reached."""
    keys = metrics_of(results)
    with_kappa = any(row.get("kappa") is not None for row in results["rows"])
    main = main_metric(results)
    heading = ["row", *map(_heading, keys), "learning rate", *(["kappa"] if with_kappa else [])]
    heading += ["steps", "seconds", f"FOGZO minus row, {METRICS[main].unit or 'perplexity'} [95%]"]
    rows = []
    for row in results["rows"]:
        gap = difference(results, row)
        kappa = row.get("kappa")
        cells = [row_label(row), *(METRICS[key].spread(row.get(key)) for key in keys), _rate(row)]
        cells += ["" if kappa is None else f"{kappa:g}"] if with_kappa else []
        cells += [str(row["steps"]), f"{row['seconds']['mean']:.2f}"]
        rows.append([*cells, METRICS[main].interval(gap[main]) if gap and main in gap else ""])
    caption = (
        "Mean ± standard deviation over seeds, at the learning rate and kappa of lowest mean "
        'validation loss; "(edge)" marks a rate at the end of the grid, where a better one may lie '
        "beyond."
    )
    return Table("Final quality", caption, heading, rows)


def difference_table(results: Results) -> Table | None:
    """Every difference with both of its intervals; None where there is no interval."""
    keys = [key for key in metrics_of(results) if any(key in gap for gap in results["differences"])]
    heading, rows = ["row"], []
    for key in keys:
        heading += [f"{_heading(key)}, Student", "bootstrap"]
    for row in results["rows"]:
        gap = difference(results, row)
        if gap is None:
            continue
        cells = [row_label(row)]
        for key in keys:
            found = gap.get(key, {})
            boot = METRICS[key].interval(found, ("bootstrap_low", "bootstrap_high"))
            cells += [METRICS[key].interval(found), boot]
        rows.append(cells)
    if not any(any(cells[1:]) for cells in rows):
        return None
    caption = (
        "FOGZO minus row, paired by seed, with 95% intervals. A winner is called by Student's "
        "interval. The bootstrap (percentiles of 10,000 resamples) stands beside it and calls "
        "nothing: of few seeds it is too narrow."
    )
    return Table("FOGZO minus every other row", caption, heading, rows)


def cost_table(results: Results) -> Table:
    """What every row costs, in time and in passes that no machine changes."""
    seconds = results["run_seconds_measured_in_turns"]
    heading = ["row", "step time / STE's", "steps", "forwards", "backwards"]
    heading += ["forward equivalents", "tuning runs"]
    rows = []
    for row in results["rows"]:
        ratio = seconds[row["name"]] / seconds["ste"] if "ste" in seconds else None
        counts = [row.get(k) for k in ("forwards", "backwards", "forward_equivalents")]
        cells = [row_label(row), "–" if ratio is None else f"{ratio:.2f}", str(row["steps"])]
        cells += ["–" if count is None else f"{count:,}" for count in counts]
        rows.append([*cells, str(row.get("tuning_runs", "–"))])
    caption = (
        "Step times were measured in turns on one machine. Forwards and backwards are passes over "
        "a whole batch in one run; a backward counts as two forwards. Rows with a kappa may have "
        "been tuned over more candidates than the others: tuning runs says so."
    )
    return Table("Cost", caption, heading, rows)


def plan_table(plan: Results) -> Table:
    """What a comparison would run."""
    rows = [
        [
            row_label(cell),
            *(str(cell[key]) for key in ("steps", "runs", "cached", "to_run")),
            f"{cell['seconds_a_run']:.3g}",
            f"{cell['seconds']:.3g}",
        ]
        for cell in plan["cells"]
    ]
    heading = ("row", "steps", "runs", "cached", "to run", "seconds a run", "seconds")
    return Table(f"{plan['recipe']}: what would run", "", heading, rows)


def findings(results: Results) -> list[str]:
    """What the intervals allow one to say about FOGZO, in sentences, wins and losses alike."""
    sentences = []
    for key in METRICS:
        verdicts = _verdicts(results, key)
        name = METRICS[key].name
        for kind, begin in (
            ("better", f"FOGZO's {name} is better than that of "),
            ("worse", f"FOGZO's {name} is worse than that of "),
            ("open", f"These seeds do not tell FOGZO's {name} apart from that of "),
        ):
            labels = [row_label(row) for row, _, found in verdicts if found == kind]
            if labels:
                sentences.append(f"{begin}{'; '.join(labels)}.")
    if sentences:
        return [*sentences, "Each by a 95% interval of differences paired by seed."]
    return [_no_interval(results)] if results["differences"] else []


def fallback_words(numbers: Results) -> str:
    """How many refined steps of a run, or of a row's runs, fell back and why; empty if none."""
    counts = numbers.get("fallbacks", {})
    if not counts:
        return ""
    reasons = sorted(counts, key=counts.__getitem__, reverse=True)
    said = [reason if len(counts) == 1 else f"{reason} ({counts[reason]:,})" for reason in reasons]
    return (
        f"{sum(counts.values()):,} of {numbers['refined_steps']:,} refined steps kept STE's "
        f"gradient: {'; '.join(said)}."
    )


def fallbacks(results: Results) -> list[str]:
    """A sentence for every row of which some steps fell back."""
    words = [(row_label(row), fallback_words(row)) for row in results["rows"]]
    return [f"{label}: {said}" for label, said in words if said]


def story(results: Results) -> list[str]:
    """The findings with their numbers, for somebody who has not read the paper."""
    main = main_metric(results)
    metric = METRICS[main]
    fogzo = next((row for row in results["rows"] if row["name"] == "fogzo"), None)
    if fogzo is None:
        return ["FOGZO is not among the rows, so nothing is compared with it."]
    if main not in fogzo:
        return ["FOGZO's loss did not stay finite: there is nothing to compare."]
    unit = "%" if metric.unit == "points" else ""
    lines = [f"FOGZO reached a {metric.name} of {metric.spread(fogzo[main])}{unit}."]
    verdicts = _verdicts(results, main)
    for budget, when in _BUDGETS.items():
        here = [(row, gap, kind) for row, gap, kind in verdicts if row["budget"] == budget]
        parts = []
        for kind, words in (
            ("better", "better than"),
            ("worse", "worse than"),
            ("open", "not told apart from"),
        ):
            named = [
                f"{ROWS[row['name']].label} ({_range(metric, gap)})"
                for row, gap, found in here
                if found == kind
            ]
            if named:
                parts.append(f"{words} {', '.join(named)}")
        if parts:
            lines.append(f"{when}, FOGZO was {'; '.join(parts)}.")
    if not verdicts:
        return [*lines, _no_interval(results)]
    direction = "more" if MORE_IS_BETTER[main] else "less"
    lines.append(
        "In brackets: FOGZO minus the row, and its 95% interval over seeds; "
        f"{direction} is better. A difference is called one only where the interval excludes zero, "
        "which chance alone makes happen about once in twenty rows."
    )
    return lines


def _verdicts(results: Results, key: str) -> list[tuple[Results, Results, str]]:
    """Every quantized row with its difference in a metric, and what to call it."""
    found = []
    for row in results["rows"]:
        gap = difference(results, row)
        if gap is None or row["name"] == "float" or key not in gap:
            continue
        kind = verdict(gap[key], MORE_IS_BETTER[key])
        if kind is not None:
            found.append((row, gap[key], kind))
    return found


def _no_interval(results: Results) -> str:
    if any(len(row["seeds"]) > 1 for row in results["rows"]):
        return "A run diverged in every row, so no interval exists and no winner is called."
    return "With one seed no interval exists, and no winner is called: --num-seeds 5."


def _range(metric: Metric, gap: Results) -> str:
    ends = f"{metric.text(gap['low'], '+')} to {metric.text(gap['high'], '+')}"
    return f"{metric.text(gap['mean'], '+')} {metric.unit}".rstrip() + f", {ends}"


def _heading(key: str) -> str:
    metric = METRICS[key]
    unit = {"points": " %", "nats": " (nats)", "": ""}[metric.unit]
    return metric.name + unit


def _rate(row: Results) -> str:
    return f"{row['learning_rate']:g}" + (" (edge)" if row["at_edge_of_grid"] else "")


def _or_nan(metric: Metric, sd: float | None) -> str:
    return "nan" if sd is None else metric.text(sd)
