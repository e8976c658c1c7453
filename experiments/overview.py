"""Many comparisons in one table: what each gradient reached, and what the intervals say of FOGZO.

`tables.py` writes these between the marks of docs/results.md; a group is one table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fogzo.cli import comparison
from fogzo.recipes.intervals import verdict
from fogzo.recipes.rows import ROWS
from fogzo.recipes.summary import MORE_IS_BETTER

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
        Line("shakespeare-llama-lsq-w2", "LLaMA, Shakespeare, LSQ W2", "20M: 50.85 → 50.61"),
        Line("shakespeare-llama-lsq-w2a2", "LLaMA, Shakespeare, LSQ W2A2", "95M: 39.06 → 37.38"),
        Line("shakespeare-llama-quest-w2", "LLaMA, Shakespeare, QuEST W2"),
        Line(
            "shakespeare-llama-quest-w2a2", "LLaMA, Shakespeare, QuEST W2A2", "95M: 37.75 → 37.37"
        ),
    ),
}


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
    for line in lines:
        results = load(line.folder)
        for budget in ("steps", "time"):
            cells, verdicts = _compared(results, budget)
            same = budget == "steps"
            rows.append(
                [line.label if same else "", "equal steps" if same else "equal time", *cells]
            )
            if with_paper:
                rows[-1].append(line.paper if same else "")
            for found in verdicts:
                calls[found] += 1
    return heading, rows, _note(calls)


def _compared(results: dict[str, Any], budget: str) -> tuple[list[str], list[str]]:
    """The rivals, FOGZO and the differences at one budget, and what each difference is called."""
    main = comparison.main_metric(results)
    metric = comparison.METRICS[main]
    # A row as costly as FOGZO is not run again: its equal steps are its equal time.
    rivals = [_row(results, name, budget) or _row(results, name, "steps") for name in RIVALS]
    cells = [metric.spread(row.get(main)) for row in [*rivals, _row(results, "fogzo", "steps")]]
    verdicts = []
    for row in rivals:
        gap = comparison.difference(results, row)[main]
        found = verdict(gap, MORE_IS_BETTER[main])
        text = metric.interval(gap)
        # Bold is a call, in FOGZO's favour or not; the sign and the metric say which.
        cells.append(f"**{text}** {found}" if found in ("better", "worse") else text)
        verdicts += [found] if found else []
    return cells, verdicts


def _row(results: dict[str, Any], name: str, budget: str) -> Any:
    for row in results["rows"]:
        if (row["name"], row["budget"]) == (name, budget):
            return row
    return None


def _note(calls: dict[str, int]) -> str:
    count = sum(calls.values())
    return (
        f"Test accuracy in % (more is better) or, for text, perplexity a byte (less is better): "
        f"mean ± standard deviation over seeds; differences paired by seed with 95% intervals. Of "
        f"{count} differences FOGZO is better in {calls['better']}, worse in {calls['worse']} and "
        f"not told apart in {calls['open']}; chance alone would call about {count / 20:.0f} of "
        f"them. The paper's figures are of its own, larger networks and data, without intervals."
    )
