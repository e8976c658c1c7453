"""Self-contained HTML reports: plots as inline SVG, no script, nothing to download."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fogzo.cli import display
from fogzo.recipes.compare import CompareConfig, Results
from fogzo.recipes.config import TrainConfig, to_json
from fogzo.recipes.environment import environment
from fogzo.recipes.run_folder import Metrics, write_text

# Told apart by line style and marker as well as by colour, for print and colour-blind readers.
_STYLES = {
    "float": ("#555555", (0, (1, 1)), "x"),
    "ste": ("#D55E00", "solid", "s"),
    "ste-unmasked": ("#E69F00", "dashed", "D"),
    "placebo": ("#0072B2", "dashdot", "^"),
    "fogzo": ("#000000", "solid", "o"),
    "lambda": ("#CC79A7", "dotted", "v"),
    "fogzo-paired": ("#56B4E9", "solid", "P"),
    "control-variate": ("#009E73", "dashed", "*"),
    "spsa": ("#999999", "solid", "+"),
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure of the report and what it shows."""

    title: str
    caption: str
    svg: Markup


def write_train_report(config: TrainConfig, metrics: Sequence[Metrics], result: Metrics) -> Path:
    """Write report.html of one run and return its path."""

    def loss(axes: Axes) -> None:
        axes.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], color="black")
        axes.set(xlabel="step", ylabel="training loss (nats)")

    plots = [_plot("Loss", "Loss of each logged batch under the quantized weights.", loss)]
    measured = [m for m in metrics if m.get("agreement") is not None]
    if measured:

        def agreement(axes: Axes) -> None:
            steps = [m["step"] for m in measured]
            axes.plot(steps, _smooth([m["agreement"] for m in measured]), color="black")
            _mark_one(axes)

        plots.append(_plot("Agreement", _AGREEMENT, agreement))
    numbers = {name: f"{value:.5g}" for name, value in result.items()}
    return _write(
        config.output_dir,
        title=f"{config.recipe}: one run with {config.estimator}",
        sentences=[f"After {result['steps']} steps: {display.quality(result)}."],
        heading=list(numbers),
        rows=[list(numbers.values())],
        plots=plots,
        config=to_json(config),
        facts=environment(),
    )


def write_compare_report(config: CompareConfig, results: Results) -> Path:
    """Write report.html of a comparison and return its path."""
    rows = [row for row in results["rows"] if row["budget"] == "steps"]
    plots = [
        _plot(
            "Training loss against steps",
            "Mean over seeds at each row's own best learning rate; batches are the same.",
            lambda axes: _curves(axes, rows, "step", "loss", "step", "training loss (nats)"),
        ),
        _plot(
            "Training loss against time",
            "The same runs against seconds of training, with the longer runs of cheaper rows.",
            lambda axes: _curves(
                axes,
                _longest(results["rows"]),
                "seconds",
                "loss",
                "seconds",
                "training loss (nats)",
            ),
        ),
        _plot(
            "Final test accuracy",
            "Every seed is a dot, the bar is their mean and its ends one standard deviation away.",
            lambda axes: _accuracies(axes, results["rows"]),
            height=0.6 + 0.42 * len(results["rows"]),
        ),
        _plot(
            "Final loss against learning rate",
            "Validation loss, from which each row's learning rate is chosen. Flat means robust.",
            lambda axes: _learning_rates(axes, rows),
        ),
    ]
    if any("agreement" in point for row in rows for point in row["curve"]):
        plots.append(
            _plot(
                "Agreement over training",
                _AGREEMENT,
                lambda axes: _agreements(axes, rows),
            )
        )
    sentences = [
        f"{len(results['rows'])} rows, {config.num_seeds} seeds each. Every row tried the learning "
        f"rates {', '.join(f'{rate:g}' for rate in results['grid'])}; the one with the lowest "
        "validation loss is reported, on test data. All rows share initial weights, batches and "
        "seeds.",
        "The rows: "
        + "; ".join(f"{display.ROW_LABELS[name]}, {display.MEANINGS[name]}" for name in config.rows)
        + '. "As long as FOGZO" gives a row as many steps as fit into FOGZO\'s seconds, from step '
        "times measured in turns.",
        *display.findings(results),
    ]
    return _write(
        config.base.output_dir,
        title=f"{config.base.recipe}: gradient estimators compared",
        sentences=sentences,
        heading=[
            "row",
            "test accuracy %",
            "train loss",
            "learning rate",
            "steps",
            "seconds",
            "extra forwards",
            "FOGZO minus row, points [95%]",
        ],
        rows=[display.table_cells(results, row) for row in results["rows"]],
        plots=plots,
        config=to_json(config),
        facts=results["environment"],
    )


_AGREEMENT = (
    "The measured slope of the quantized loss along the STE gradient, divided by the slope STE "
    "predicts: 1 where STE is right, below 1 where it promises too much, negative where it climbs. "
    "A running mean of nine logged steps."
)


def _curves(axes: Axes, rows: Sequence[Results], x: str, y: str, xlabel: str, ylabel: str) -> None:
    for row in rows:
        points = [p for p in row["curve"] if p.get(y) is not None]
        if not points:
            continue
        colour, dashes, marker = _STYLES[row["name"]]
        axes.plot(
            [p[x] for p in points],
            [p[y] for p in points],
            color=colour,
            linestyle=dashes,
            marker=marker,
            markevery=max(1, len(points) // 8),
            markersize=4,
            linewidth=1.2,
            label=display.row_label(row),
        )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize=7, frameon=False)


def _accuracies(axes: Axes, rows: Sequence[Results]) -> None:
    for position, row in enumerate(reversed(rows)):
        colour, _, marker = _STYLES[row["name"]]
        values = [100 * seed["test_accuracy"] for seed in row["seeds"]]
        accuracy = row["test_accuracy"]
        axes.plot(values, [position] * len(values), marker, color=colour, markersize=4, alpha=0.6)
        axes.errorbar(
            100 * accuracy["mean"],
            position,
            xerr=100 * (accuracy["sd"] or 0.0),
            fmt="|",
            color=colour,
            markersize=14,
            capsize=3,
        )
    axes.set_yticks(range(len(rows)), [display.row_label(row) for row in reversed(rows)])
    axes.set(xlabel="test accuracy (%)")


def _learning_rates(axes: Axes, rows: Sequence[Results]) -> None:
    for row in rows:
        colour, dashes, marker = _STYLES[row["name"]]
        curve = [p for p in row["validation_loss_by_learning_rate"] if p[1] is not None]
        axes.plot(
            [p[0] for p in curve],
            [p[1] for p in curve],
            color=colour,
            linestyle=dashes,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            label=display.row_label(row),
        )
    axes.set(xlabel="learning rate", ylabel="validation loss (nats)", xscale="log")
    axes.legend(fontsize=7, frameon=False)


def _agreements(axes: Axes, rows: Sequence[Results]) -> None:
    smooth = []
    for row in rows:
        points = [p for p in row["curve"] if p.get("agreement") is not None]
        values = _smooth([p["agreement"] for p in points])
        curve = [{"step": p["step"], "agreement": v} for p, v in zip(points, values, strict=True)]
        smooth.append({**row, "curve": curve})
    _curves(axes, smooth, "step", "agreement", "step", "agreement")
    _mark_one(axes)


def _smooth(values: Sequence[float], reach: int = 4) -> list[float]:
    """A running mean: one step's agreement has the noise of a few flipped weights."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _mark_one(axes: Axes) -> None:
    axes.axhline(1.0, color="#888888", linewidth=0.6)
    axes.set(xlabel="step", ylabel="agreement")


def _longest(rows: Sequence[Results]) -> list[Results]:
    """Each name once, with its longer run where there is one."""
    return list({row["name"]: row for row in rows}.values())


def _plot(title: str, caption: str, draw: Callable[[Axes], None], height: float = 3.2) -> Plot:
    # Text stays text, so that it scales, wraps and can be read aloud.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fogzo", "font.size": 8}):
        figure = Figure(figsize=(5.6, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return Plot(title, caption, Markup(svg[svg.index("<svg") :]))


def _write(folder: Path, **values: Any) -> Path:
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("fogzo.cli").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    path = folder / "report.html"
    write_text(path, template.render(values))
    return path
