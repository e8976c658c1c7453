"""Training loss against forward passes: FOGZO beside n-SPSA, as in the paper's shallow-net study.

    python experiments/forwards.py [--quick] [--workers 2] [--output-dir experiments/forwards]

Every point is a training run of 784-10-10 on MNIST with its own number of samples and steps, its
whole learning-rate schedule in those steps and its own tuned learning rate. What n-SPSA pays for
a loss is read from the cheapest of its curves over steps, one curve per n. A forward pass is one
over a batch; a backward pass counts as two. Needs the data in data/mnist; with --quick,
scikit-learn's digits do. Finished runs are not repeated. Writes results.json and forwards.svg.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from fogzo_lab.cli import display
from fogzo_lab.comparison.compare import CompareConfig, compare
from fogzo_lab.comparison.results import RowResult
from fogzo_lab.comparison.rows import ROWS
from fogzo_lab.comparison.tables import where
from fogzo_lab.figures import drawing
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table
from fogzo_lab.training.config import TrainConfig

FOLDER = Path("experiments/forwards")
PAPER_RATIO = 796
"""What the paper reports: 15,920 forward passes per step of n-SPSA, 20 of FOGZO, for one loss."""


@dataclass(frozen=True)
class Cell:
    """Rows that are run alike."""

    optimizer: str
    samples: int
    steps: int
    rows: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is run.

    Attributes:
        rates: Learning rates tried, by optimizer.
        kappas: Tried where a row has one.
        guided: Steps of the rows that follow STE.
        guided_samples: n of FOGZO.
        spsa: Steps of n-SPSA, by optimizer and n.
        seeds: Seeds of a point whose run is short; one of them tunes.
        seeds_of_long_runs: Seeds of a point of more than `long` forward passes.
        long: Forward passes beyond which a run is long.
    """

    rates: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("adamw", (1e-3, 3e-3, 1e-2, 3e-2)),
        ("sgd", (1e-2, 3e-2, 1e-1, 3e-1)),
    )
    kappas: tuple[float, ...] = (0.1, 1.0)
    guided: tuple[int, ...] = (25, 100, 400)
    guided_samples: tuple[int, ...] = (1, 10)
    spsa: tuple[tuple[str, int, tuple[int, ...]], ...] = (
        ("adamw", 1, (25, 100, 400)),
        ("adamw", 10, (25, 100, 400)),
        ("adamw", 100, (25, 100, 400)),
        ("adamw", 1000, (25, 100)),
        ("adamw", 7960, (25,)),
        ("sgd", 1, (25, 100, 400)),
        ("sgd", 10, (25, 100, 400)),
        ("sgd", 100, (100,)),
    )
    seeds: int = 5
    seeds_of_long_runs: int = 3
    long: int = 300_000

    def cells(self) -> list[Cell]:
        """All of them, cheap ones first."""
        rows: dict[tuple[str, int, int], tuple[str, ...]] = {}
        for (optimizer, _), steps, samples in product(self.rates, self.guided, self.guided_samples):
            rows[optimizer, samples, steps] = (*GUIDED, "fogzo") if samples == 1 else ("fogzo",)
        for optimizer, samples, lengths in self.spsa:
            for steps in lengths:
                rows[optimizer, samples, steps] = (
                    *rows.get((optimizer, samples, steps), ()),
                    "spsa",
                )
        cells = [Cell(*key, names) for key, names in rows.items()]
        return sorted(cells, key=lambda cell: cell.steps * cell.samples)


GUIDED = ("ste", "ste-unmasked", "placebo", "control-variate")
QUICK = Config(
    rates=(("adamw", (3e-3,)),),
    kappas=(0.1,),
    guided=(4,),
    guided_samples=(1, 2),
    spsa=(("adamw", 1, (4,)), ("adamw", 2, (4,))),
    seeds=2,
)


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, on embedded data")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    config = QUICK if options.quick else Config()
    recipe = RECIPES["digits-mlp"]() if options.quick else mnist()
    cells, points = config.cells(), []
    with display.progress(len(cells), "comparisons", speaks=sys.stdout.isatty()) as advance:
        for index, cell in enumerate(cells, start=1):
            rows = compare(comparison_of(cell, config, recipe, options)).rows
            points += [outcome(cell, row) for row in rows]
            advance(index, len(cells), "")
    results = {
        "environment": environment(),
        "recipe": recipe.recipe,
        "batch_size": recipe.batch_size,
        "config": asdict(config),
        "points": points,
        "equal_loss": equal_loss(points),
    }
    write_text(options.output_dir / "results.json", dumps(results, indent=1) + "\n")
    plot(results, options.output_dir / "forwards.svg")


def mnist() -> TrainConfig:
    """784-10-10 on the local files."""
    recipe = replace(RECIPES["mnist-mlp"](), noise_shape="isotropic", agreement="measured")
    return replace(recipe, data=replace(recipe.data, dataset="data/mnist"))


def comparison_of(
    cell: Cell, config: Config, recipe: TrainConfig, options: argparse.Namespace
) -> CompareConfig:
    """The comparison that measures a cell."""
    base = replace(
        recipe,
        optimizer=cell.optimizer,
        num_samples=cell.samples,
        evaluate="stacked" if cell.samples > 1 else "in_place",
        max_steps=cell.steps,
        log_every=max(1, cell.steps // 20),
        output_dir=options.output_dir / "runs" / f"{cell.optimizer}-{cell.samples}-{cell.steps}",
    )
    long = 2 * cell.samples * cell.steps > config.long
    return CompareConfig(
        base=base,
        rows=cell.rows,
        learning_rates=dict(config.rates)[cell.optimizer],
        kappas=config.kappas,
        num_seeds=config.seeds_of_long_runs if long else config.seeds,
        tuning_seeds=1,
        equal_time=False,
        workers=options.workers,
    )


def outcome(cell: Cell, row: RowResult) -> dict[str, Any]:
    """What a row reached, and what it cost."""
    return {
        "optimizer": cell.optimizer,
        "row": row.name,
        "samples": cell.samples,
        "steps": cell.steps,
        "forwards": row.forward_equivalents,
        "learning_rate": row.learning_rate,
        "kappa": row.value,
        "at_edge_of_grid": row.at_edge_of_grid,
        "tuning_runs": row.tuning_runs,
        "train_loss": row.values("train_loss"),
        "test_accuracy": row.values("test_accuracy"),
    }


def equal_loss(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every FOGZO point, what n-SPSA pays for its mean training loss."""
    found = []
    for point in points:
        if point["row"] != "fogzo":
            continue
        loss = statistics.fmean(point["train_loss"])
        same = [p for p in points if p["row"] == "spsa" and p["optimizer"] == point["optimizer"]]
        prices = {
            samples: price([p for p in same if p["samples"] == samples], loss)
            for samples in sorted({p["samples"] for p in same})
        }
        paid = {samples: forwards for samples, forwards in prices.items() if forwards is not None}
        best = min(paid, key=lambda samples: paid[samples]) if paid else None
        # Of a loss that no run reached, nothing is known beyond how near the nearest one came, at
        # its own cost: dearer runs of another n are farther from it.
        lowest = min(same, key=lambda p: statistics.fmean(p["train_loss"]))
        found.append(
            {
                "optimizer": point["optimizer"],
                "samples": point["samples"],
                "steps": point["steps"],
                "train_loss": loss,
                "forwards": point["forwards"],
                "spsa_samples": best,
                "spsa_forwards": None if best is None else paid[best],
                "ratio": None if best is None else paid[best] / point["forwards"],
                "lowest_spsa_loss": statistics.fmean(lowest["train_loss"]),
                "lowest_spsa_samples": lowest["samples"],
                "lowest_spsa_forwards": lowest["forwards"],
                "lowest_spsa_ratio": lowest["forwards"] / point["forwards"],
            }
        )
    return found


def price(curve: Sequence[dict[str, Any]], loss: float) -> float | None:
    """Forward passes at which a curve over steps reaches a loss, between points on a log scale."""
    reached = sorted((p["forwards"], statistics.fmean(p["train_loss"])) for p in curve)
    if reached[0][1] <= loss:
        return float(reached[0][0])  # its shortest run is already there: it may cost less
    for (cheap, high), (dear, low) in pairwise(reached):
        if low <= loss:
            part = (high - loss) / (high - low)
            return math.exp(math.log(cheap) + part * (math.log(dear) - math.log(cheap)))
    return None


def table(results: dict[str, Any]) -> Table:
    """What n-SPSA pays for FOGZO's losses, for docs/results.md."""
    heading = ("FOGZO", "steps", "train loss (nats)", "forward equivalents")
    heading += ("of n-SPSA, for that loss", "ratio")
    rows = []
    for entry in results["equal_loss"]:
        reached = entry["ratio"] is not None
        rows.append(
            [
                f"{OPTIMIZERS[entry['optimizer']]}, n = {entry['samples']}",
                str(entry["steps"]),
                f"{entry['train_loss']:.3f}",
                f"{entry['forwards']:,}",
                f"{entry['spsa_forwards']:,.0f} (n = {entry['spsa_samples']})"
                if reached
                else f"not reached; nearest {entry['lowest_spsa_loss']:.3f} with "
                f"{entry['lowest_spsa_forwards']:,}",
                f"{entry['ratio']:.0f}"
                if reached
                else f"n = {entry['lowest_spsa_samples']}: not within "
                f"{entry['lowest_spsa_ratio']:.0f}",
            ]
        )
    edges = [p for p in results["points"] if p["at_edge_of_grid"]]
    most = max(results["points"], key=lambda point: point["forwards"])
    counts = sorted({len(point["train_loss"]) for point in results["points"]})
    caption = (
        "Where no run of n-SPSA reached the loss: the run that came nearest to it, and its cost "
        "over FOGZO's, which says nothing of other n or of longer runs. "
        f"n-SPSA with n = {most['samples']} reached {statistics.fmean(most['train_loss']):.3f} in "
        f"{most['steps']} steps, {most['forwards']:,} forward equivalents. Means over "
        f"{' or '.join(map(str, counts))} seeds. Best learning rate at an edge of the grid: "
        f"{len(edges)} of {len(results['points'])} points. {where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}
MARKS = {1: "o", 10: "s", 100: "^", 1000: "D", 7960: "v"}
STYLES = {
    "ste": ("STE", {"color": "0.5", "linestyle": "-", "marker": "x"}),
    "ste-unmasked": ("STE, unmasked", {"color": "0.5", "linestyle": ":", "marker": "+"}),
    "placebo": ("placebo", {"color": "0.5", "linestyle": "--", "marker": "1"}),
}


def plot(results: dict[str, Any], path: Path) -> None:
    """Training loss against forward passes, a panel per optimizer."""
    optimizers = [optimizer for optimizer, _ in results["config"]["rates"]]
    with drawing(path, (8.2, 3.9)) as figure:
        panels = figure.subplots(1, len(optimizers), squeeze=False, sharey=True)[0]
        for axes, optimizer in zip(panels, optimizers, strict=True):
            draw(axes, [p for p in results["points"] if p["optimizer"] == optimizer])
            axes.set(title=OPTIMIZERS[optimizer], xlabel="forward passes, a backward pass as two")
        panels[0].set(ylabel="training loss (nats)")
        lines = panels[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=5, frameon=False, fontsize=7)


def draw(axes: Axes, points: Sequence[dict[str, Any]]) -> None:
    """One line per row and n, one mark per run length, with the range over seeds."""
    for row, samples in sorted({(p["row"], p["samples"]) for p in points}):
        if row in STYLES:
            name, style = STYLES[row]
        elif row in ("fogzo", "spsa"):
            name = f"{ROWS[row].label}, n = {samples}"
            style = {"color": "black", "linestyle": "-" if row == "fogzo" else ":"}
            style |= {"marker": MARKS.get(samples, "o")}
            style |= {"fillstyle": "full" if row == "fogzo" else "none"}
        else:
            continue  # the control variate is in results.json; here it would hide FOGZO
        line = sorted(
            (p["forwards"], p["train_loss"])
            for p in points
            if (p["row"], p["samples"]) == (row, samples)
        )
        means = [statistics.fmean(losses) for _, losses in line]
        reach = [
            [mean - min(losses) for mean, (_, losses) in zip(means, line, strict=True)],
            [max(losses) - mean for mean, (_, losses) in zip(means, line, strict=True)],
        ]
        forwards = [count for count, _ in line]
        axes.errorbar(forwards, means, reach, label=name, linewidth=0.9, markersize=4, **style)
    axes.set(xscale="log")


if __name__ == "__main__":
    main()
