"""The figures of reports, as inline SVG, and what each of them shows."""

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from fogzo_lab.comparison.intervals import student_interval
from fogzo_lab.comparison.metrics import Metric
from fogzo_lab.comparison.results import Comparison, RowResult
from fogzo_lab.figures import Draw, drawing
from fogzo_lab.training.run_folder import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# They differ in line style and marker as well as in colour, for print and colour-blind readers.
STYLES: dict[str, tuple[str, Any, str]] = {
    "float": ("#555555", (0, (1, 1)), "x"),
    "ptq": ("#555555", "dotted", "1"),
    "ste": ("#D55E00", "solid", "s"),
    "ste-unmasked": ("#E69F00", "dashed", "D"),
    "ste-stochastic": ("#A0522D", "dashdot", "d"),
    "ste-drawn": ("#CC6677", (0, (5, 2, 1, 2)), "H"),
    "ste-drawn-adjacent": ("#DDCC77", (0, (2, 1)), "P"),
    "placebo": ("#0072B2", "dashdot", "^"),
    "fogzo": ("#000000", "solid", "o"),
    "lambda": ("#CC79A7", "dotted", "v"),
    "control-variate": ("#009E73", "dashed", "*"),
    "spsa": ("#999999", "solid", "+"),
    "ste-then-fogzo": ("#000000", "dashed", "h"),
    "fogzo-uniform": ("#332288", (0, (5, 1)), "<"),
    "fogzo-triangular": ("#117733", (0, (3, 1, 1, 1)), ">"),
    "fogzo-normal": ("#88CCEE", (0, (1, 2)), "p"),
    "fogzo-logistic": ("#882255", (0, (5, 1, 1, 1, 1, 1)), "8"),
    "fogzo-rademacher": ("#44AA99", (0, (7, 2)), "X"),
    "ste-stable-qat": ("#E69F00", "solid", "P"),
    "ste-bbq": ("#56B4E9", "solid", "s"),
    "fogzo-bbq": ("#56B4E9", "dashed", "o"),
    "float-then-ste": ("#D55E00", "dotted", "<"),
    "float-then-fogzo": ("#000000", "dotted", ">"),
    "ste-cage": ("#117733", "solid", "^"),
    "ste-cage-published": ("#117733", "dotted", "^"),
    "ste-winq": ("#882255", "solid", "v"),
    "ste-winq-published": ("#882255", "dotted", "v"),
    "ste-dampening": ("#332288", "solid", "p"),
    "ste-dampening-published": ("#332288", "dotted", "p"),
    "ste-cewt": ("#44AA99", "dashdot", "X"),
    "parq": ("#999933", "dashed", "8"),
    "fogzo-one-sided": ("#332288", (0, (5, 1)), "<"),
    "fogzo-eighth": ("#117733", (0, (3, 1, 1, 1)), ">"),
    "fogzo-every-4": ("#882255", (0, (5, 1, 1, 1, 1, 1)), "8"),
    "fogzo-linear": ("#009E73", "solid", "h"),
}
"""By row: colour, line style and marker."""


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure of the report and what it shows."""

    title: str
    caption: str
    svg: Markup


def run_plots(metrics: Sequence[Metrics]) -> list[Plot]:
    """Of one run."""

    def loss(axes: "Axes") -> None:
        axes.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], color="black")
        axes.set(xlabel="step", ylabel="training loss (nats)")

    plots = [_plot("Loss", "Loss of each logged batch under the quantized weights.", loss)]
    measured = [m for m in metrics if m.get("agreement") is not None]
    if measured:

        def agreement(axes: "Axes") -> None:
            steps = [m["step"] for m in measured]
            axes.plot(steps, smooth([m["agreement"] for m in measured]), color="black")
            _mark_one(axes)

        plots.append(_plot("Agreement", _AGREEMENT, agreement))
    return plots + _code_plots(metrics)


def comparison_plots(comparison: Comparison) -> list[Plot]:
    """Of a comparison."""
    rows = [row for row in comparison.rows if row.budget == "steps"]
    main = comparison.main_metric
    timed = in_seconds(comparison)
    plots = [
        _plot(
            f"Final {main.name}",
            "Every seed is a mark; the bar is their mean and its ends Student's 95% interval of "
            "it. Rows are compared by their differences, in the table, and not by overlaps here.",
            lambda axes: _finals(axes, comparison.rows, main),
            height=0.6 + 0.3 * len(comparison.rows),
        ),
        _plot(
            "Training loss against steps",
            "Mean over seeds at each row's own best learning rate; batches are the same.",
            lambda axes: curves(axes, rows, "step", "loss", "step", "training loss (nats)"),
        ),
        _plot(
            "Training loss against time",
            "Seconds of training alone, by interleaved timing of steps"
            + ("; each row for the same seconds." if len(rows) < len(comparison.rows) else "."),
            lambda axes: curves(axes, timed, "seconds", "loss", "seconds", "training loss (nats)"),
        ),
        _plot(
            "Final loss against learning rate",
            "Validation loss, from which each row's learning rate is chosen; a ring marks the "
            "chosen one, a mark at the upper edge a rate at which a seed diverged. Flat is robust.",
            lambda axes: _learning_rates(axes, rows),
        ),
    ]
    if any("agreement" in point for row in rows for point in row.curve):
        plots.append(_plot("Agreement over training", _AGREEMENT, lambda a: _agreements(a, rows)))
    if any("flip_rate" in point for row in rows for point in row.curve):
        plots.append(_plot("Code flips over training", _FLIPS, lambda axes: _flips(axes, rows)))
    return plots + [
        _share_plot(key, rows)
        for key in ("flips", "masked", "bits_used")
        if any(key in point for row in rows for point in row.curve)
    ]


_SHARES = {
    "flips": "flips per step",
    "flips_back": "flips that undo the last one",
    "masked": "masked weights",
    "frozen": "frozen weights",
    "dead": "dead channels",
    "bits_used": "bits used",
}
"""What inspections add to the metrics: shares, by their key."""
_MEANINGS = {
    "flips": "Flips are changes of integer weights.",
    "masked": "Masked weights get no gradient.",
    "frozen": "Frozen ones do not move either.",
    "bits_used": "Bits used is the entropy of the codes over the bits of the grid.",
}
_INSPECTED = "From inspections (--inspect-every), of which `fogzo doctor` has the numbers by layer."
_FLIPS = (
    "Share of the integer weights that differ between the two points at which FOGZO measures the "
    "loss. At 0 the two losses would be equal and nothing would be measured."
)
_AGREEMENT = (
    "The measured slope of the quantized loss along the STE gradient, divided by the slope STE "
    "predicts: 1 where STE is right, below 1 where it promises too much, negative where it climbs. "
    "A running mean of nine logged steps."
)


def _share_plot(key: str, rows: Sequence[RowResult]) -> Plot:
    title = _SHARES[key]
    return _plot(
        f"{title.capitalize()} over training",
        f"{_MEANINGS[key]} Mean over weights and seeds. {_INSPECTED}",
        lambda axes: curves(axes, rows, "step", key, "step", title),
    )


def _code_plots(metrics: Sequence[Metrics]) -> list[Plot]:
    """What inspections saw of the codes over training; none where there were none."""
    inspected = [m for m in metrics if m.get("masked") is not None]
    if not inspected:
        return []

    def draw(axes: "Axes", keys: Sequence[str]) -> None:
        for key, dashes in zip(keys, ("solid", "dashed", "dotted", "dashdot"), strict=False):
            points = [m for m in inspected if m.get(key) is not None]
            steps, values = [m["step"] for m in points], [m[key] for m in points]
            axes.plot(steps, values, color="black", linestyle=dashes, label=_SHARES[key])
        axes.set(xlabel="step", ylabel="share")
        _legend(axes)

    def caption(keys: Sequence[str]) -> str:
        return " ".join([*(_MEANINGS[key] for key in keys if key in _MEANINGS), _INSPECTED])

    flips, others = ("flips",), ("masked", "frozen", "dead", "bits_used")
    return [
        _plot("Flips of codes per step", caption(flips), lambda axes: draw(axes, flips)),
        _plot("Masked, frozen, dead, used", caption(others), lambda axes: draw(axes, others)),
    ]


def curves(
    axes: "Axes", rows: Sequence[RowResult], x: str, y: str, xlabel: str, ylabel: str
) -> None:
    """One line per row, of two of the numbers that its curve holds."""
    for number, row in enumerate(rows):
        points = [p for p in row.curve if p.get(y) is not None]
        if points:
            every = max(1, len(points) // 6)
            # Not all at the same steps, where marks would hide each other.
            where = (number * every // len(rows), every)
            _line(axes, row, [p[x] for p in points], [p[y] for p in points], markevery=where)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _legend(axes)


def _line(
    axes: "Axes", row: RowResult, x: Sequence[float], y: Sequence[float], **style: Any
) -> None:
    colour, dashes, marker = STYLES[row.name]
    axes.plot(
        x,
        y,
        color=colour,
        linestyle=dashes,
        marker=marker,
        markersize=4,
        linewidth=1.2,
        label=row.label,
        **style,
    )


def _legend(axes: "Axes") -> None:
    """Below the axes, so that it covers no line however many rows there are."""
    if not axes.get_legend_handles_labels()[0]:  # PTQ alone has no curve
        return
    axes.legend(
        fontsize=7,
        frameon=False,
        ncols=2,
        loc="upper left",
        bbox_to_anchor=(0, -0.18),
        handlelength=4,
    )


def _finals(axes: "Axes", rows: Sequence[RowResult], metric: Metric) -> None:
    titles: list[str] = []
    for row in reversed(rows):
        summary = row.summary(metric.key)
        if summary is None or not math.isfinite(summary.mean):
            continue
        colour, _, marker = STYLES[row.name]
        values = [metric.factor * seed[metric.key] for seed in row.seeds]
        low, high = student_interval(values)
        centre, position = metric.factor * summary.mean, len(titles)
        axes.plot(values, [position] * len(values), marker, color=colour, markersize=4, alpha=0.6)
        width = 0.0 if math.isnan(low) else (high - low) / 2
        axes.errorbar(centre, position, xerr=width, fmt="|", color=colour, markersize=14, capsize=3)
        titles.append(row.title)
    axes.set_yticks(range(len(titles)), titles)
    axes.set(xlabel=metric.heading)


def _learning_rates(axes: "Axes", rows: Sequence[RowResult]) -> None:
    for row in rows:
        losses = row.loss_by_rate
        found = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        _line(axes, row, list(found), list(found.values()))
        if row.learning_rate in found:
            best = (row.learning_rate, found[row.learning_rate])
            axes.plot(*best, "o", color="black", markersize=9, fillstyle="none")
        colour, _, marker = STYLES[row.name]
        for rate in losses.keys() - found.keys():
            axes.plot(
                rate,
                0.99,
                marker,
                color=colour,
                markersize=6,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
    axes.set(xlabel="learning rate", ylabel="validation loss (nats)", xscale="log")
    _legend(axes)


def _flips(axes: "Axes", rows: Sequence[RowResult]) -> None:
    curves(axes, rows, "step", "flip_rate", "step", "share of codes that flip")


def _agreements(axes: "Axes", rows: Sequence[RowResult]) -> None:
    averaged = []
    for row in rows:
        points = [p for p in row.curve if p.get("agreement") is not None]
        values = smooth([p["agreement"] for p in points])
        curve = [{"step": p["step"], "agreement": v} for p, v in zip(points, values, strict=True)]
        averaged.append(dataclasses.replace(row, curve=curve))
    curves(axes, averaged, "step", "agreement", "step", "agreement")
    _mark_one(axes)


def smooth(values: Sequence[float], reach: int = 4) -> list[float]:
    """A running mean: one step's number has the noise of its batch and of a few flipped weights."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _mark_one(axes: "Axes") -> None:
    axes.axhline(1.0, color="#888888", linewidth=0.6)
    axes.set(xlabel="step", ylabel="agreement")


def in_seconds(comparison: Comparison) -> list[RowResult]:
    """Each name once, at equal time where it was run so, its curve over the seconds it takes."""
    found = []
    for row in {row.name: row for row in comparison.rows}.values():
        seconds = comparison.seconds(row)
        if seconds is None or not row.curve:
            continue
        # Of the run's own clock only the shape is kept, as other runs shared its machine.
        last = row.curve[-1]  # before the run's end where a seed diverged
        pace = seconds * last["step"] / row.steps / last["seconds"]
        curve = [{**point, "seconds": pace * point["seconds"]} for point in row.curve]
        found.append(dataclasses.replace(row, curve=curve))
    return found


def _plot(title: str, caption: str, draw: Draw, height: float = 3.2) -> Plot:
    text = io.StringIO()
    with drawing(text, (4.8, height), font_size=9) as figure:
        draw(figure.subplots())
    svg = text.getvalue()
    # One picture of that name to a screen reader, which would read out every tick of an axis.
    named = Markup('<svg role="img" aria-label="{}"').format(title)
    return Plot(title, caption, named + Markup(svg[svg.index("<svg") + 4 :]))
