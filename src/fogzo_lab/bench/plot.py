"""The plot of a benchmark: a panel per section, in markers, for print without colour."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fogzo_lab.figures import Draw, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CaseResults = Mapping[str, Any]
"""A case as results.json holds it."""

_MARKS = ("o", "s", "^", "x", "D", "v", "P", "*")
_DASHES = ("solid", "dashed", "dotted", "dashdot")
# Inches: the width, a row of dots, each further series in it, what a panel needs besides.
_WIDTH, _ROW, _SERIES, _FRAME, _LINES = 9.5, 0.2, 0.1, 0.9, 2.6

Dots = dict[str, dict[str, tuple[float, float, float]]]
"""By row and by what a marker stands for: median and quartiles."""


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw the sections that have numbers into an SVG file.

    Args:
        results: What results.json holds.
        path: Where to write.
    """
    panels: list[tuple[float, Draw]] = []
    for name, section in results["sections"].items():
        cases = [case for case in section["cases"] if case["skipped"] is None]
        if cases:
            panels.append(_PANELS[name](cases))
    heights = [height for height, _ in panels] or [_FRAME]
    with drawing(path, (_WIDTH, sum(heights))) as figure:
        grid = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)
        if not panels:
            grid[0, 0].set(title="nothing could be measured here")
        for axes, (_, draw) in zip(grid[:, 0], panels, strict=False):
            draw(axes)


def _steps(cases: list[CaseResults]) -> tuple[float, Draw]:
    rows: Dots = {}
    for case in cases:
        target = case["facts"]["target"]
        rows[f"{case['name']} ({case['facts']['quantized_weights']:,} weights)"] = {
            "measured": _spread(case["ratios"]["overhead"]),
            "target": (target, target, target),
        }
    return _dots(
        rows,
        "steps",
        "(FOGZO step - STE step) / two forward passes without gradients, and quartiles",
    )


def _memory(cases: list[CaseResults]) -> tuple[float, Draw]:
    rows: Dots = {}
    kinds = {"default": "default", "lean": "lean"}
    for case in cases:
        copies = {kinds[kind]: case["facts"][f"{kind}_copies"] for kind in kinds}
        rows[case["name"]] = {kind: (value,) * 3 for kind, value in copies.items()}
    return _dots(rows, "memory", "peak above the STE step's, in copies of the quantized weights")


def _layers(cases: list[CaseResults]) -> tuple[float, Draw]:
    return _dots(
        _over_base(cases, lambda facts: (facts["comparison"], facts["alternative"])),
        "layers",
        "forward and backward over those of the float layer, and quartiles",
        spread_out=True,
    )


def _compiled(cases: list[CaseResults]) -> tuple[float, Draw]:
    rows: Dots = {
        case["name"]: {
            kind: _spread(case["ratios"][f"{kind}, compiled / eager"])
            for kind in ("STE step", "FOGZO step")
        }
        for case in cases
    }
    return _dots(rows, "compiled", "time of a compiled step over an eager one's, and quartiles")


def _probes(cases: list[CaseResults]) -> tuple[float, Draw]:
    def place(facts: Mapping[str, Any]) -> tuple[str, str]:
        return f"{facts['comparison']}: {facts['alternative']}", facts["base"]

    return _dots(
        _over_base(cases, place), "probes", "time over what the marker names, and quartiles"
    )


def _scaling(cases: list[CaseResults]) -> tuple[float, Draw]:
    sweeps: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        if "FOGZO / STE" in case["ratios"]:
            facts, ratio = case["facts"], case["ratios"]["FOGZO / STE"]
            sweeps.setdefault(facts["sweep"], []).append((facts["value"], ratio["median"]))

    def draw(axes: "Axes") -> None:
        for number, (name, points) in enumerate(sweeps.items()):
            first = points[0][0]
            axes.plot(
                [value / first for value, _ in points],
                [ratio for _, ratio in points],
                color="black",
                linestyle=_DASHES[number % len(_DASHES)],
                marker=_MARKS[number % len(_MARKS)],
                fillstyle="none",
                label=f"{name} from {first:g}",
            )
        axes.set(title="scaling", ylabel="FOGZO step / STE step")
        axes.set(xlabel="what is varied, over where it begins")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        _legend(axes)

    return _LINES, draw


def _export(cases: list[CaseResults]) -> tuple[float, Draw]:
    rows: Dots = {
        case["name"]: {
            kind: _spread(case["ratios"][f"{kind}, speed over float"])
            for kind in ("prompt", "token")
        }
        for case in cases
    }
    return _dots(rows, "export", "speed over the float network's, and quartiles", spread_out=True)


_PANELS = {
    "steps": _steps,
    "memory": _memory,
    "layers": _layers,
    "compiled": _compiled,
    "probes": _probes,
    "scaling": _scaling,
    "export": _export,
}


def _over_base(
    cases: Iterable[CaseResults], place: Callable[[Mapping[str, Any]], tuple[str, str]]
) -> Dots:
    """Rows of what is not its comparison's base, which would be 1."""
    rows: Dots = {}
    for case in cases:
        if case["facts"]["alternative"] != case["facts"]["base"]:
            row, series = place(case["facts"])
            rows.setdefault(row, {})[series] = _spread(case["ratios"]["over base"])
    return rows


def _dots(rows: Dots, title: str, xlabel: str, spread_out: bool = False) -> tuple[float, Draw]:
    """The height of a panel with one line a row, and what draws it.

    Args:
        rows: What is drawn.
        title: Of the panel.
        xlabel: What the numbers are.
        spread_out: Whether the series of a row lie below each other, as they would overlap, on a
            logarithmic axis.
    """
    names = dict.fromkeys(name for marks in rows.values() for name in marks)
    row = _ROW + _SERIES * (len(names) - 1) if spread_out else _ROW

    def draw(axes: "Axes") -> None:
        for number, (mark, name) in enumerate(zip(_MARKS, names, strict=False)):
            shift = _SERIES / row * (number - (len(names) - 1) / 2) if spread_out else 0.0
            places = [shift + place for place, marks in enumerate(rows.values()) if name in marks]
            spreads = [marks[name] for marks in rows.values() if name in marks]
            axes.errorbar(
                [median for median, _, _ in spreads],
                places,
                xerr=[[m - low for m, low, _ in spreads], [high - m for m, _, high in spreads]],
                color="black",
                marker=mark,
                markersize=4,
                fillstyle="none",
                linestyle="",
                linewidth=0.8,
                label=name,
            )
        axes.axvline(1, color="0.7", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
        if spread_out:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set(title=title, xlabel=xlabel, ylim=(max(1, len(rows)) - 0.5, -0.5))
        _legend(axes)

    return _FRAME + row * len(rows), draw


def _spread(ratio: Mapping[str, float]) -> tuple[float, float, float]:
    return ratio["median"], ratio["low"], ratio["high"]


def _legend(axes: "Axes") -> None:
    """Beside the axes, where it covers nothing."""
    if not axes.get_legend_handles_labels()[0]:
        return
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), handlelength=3)
