"""Linear regression with 2-bit weights: a fast testbed for the dynamics of STE and its rivals.

    python experiments/regression.py [--quick] [--output-dir FOLDER]

The setting of Ichikawa, Kashiwamura and Sakata (arXiv 2510.10693), with small batches: a teacher
whose weights are all 1, fresh Gaussian inputs at every step, latent weights that start as standard
Gaussians, and quantized levels spread evenly over [-omega, omega]. Inputs have covariance I/d, so
the excess risk of a student is known exactly, mean((Q(w) - w*)^2).

Every row's learning rate, and its kappa or weight where it has one, is chosen by that risk on
seeds of their own; what is reported comes from other, fresh seeds. Costs are counted in forward
passes, a backward pass as two. Writes results.json and curves.svg.
"""

import argparse
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

import fogzo
from fogzo_lab.comparison.intervals import Interval, Summary
from fogzo_lab.comparison.metrics import Metric
from fogzo_lab.comparison.tables import where
from fogzo_lab.figures import drawing
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table

FOLDER = Path(__file__).parent / "regression"
RISK = Metric("risk", "excess risk")
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
        batch_size: Fresh inputs per step.
        steps: Of a run; rows without probes also get as many as FOGZO's cost buys.
        label_noise: Standard deviation of the noise in the targets.
        bits: Of a weight.
        learning_rates: One grid per omega, for all rows; of plain SGD, constant, in units of d.
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
"""Forward passes that a step costs without probes, a backward pass counted as two."""


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
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output_dir / "results.json", dumps(results, indent=1) + "\n")
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
    quantizer = fogzo.fixed(config.bits, step_size=step, levels="half", surrogate=surrogate)
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
        "risk": {**vars(Summary.of(risks)), "values": risks},
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
    """Row minus other, paired by seed, and which of the two has the significantly lower risk."""
    gap = Interval.paired(row["risk"]["values"], other["risk"]["values"])
    names = {"better": row["name"], "worse": other["name"]}
    return {
        "row": row["name"],
        "other": other["name"],
        "other_budget": other["budget"],
        **vars(gap),
        "better": names.get(gap.verdict(RISK.more_is_better)),
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
    ("ste-unmasked", {"color": "0.6", "linestyle": "-", "linewidth": 2.2}),
    ("lambda-unmasked", {"color": "0.45", "linestyle": ":", "marker": "s"}),
    ("fogzo-unmasked", {"color": "0.45", "linestyle": "--", "marker": "o"}),
    ("control-variate-unmasked", {"color": "0.3", "linestyle": "-", "marker": "^"}),
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
    for name, style in STYLES:
        steps, risks = zip(*rows[name]["curve"], strict=True)
        style = {"linewidth": 1.1, "markersize": 3, "markevery": 4} | style
        axes.plot(steps, [max(risk, 1e-3) for risk in risks], label=label(name), **style)
    for value in (found["floor"], found["ste_fixed_point"]):
        if value > 0:
            axes.axhline(value, color="0.7", linewidth=0.6, zorder=0)
    axes.set(yscale="log", xlabel="step", ylabel="excess risk", title=f"omega = {found['omega']:g}")


if __name__ == "__main__":
    main()
