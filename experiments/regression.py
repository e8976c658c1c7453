"""Linear regression with 2-bit weights: a fast testbed for the dynamics of STE and its rivals.

    python experiments/regression.py [--quick] [--output-dir FOLDER]

The setting of Ichikawa, Kashiwamura and Sakata (arXiv 2510.10693), with small batches: a teacher
whose weights are all 1, fresh Gaussian inputs at every step, latent weights that start as standard
Gaussians, and quantized levels spread evenly over [-omega, omega]. Inputs have covariance I/d, so
the excess risk of a student is known exactly, mean((Q(w) - w*)^2).

Every row's learning rate, and its kappa or weight where it has one, is chosen by that risk on
seeds of their own; what is reported comes from other, fresh seeds. Costs are counted as forwards,
a backward as two. Writes results.json and curves.svg.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import fogzo
from fogzo_lab.comparison.intervals import student_interval
from fogzo_lab.system.environment import environment

FOLDER = Path(__file__).parent / "regression"
TEACHER = 1.0
AGREEMENT: Literal["shrunk", "measured"] = "measured"
"""The paper's estimator to the letter; `agreement.py` tries other rules."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained.

    Attributes:
        omegas: Ends of the range of levels. With 2 bits, at 1 the teacher is a level itself, at 2
            it lies between two, nearer to the lower one.
        weights: d.
        batch_size: Fresh inputs a step.
        steps: Of a run; rows without probes also get as many as FOGZO's cost buys.
        label_noise: Standard deviation of the noise in the targets.
        bits: Of a weight.
        learning_rates: A grid an omega, for all rows; of plain SGD, constant, in units of d.
        kappas: Grid of FOGZO and the placebo; reached linearly, as in the paper.
        weight_factors: Grid of the control variate, times its default weight.
        tuning_seeds: Of runs that choose.
        seeds: Of runs that are reported.
        logged: Points of a curve, apart from the start.
    """

    omegas: tuple[float, ...] = (1.0, 2.0)
    weights: int = 1000
    batch_size: int = 32
    steps: int = 750
    label_noise: float = 0.1
    bits: int = 2
    learning_rates: tuple[tuple[float, ...], ...] = (
        (0.002, 0.004, 0.008, 0.016, 0.032),
        (0.0005, 0.001, 0.002, 0.004, 0.008),
    )
    kappas: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0)
    weight_factors: tuple[float, ...] = (1.0, 8.0, 64.0)
    tuning_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = tuple(range(8))
    logged: int = 25


QUICK = Config(
    omegas=(2.0,),
    weights=50,
    batch_size=8,
    steps=20,
    learning_rates=((0.004, 0.016),),
    kappas=(1.0,),
    weight_factors=(1.0,),
    tuning_seeds=(100,),
    seeds=(0, 1, 2),
    logged=5,
)


class Row(NamedTuple):
    """A row of the comparison."""

    estimator: str
    unmasked: bool
    budget: str = "steps"

    @property
    def name(self) -> str:
        """What the results call it."""
        return self.estimator + ("-unmasked" if self.unmasked else "")


STEPS = [
    Row(estimator, unmasked)
    for unmasked in (False, True)
    for estimator in ("ste", "placebo", "lambda", "fogzo", "control-variate")
]
COST = [
    Row(estimator, unmasked, "cost")
    for unmasked in (False, True)
    for estimator in ("ste", "placebo")
]
LABELS = {
    "ste": "STE",
    "placebo": "placebo",
    "lambda": "lambda only",
    "fogzo": "FOGZO",
    "control-variate": "control variate",
}
STE_COST = 3
"""Forwards that a step costs without probes, a backward counted as two."""


class Choice(NamedTuple):
    """What is tuned: the learning rate, and kappa or the weight's factor (else None)."""

    learning_rate: float
    strength: float | None


class Data(NamedTuple):
    """All batches of a run, and where its weights start."""

    start: Tensor
    inputs: Tensor
    targets: Tensor


def main() -> None:
    """Train everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and short runs")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = QUICK if arguments.quick else Config()

    results = {
        "environment": environment(),
        "config": asdict(config),
        "settings": [
            setting(omega, rates, config)
            for omega, rates in zip(config.omegas, config.learning_rates, strict=True)
        ],
    }
    results["findings"] = [line for found in results["settings"] for line in findings(found)]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (arguments.output_dir / "results.json").write_text(text, encoding="utf-8")
    plot(results, arguments.output_dir / "curves.svg")


def setting(omega: float, rates: tuple[float, ...], config: Config) -> dict[str, Any]:
    """All rows at one range: tuned, then run on fresh seeds."""
    grids = {row: grid(row, rates, config) for row in STEPS}
    tuned = tune(omega, grids, config)
    # Longer runs keep the strength that was chosen and look for a learning rate again.
    strengths = {row: best(tuned[row._replace(budget="steps")]).strength for row in COST}
    longer = {
        row: [choice for choice in grid(row, rates, config) if choice.strength == strengths[row]]
        for row in COST
    }
    tuned |= tune(omega, longer, config)
    chosen = {row: best(risks) for row, risks in tuned.items()}

    outcomes: dict[Row, list[dict[str, Any]]] = {row: [] for row in chosen}
    for seed in config.seeds:
        data = draw(seed, config)
        for row, choice in chosen.items():
            outcomes[row].append(run(row, choice, omega, seed, data, config))
    half = 2 ** (config.bits - 1)
    rows = [summarise(row, tuned[row], outcomes[row], config) for row in chosen]
    levels = [step_size(omega, config) * (code + 0.5) for code in range(-half, half)]
    below = max(level for level in levels if level <= TEACHER)
    above = min(level for level in levels if level >= TEACHER)
    return {
        "omega": omega,
        # The least excess risk of quantized weights.
        "floor": min((level - TEACHER) ** 2 for level in levels),
        # Where the levels around the teacher average to it, STE's gradient is zero.
        "ste_fixed_point": (TEACHER - below) * (above - TEACHER),
        "rows": rows,
        "differences": [
            difference(row, other)
            for row in rows
            if row["name"] in ("fogzo", "fogzo-unmasked", "control-variate-unmasked")
            for other in rows
            if other is not row
        ],
    }


def grid(row: Row, rates: tuple[float, ...], config: Config) -> list[Choice]:
    """What a row may choose from."""
    strengths: tuple[float | None, ...] = {
        "placebo": config.kappas,
        "fogzo": config.kappas,
        "control-variate": config.weight_factors,
    }.get(row.estimator, (None,))
    return [Choice(*pair) for pair in product(rates, strengths)]


def tune(
    omega: float, grids: dict[Row, list[Choice]], config: Config
) -> dict[Row, dict[Choice, float]]:
    """The mean final risk of every choice over the tuning seeds."""
    risks: dict[Row, dict[Choice, list[float]]] = {
        row: {choice: [] for choice in choices} for row, choices in grids.items()
    }
    for seed in config.tuning_seeds:
        data = draw(seed, config)
        for row, choices in grids.items():
            for choice in choices:
                risks[row][choice].append(run(row, choice, omega, seed, data, config)["risk"])
    return {
        row: {choice: statistics.mean(values) for choice, values in found.items()}
        for row, found in risks.items()
    }


def best(risks: dict[Choice, float]) -> Choice:
    """The choice of least risk."""
    return min(risks, key=lambda choice: risks[choice])


def draw(seed: int, config: Config) -> Data:
    """Start and batches of one seed, the same for every row."""
    d, batch = config.weights, config.batch_size
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(1, d, generator=generator)
    steps = max(num_steps(row, config) for row in (*STEPS, *COST))
    inputs = torch.randn(steps, batch, d, generator=generator).mul_(d**-0.5)
    noise = torch.randn(steps, batch, 1, generator=generator)
    targets = TEACHER * inputs.sum(2, keepdim=True) + config.label_noise * noise
    return Data(start, inputs, targets)


def num_steps(row: Row, config: Config) -> int:
    """The usual steps, or those that cost as much as FOGZO's."""
    if row.budget == "steps":
        return config.steps
    return config.steps * (STE_COST + 2) // STE_COST


def step_size(omega: float, config: Config) -> float:
    """Between levels spread evenly over [-omega, omega]."""
    return 2 * omega / (2**config.bits - 1)


def run(
    row: Row, choice: Choice, omega: float, seed: int, data: Data, config: Config
) -> dict[str, Any]:
    """Train once; the excess risk at the end and on the way."""
    steps = num_steps(row, config)
    layer = nn.Linear(config.weights, 1, bias=False)
    layer.weight.data.copy_(data.start)
    surrogate = "identity_unmasked" if row.unmasked else "identity"
    step = step_size(omega, config)
    quantizer = fogzo.fixed(config.bits, step=step, levels="half", surrogate=surrogate)
    fogzo.quantize_(layer, quantizer, filter_fn=lambda module, name: True)
    estimator = make_estimator(row, choice.strength, layer, seed, steps)
    # The Hessian of the risk is I / d: in units of d the rate no longer depends on d.
    optimizer = torch.optim.SGD(layer.parameters(), lr=choice.learning_rate * config.weights)

    def excess_risk() -> float:
        with torch.no_grad():
            return float((layer.quantized_weight() - TEACHER).square().mean())

    curve = [(0, excess_risk())]
    forwards = 0

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        nonlocal forwards
        forwards += 1
        return 0.5 * (layer(x) - y).square().mean()

    for done, (x, y) in enumerate(zip(data.inputs[:steps], data.targets[:steps], strict=True)):
        optimizer.zero_grad()
        loss_of(x, y).backward()
        if estimator is not None:
            with warnings.catch_warnings():  # of so few weights now and then none flips
                warnings.simplefilter("ignore", RuntimeWarning)
                estimator.refine_grads_(partial(loss_of, x, y))
        optimizer.step()
        if (done + 1) * config.logged // steps > done * config.logged // steps:
            curve.append((done + 1, excess_risk()))
    outside = (layer.weight.detach().abs() > omega).double().mean()
    return {
        "risk": curve[-1][1],
        "curve": curve,
        "outside": float(outside),
        "forwards": forwards,
        "cost": forwards + 2 * steps,
    }


def make_estimator(
    row: Row, strength: float | None, layer: nn.Module, seed: int, steps: int
) -> Any:
    """The row's estimator, or None for STE."""
    weights = fogzo.quantized_weights(layer)
    if row.estimator == "ste":
        return None
    if row.estimator == "lambda":
        return fogzo.FogzoEstimator(weights, noise_share=0.0, seed=seed, agreement=AGREEMENT)
    if row.estimator == "control-variate":
        own = fogzo.ControlVariateEstimator(weights).default_noise_share()
        return fogzo.ControlVariateEstimator(weights, weight=strength * own, seed=seed)
    share = fogzo.linear_noise_share(total_steps=steps, kappa=strength)
    if row.estimator == "placebo":
        return fogzo.PlaceboEstimator(weights, noise_share=share, seed=seed)
    return fogzo.FogzoEstimator(weights, noise_share=share, seed=seed, agreement=AGREEMENT)


def summarise(
    row: Row, tuned: dict[Choice, float], outcomes: list[dict[str, Any]], config: Config
) -> dict[str, Any]:
    """One row: what was chosen, what it reached, and what both cost."""
    choice = best(tuned)
    risks = [outcome["risk"] for outcome in outcomes]
    runs = len(tuned) * len(config.tuning_seeds)
    rates, strengths = ({c[i] for c in tuned} for i in (0, 1))
    return {
        "name": row.name,
        "budget": row.budget,
        "learning_rate": choice.learning_rate,
        "learning_rate_at_edge": len(rates) > 1
        and choice.learning_rate in (min(rates), max(rates)),
        "strength": choice.strength,
        "strength_at_edge": len(strengths) > 1
        and choice.strength in (min(strengths), max(strengths)),
        "tuning_risks": [[*c, risk] for c, risk in tuned.items()],
        "risk": {
            "mean": statistics.mean(risks),
            "sd": statistics.stdev(risks),
            "values": risks,
        },
        "outside_range": statistics.mean(outcome["outside"] for outcome in outcomes),
        "steps": num_steps(row, config),
        "forwards": outcomes[0]["forwards"],
        "cost": outcomes[0]["cost"],
        "tuning_cost": runs * outcomes[0]["cost"],
        "curve": [
            [points[0][0], statistics.mean(risk for _, risk in points)]
            for points in zip(*(outcome["curve"] for outcome in outcomes), strict=True)
        ],
    }


def difference(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Row minus other, paired by seed, with a 95% Student interval; lower risk is better."""
    gaps = [a - b for a, b in zip(row["risk"]["values"], other["risk"]["values"], strict=True)]
    low, high = student_interval(gaps)
    return {
        "row": row["name"],
        "other": other["name"],
        "other_budget": other["budget"],
        "mean": statistics.mean(gaps),
        "low": low,
        "high": high,
        "better": row["name"] if high < 0 else other["name"] if low > 0 else None,
    }


def label(name: str, budget: str = "steps") -> str:
    """A row's name for people."""
    plain = name.removesuffix("-unmasked")
    text = LABELS[plain] + (", unmasked" if plain != name else "")
    return text + (" at equal cost" if budget == "cost" else "")


def findings(found: dict[str, Any]) -> list[str]:
    """What the intervals allow one to say at one range, wins, ties and losses alike."""
    where = f"omega {found['omega']:g}"
    lines = []
    for row in dict.fromkeys(entry["row"] for entry in found["differences"]):
        own = [entry for entry in found["differences"] if entry["row"] == row]
        for verdict, keep in (
            ("lower than", lambda e: e["better"] == e["row"]),
            ("higher than", lambda e: e["better"] == e["other"]),
            ("not told apart from", lambda e: e["better"] is None),
        ):
            names = [label(e["other"], e["other_budget"]) for e in own if keep(e)]
            if names:
                lines.append(f"{where}: the risk of {label(row)} is {verdict} {'; '.join(names)}.")
    lowest = min(found["rows"], key=lambda entry: entry["risk"]["mean"])
    lines.append(
        f"{where}: the lowest mean risk, {lowest['risk']['mean']:.4f} over a floor of "
        f"{found['floor']:.4f}, is that of {label(lowest['name'], lowest['budget'])}."
    )
    means = {(row["name"], row["budget"]): row["risk"]["mean"] for row in found["rows"]}
    overrun = [label(*key) for key in means if means[key] > means[key[0], "steps"]]
    if overrun:
        lines.append(
            f"{where}: more steps made it worse, so that stopping earlier is the fairer rival: "
            f"{'; '.join(overrun)}."
        )
    for what in ("learning_rate", "strength"):
        edges = [
            label(row["name"], row["budget"]) for row in found["rows"] if row[f"{what}_at_edge"]
        ]
        if edges:
            kind = {"learning_rate": "learning rate", "strength": "kappa or weight"}[what]
            lines.append(
                f"{where}: the best {kind} lies at an edge of the grid: {'; '.join(edges)}."
            )
    cost = {row["name"]: row["tuning_cost"] for row in found["rows"] if row["budget"] == "steps"}
    lines.append(
        f"{where}: tuning FOGZO cost {cost['fogzo'] / cost['ste']:.1f} times what tuning STE did."
    )
    return lines


def table(results: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]], str]:
    """Heading, rows and a note for docs/results.md."""
    ranges = [f"range {found['omega']:g}" for found in results["settings"]]
    heading = ("row", *(f"excess risk, {name}" for name in ranges))
    heading += tuple(f"FOGZO minus row, {name}" for name in ranges)
    heading += ("cost of a run / STE's", "cost of tuning / STE's")
    rows = []
    settings = results["settings"]
    for index, row in enumerate(settings[0]["rows"]):
        same = [found["rows"][index] for found in settings]
        ste = settings[0]["rows"][0]
        rows.append(
            [
                label(row["name"], row["budget"]),
                *(f"{entry['risk']['mean']:.3f} ± {entry['risk']['sd']:.3f}" for entry in same),
                *(gap_text(found, row) for found in settings),
                f"{row['cost'] / ste['cost']:.2f}",
                f"{row['tuning_cost'] / ste['tuning_cost']:.1f}",
            ]
        )
    config, facts = results["config"], results["environment"]
    floors = ", ".join(f"{found['floor']:.3f}" for found in settings)
    note = (
        f"{config['weights']} weights of {config['bits']} bits, {config['steps']} SGD steps of "
        f"{config['batch_size']} fresh inputs. Mean ± standard deviation over "
        f"{len(config['seeds'])} seeds, other ones than those that chose learning rate and kappa; "
        f"the least risk of quantized weights is {floors}. Differences are paired by seed, with "
        f"95% intervals, not corrected for their number. Costs count forwards, a backward as two. "
        f"{facts['processor']}, torch {facts['torch']}, {facts['date']}."
    )
    return heading, rows, note


def gap_text(found: dict[str, Any], row: dict[str, Any]) -> str:
    """FOGZO's risk minus the row's, if it is another row."""
    for entry in found["differences"]:
        if (entry["row"], entry["other"], entry["other_budget"]) == (
            "fogzo",
            row["name"],
            row["budget"],
        ):
            return f"{entry['mean']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}]"
    return ""


STYLES: Sequence[tuple[str, dict[str, Any]]] = (
    ("ste", {"color": "black", "linestyle": "-"}),
    ("placebo", {"color": "black", "linestyle": ":"}),
    ("fogzo", {"color": "black", "linestyle": "--"}),
    ("ste-unmasked", {"color": "0.6", "linestyle": "-", "linewidth": 2.2}),
    ("lambda-unmasked", {"color": "0.45", "linestyle": ":", "marker": "s"}),
    ("fogzo-unmasked", {"color": "0.45", "linestyle": "--", "marker": "o"}),
    ("control-variate-unmasked", {"color": "0.3", "linestyle": "-", "marker": "^"}),
)


def plot(results: dict[str, Any], path: Path) -> None:
    """Excess risk over steps, a panel a range."""
    count = len(results["settings"])
    # Text stays text, and the same numbers give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fogzo", "font.size": 8}):
        figure = Figure(figsize=(max(6, 4.1 * count), 3.6), layout="constrained")
        panels = figure.subplots(1, count, squeeze=False)[0]
        for axes, found in zip(panels, results["settings"], strict=True):
            draw_curves(axes, found)
        lines = panels[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_curves(axes: Axes, found: dict[str, Any]) -> None:
    """The rows of one range, each at what was chosen for it."""
    rows = {row["name"]: row for row in found["rows"] if row["budget"] == "steps"}
    for name, style in STYLES:
        steps, risks = zip(*rows[name]["curve"], strict=True)
        style = {"linewidth": 1.1, "markersize": 3, "markevery": 4} | style
        axes.plot(steps, [max(risk, 1e-3) for risk in risks], label=label(name), **style)
    for value in (found["floor"], found["ste_fixed_point"]):
        if value > 0:
            axes.axhline(value, color="0.7", linewidth=0.6, zorder=0)
    axes.set(yscale="log", xlabel="step", ylabel="excess risk", title=f"omega = {found['omega']:g}")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
