"""Loss and masked weights against the length of a training, drawn from a comparison's JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fogzo_lab.comparison.plots import curves, smooth
from fogzo_lab.comparison.results import Comparison
from fogzo_lab.figures import drawing


def plot(results: dict[str, Any], path: Path) -> None:
    """Training loss beyond STE's, and the share of masked weights, over the steps of all rows."""
    rows = [row for row in Comparison.from_dict(results).rows if row.budget == "steps"]
    [ste] = [row for row in rows if row.name == "ste"]
    # Every row sees the same batches, whose own losses differ more than rows do.
    of_ste = {point["step"]: point["loss"] for point in ste.curve}
    # The first steps show learning rates, and would leave no room for the rest.
    settled = ste.steps / 6
    beyond = [replace(row, curve=minus(row.curve, of_ste, settled)) for row in rows]
    with drawing(path, (7.5, 3.2)) as figure:
        left, right = figure.subplots(1, 2)
        curves(left, beyond, "step", "loss", "step", "training loss minus STE's (nats)")
        curves(right, rows, "step", "masked", "step", "share of masked weights")
        # One legend for both, as the right one has no place for long names.
        handles = left.get_legend_handles_labels()
        for axes in (left, right):
            axes.get_legend().remove()
        figure.legend(
            *handles,
            loc="outside lower center",
            ncols=4,
            fontsize=7,
            frameon=False,
            handlelength=4,
        )


def minus(
    curve: Sequence[Mapping[str, float]], other: Mapping[float, float], begin: float
) -> list[dict[str, float]]:
    """The loss beyond another curve's, from a step on, as a running mean."""
    points = [p for p in curve if p["step"] >= begin]
    losses = smooth([p["loss"] - other[p["step"]] for p in points])
    return [{"step": p["step"], "loss": loss} for p, loss in zip(points, losses, strict=True)]
