"""Many comparisons in one table: what each gradient reached, and what the intervals say of FOGZO.

`tables.py` writes these between the marks of README.md and docs/results.md; a group is one table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fogzo_lab.comparison import tables
from fogzo_lab.comparison.intervals import paired_interval, verdict
from fogzo_lab.comparison.rows import ROWS
from fogzo_lab.comparison.summary import MORE_IS_BETTER

RIVALS = ("ste", "ste-unmasked", "placebo")


@dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes:
        folder: Of its results.json.
        label: What was trained, and how it was quantized.
        paper: What the paper reports of its own, larger, setting; empty where it is silent.
    """

    folder: str
    label: str
    paper: str = ""


GROUPS: dict[str, Sequence[Line]] = {
    "overview-short": (
        Line("mnist-mlp-adamw", "MLP, MNIST, fixed step"),
        Line("mnist-mlp-lsq-w2", "MLP, MNIST, LSQ"),
        Line("mnist-mlp-quest-w2", "MLP, MNIST, QuEST"),
        Line("cifar-deit-identity", "DeiT, CIFAR-10, fixed step"),
        Line("cifar-resnet-identity", "ResNet-18, CIFAR-10, fixed step"),
        Line("shakespeare-llama-identity", "LLaMA, Shakespeare, fixed step"),
    ),
    "overview-fixed": (
        Line("mnist-mlp-adamw", "MLP, MNIST, AdamW, identity"),
        Line("mnist-mlp-sgd", "MLP, MNIST, SGD, identity"),
        Line("mnist-mlp-hardtanh", "MLP, MNIST, hardtanh"),
        Line("mnist-mlp-tanh", "MLP, MNIST, tanh"),
        Line("mnist-mlp-approx-sign", "MLP, MNIST, ApproxSign"),
        Line("cifar-deit-identity", "DeiT, CIFAR-10, identity", "DeiT-Tiny: 62.72 → 70.06"),
        Line("cifar-deit-hardtanh", "DeiT, CIFAR-10, hardtanh"),
        Line("cifar-deit-tanh", "DeiT, CIFAR-10, tanh", "DeiT-Tiny: 41.98 → 46.8"),
        Line("cifar-deit-approx-sign", "DeiT, CIFAR-10, ApproxSign"),
        Line("cifar-resnet-identity", "ResNet-18, CIFAR-10, identity", "79.92 → 80.42"),
        Line("cifar-resnet-hardtanh", "ResNet-18, CIFAR-10, hardtanh"),
        Line("cifar-resnet-tanh", "ResNet-18, CIFAR-10, tanh", "74.68 → 75.02"),
        Line("cifar-resnet-approx-sign", "ResNet-18, CIFAR-10, ApproxSign"),
        Line("shakespeare-llama-identity", "LLaMA, Shakespeare, identity", "9M: 109.95 → 105.64"),
        Line("shakespeare-llama-tanh", "LLaMA, Shakespeare, tanh", "9M: 123.97 → 121.51"),
    ),
    "overview-learned": (
        Line("mnist-mlp-lsq-w2", "MLP, MNIST, LSQ W2"),
        Line("mnist-mlp-lsq-w2a2", "MLP, MNIST, LSQ W2A2"),
        Line("mnist-mlp-quest-w2", "MLP, MNIST, QuEST W2"),
        Line("mnist-mlp-quest-w2a2", "MLP, MNIST, QuEST W2A2"),
        Line("cifar-deit-lsq-w2", "DeiT, CIFAR-10, LSQ W2", "DeiT-Small: 79.55 → 80.06"),
        Line("shakespeare-llama-lsq-w2a2", "LLaMA, Shakespeare, LSQ W2A2", "95M: 39.06 → 37.38"),
        Line(
            "shakespeare-llama-quest-w2a2", "LLaMA, Shakespeare, QuEST W2A2", "95M: 37.75 → 37.37"
        ),
    ),
}


MIXTURES = (Line("shakespeare-llama-identity", "LLaMA, Shakespeare, identity"),)


def overview(
    lines: Sequence[Line], load: Callable[[str], dict[str, Any]]
) -> tuple[list[str], list[list[str]], str]:
    """Heading, rows and a note.

    Args:
        lines: The comparisons.
        load: Reads the results.json of a folder.
    """
    with_paper = any(line.paper for line in lines)
    heading = ["network, data, quantizer", "budget", "STE", "STE, unmasked", "placebo", "FOGZO"]
    heading += [f"FOGZO − {ROWS[name].label}" for name in RIVALS]
    heading += ["paper, STE → FOGZO"] if with_paper else []
    rows, calls = [], {"better": 0, "worse": 0, "open": 0}
    tuned = []
    for line in lines:
        results = load(line.folder)
        tuned += [row["at_edge_of_grid"] for row in results["rows"]]
        for budget in dict.fromkeys(row["budget"] for row in results["rows"]):
            cells, verdicts = _compared(results, budget)
            same = budget == "steps"
            rows.append(
                [line.label if same else "", "equal steps" if same else "equal time", *cells]
            )
            if with_paper:
                rows[-1].append(line.paper if same else "")
            for found in verdicts:
                calls[found] += 1
    note = _note(calls, tuned)
    if with_paper:
        note += " The paper's figures are of its own, larger networks and data, without intervals."
    return heading, rows, note


def mixture(
    lines: Sequence[Line], load: Callable[[str], dict[str, Any]]
) -> tuple[list[str], list[list[str]], str]:
    """70% STE and 30% FOGZO beside what else the same seconds buy: heading, rows and a note."""
    heading = ["network, data, quantizer", "STE", "STE, unmasked", "placebo", "70% STE, then FOGZO"]
    heading += [f"mixture − {ROWS[name].label}" for name in RIVALS]
    rows = []
    for line in lines:
        results = load(line.folder)
        main = tables.main_metric(results)
        metric = tables.METRICS[main]
        found = [_at_equal_time(results, name) for name in (*RIVALS, "ste-then-fogzo")]
        mixed = [seed[main] for seed in found[-1]["seeds"]]
        cells = [line.label, *(metric.spread(row[main]) for row in found)]
        for row in found[:-1]:
            others = [seed[main] for seed in row["seeds"]]
            gap = paired_interval([a - b for a, b in zip(mixed, others, strict=True)])
            cells.append(_called(metric, gap, MORE_IS_BETTER[main]))
        rows.append(cells)
    note = (
        "All four take the seconds of a whole run of FOGZO. Perplexity a byte, less is better: "
        "mean ± standard deviation over seeds, differences paired by seed with 95% intervals. The "
        "paper, LLaMA-30M on C4: STE 38.25, mixture 37.93, without intervals."
    )
    return heading, rows, note


def _compared(results: dict[str, Any], budget: str) -> tuple[list[str], list[str]]:
    """The rivals, FOGZO and the differences at one budget, and what each difference is called."""
    main = tables.main_metric(results)
    metric = tables.METRICS[main]
    pick = _at_equal_time if budget == "time" else _at_equal_steps
    rivals = [pick(results, name) for name in RIVALS]
    cells = [metric.spread(row.get(main)) for row in [*rivals, _at_equal_steps(results, "fogzo")]]
    verdicts = []
    for row in rivals:
        gap = tables.difference(results, row)[main]
        found = verdict(gap, MORE_IS_BETTER[main])
        cells.append(_called(metric, gap, MORE_IS_BETTER[main]))
        verdicts += [found] if found else []
    return cells, verdicts


def _called(metric: tables.Metric, gap: dict[str, Any], more_is_better: bool) -> str:
    """A difference, bold and in words where its interval excludes zero."""
    text, found = metric.interval(gap), verdict(gap, more_is_better)
    return f"**{text}** {found}" if found in ("better", "worse") else text


def _at_equal_steps(results: dict[str, Any], name: str) -> Any:
    return next(r for r in results["rows"] if (r["name"], r["budget"]) == (name, "steps"))


def _at_equal_time(results: dict[str, Any], name: str) -> Any:
    rows = [r for r in results["rows"] if (r["name"], r["budget"]) == (name, "time")]
    # A row as costly as FOGZO is not run again: its equal steps are its equal time.
    return rows[0] if rows else _at_equal_steps(results, name)


def _note(calls: dict[str, int], at_edges: Sequence[bool]) -> str:
    count = sum(calls.values())
    return (
        "Test accuracy in % (more is better) or, for text, perplexity a byte (less is better): "
        "mean ± standard deviation over seeds; differences paired by seed with 95% intervals. Of "
        f"{count} differences FOGZO is better in {calls['better']}, worse in {calls['worse']} and "
        f"not told apart in {calls['open']}; chance alone would call about {count / 20:.0f} of "
        f"them. For {sum(at_edges)} of {len(at_edges)} tuned rows the best learning rate lies at "
        "an edge of the grid, where a better one may lie beyond."
    )
