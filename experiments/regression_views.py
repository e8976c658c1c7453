"""How the regression's results are shown: the table of docs/results.md and the curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from fogzo_lab.comparison.intervals import Interval, Summary
from fogzo_lab.comparison.metrics import Metric
from fogzo_lab.comparison.tables import where
from fogzo_lab.figures import drawing
from fogzo_lab.table import Table

RISK = Metric("risk", "excess risk")
LABELS = {
    "ste": "STE",
    "ste-projected": "STE, projected",
    "ste-drawn": "STE, drawn",
    "ste-drawn-projected": "STE, drawn, projected",
    "ste-drawn-adjacent": "STE, drawn, adjacent",
    "placebo": "placebo",
    "lambda": "lambda only",
    "fogzo": "FOGZO",
    "control-variate": "control variate",
}


def label(name: str, budget: str = "steps") -> str:
    """A row's name for people."""
    plain = name.removesuffix("-unmasked")
    text = LABELS[plain] + (", unmasked" if plain != name else "")
    return text + (" (same cost as FOGZO)" if budget == "cost" else "")


def table(results: dict[str, Any]) -> Table:
    """What every row reached, for docs/results.md."""
    settings = results["settings"]
    heading = ["gradient"]
    for found in settings:
        heading += [f"excess risk, range {found['omega']:g}", "FOGZO − row"]
    heading += ["cost of a run / of tuning, over STE's"]
    ste = settings[0]["rows"][0]
    rows = []
    for index, row in enumerate(settings[0]["rows"]):
        cells = [label(row["name"], row["budget"])]
        for found in settings:
            risk = found["rows"][index]["risk"]
            cells += [RISK.spread(Summary.of(risk["values"])), RISK.called(fogzo_minus(found, row))]
        costs = (row["cost"] / ste["cost"], row["tuning_cost"] / ste["tuning_cost"])
        rows.append([*cells, f"{costs[0]:.2f} / {costs[1]:.1f}"])
    config = results["config"]
    edges = [
        entry["learning_rate_at_edge"] or entry["strength_at_edge"]
        for found in settings
        for entry in found["rows"]
    ]
    floors = ", ".join(f"{found['floor']:.3f}" for found in settings)
    caption = (
        f"{config['weights']} weights of {config['bits']} bits, {config['steps']} SGD steps of "
        f"{config['batch_size']} inputs; mean ± standard deviation over {len(config['seeds'])} "
        f"seeds not used for tuning. The least risk of quantized weights is {floors}. Differences "
        "are paired by seed, with 95% intervals, bold where they exclude zero. Tuned to an edge of "
        f"a grid: {sum(edges)} of {len(edges)} rows. {where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


def theory_table(results: dict[str, Any]) -> Table:
    """What theory says of each row beside what it reached, for docs/dynamics.md."""
    settings = results["settings"]
    heading = ["gradient"]
    for found in settings:
        heading += [f"range {found['omega']:g}, theory", "measured"]
    rows = []
    for index, row in enumerate(settings[0]["rows"]):
        if row["theory"] is None:
            continue
        cells = [label(row["name"], row["budget"])]
        for found in settings:
            entry = found["rows"][index]
            risk = Summary.of(entry["risk"]["values"])
            cells += [f"{entry['theory']['risk']:.4f}", f"{risk.mean:.4f} ± {risk.sd:.4f}"]
        rows.append(cells)
    away = [
        abs(entry["theory"]["risk"] - entry["risk"]["mean"]) / entry["risk"]["sd"]
        for found in settings
        for entry in found["rows"]
        if entry["theory"] is not None and entry["risk"]["sd"] > 0
    ]
    caption = (
        f"Final excess risk; mean ± standard deviation over {len(results['config']['seeds'])} "
        f"seeds. {sum(distance <= 1 for distance in away)} of {len(away)} are within one standard "
        f"deviation of a seed, the furthest is {max(away):.1f} away. The control variate has no "
        "theory. "
        f"{where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


def fogzo_minus(found: dict[str, Any], row: dict[str, Any]) -> Interval | None:
    """FOGZO's risk minus the row's; None for FOGZO itself."""
    for entry in found["differences"]:
        named = (entry["row"], entry["other"], entry["other_budget"])
        if named == ("fogzo", row["name"], row["budget"]):
            return Interval(entry["mean"], entry["low"], entry["high"])
    return None


STYLES: Sequence[tuple[str, dict[str, Any]]] = (
    ("ste", {"color": "black", "linestyle": "-"}),
    ("placebo", {"color": "black", "linestyle": ":"}),
    ("fogzo", {"color": "black", "linestyle": "--"}),
    ("ste-unmasked", {"color": "0.5", "linestyle": "-"}),
    ("fogzo-unmasked", {"color": "0.5", "linestyle": "--", "marker": "o"}),
    ("control-variate-unmasked", {"color": "0.3", "linestyle": "-", "marker": "^"}),
    ("ste-drawn", {"color": "0.5", "linestyle": ":", "marker": "s"}),
    ("ste-drawn-adjacent", {"color": "0.3", "linestyle": ":", "marker": "D"}),
)


def plot(results: dict[str, Any], path: Path) -> None:
    """Excess risk against steps, a panel per range."""
    count = len(results["settings"])
    with drawing(path, (max(6, 4.1 * count), 3.6)) as figure:
        panels = figure.subplots(1, count, squeeze=False)[0]
        for axes, found in zip(panels, results["settings"], strict=True):
            draw_curves(axes, found)
        lines = panels[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=4, frameon=False, fontsize=7)


def draw_curves(axes: Axes, found: dict[str, Any]) -> None:
    """The rows of one range, each at what was chosen for it."""
    rows = {row["name"]: row for row in found["rows"] if row["budget"] == "steps"}
    named = "theory"
    for name, style in STYLES:
        if rows[name]["theory"] is not None:
            steps, _ = zip(*rows[name]["curve"], strict=True)
            theory = [max(risk, 1e-3) for risk in rows[name]["theory"]["curve"]]
            axes.plot(steps, theory, color="#f2c14e", linewidth=3.5, label=named, zorder=1)
            named = "_"
        steps, risks = zip(*rows[name]["curve"], strict=True)
        style = {"linewidth": 1.1, "markersize": 3, "markevery": 4} | style
        axes.plot(steps, [max(risk, 1e-3) for risk in risks], label=label(name), **style)
    for value in (found["floor"], found["ste_fixed_point"]):
        if value > 0:
            axes.axhline(value, color="0.7", linewidth=0.6, zorder=0)
    axes.set(yscale="log", xlabel="step", ylabel="excess risk", title=f"omega = {found['omega']:g}")
