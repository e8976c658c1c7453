"""Linear regression with 2-bit weights: a fast testbed for the dynamics of STE and its rivals.

    python experiments/regression.py [--quick] [--theory] [--output-dir FOLDER]

The setting of Ichikawa, Kashiwamura and Sakata (arXiv 2510.10693), with small batches: a teacher
whose weights are all 1, fresh Gaussian inputs at every step, latent weights that start as standard
Gaussians, and quantized levels spread evenly over [-omega, omega]. Inputs have covariance I/d, so
the excess risk of a student is known exactly, mean((Q(w) - w*)^2).

Every row's learning rate, and its kappa or weight where it has one, is chosen by that risk on
seeds of their own; what is reported comes from other, fresh seeds. Costs are counted in forward
passes, a backward pass as two. Beside each curve stands the one that theory gives for the same
learning rate and strength (`fogzo_lab.dynamics`); --theory computes these again for the results in
the folder. Writes results.json and curves.svg.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from regression_runs import (
    COST,
    STEPS,
    TEACHER,
    Choice,
    Config,
    Row,
    draw,
    num_steps,
    run,
    theory,
)
from regression_views import RISK, plot, table

from fogzo_lab.comparison.intervals import Interval, Summary
from fogzo_lab.dynamics import Regression
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text

__all__ = ["Choice", "Config", "Row", "best", "draw", "plot", "run", "table", "tune"]

FOLDER = Path(__file__).parent / "regression"
QUICK = Config(
    omegas=(2.0,),
    weights=50,
    batch_size=8,
    steps=10,
    learning_rates=((0.004, 0.016),),
    kappas=(1.0,),
    weight_factors=(1.0,),
    tuning_seeds=(100,),
    seeds=(0, 1),
    logged=5,
)


COMPARED = (
    "fogzo",
    "fogzo-unmasked",
    "control-variate-unmasked",
    "ste-drawn",
    "ste-drawn-adjacent",
)
"""Rows whose differences from all others are kept."""


def main() -> None:
    """Train everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and short runs")
    parser.add_argument("--theory", action="store_true", help="only the curves of theory")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = QUICK if arguments.quick else Config()
    path = arguments.output_dir / "results.json"

    if arguments.theory:
        results = json.loads(path.read_text(encoding="utf-8"))
    else:
        results = {
            "environment": environment(),
            "config": asdict(config),
            "settings": [
                setting(omega, rates, config)
                for omega, rates in zip(config.omegas, config.learning_rates, strict=True)
            ],
        }
    add_theory(results)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(path, dumps(results, indent=1) + "\n")
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
    rows = [summarise(row, tuned[row], outcomes[row], config) for row in chosen]
    problem = Regression(omega=omega, learning_rate=1.0, bits=config.bits, teacher=TEACHER)
    return {
        "omega": omega,
        # The least excess risk of quantized weights.
        "floor": problem.least_risk,
        # Where the levels around the teacher average to it, STE's gradient is zero.
        "ste_fixed_point": problem.fixed_point_risk,
        "rows": rows,
        "differences": [
            difference(row, other)
            for row in rows
            if row["name"] in COMPARED
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


def add_theory(results: dict[str, Any]) -> None:
    """What theory says of each row, without anything fitted; None where it has no theory."""
    config = Config(**results["config"])
    for found in results["settings"]:
        for entry in found["rows"]:
            entry["theory"] = theory(entry, found["omega"], config)


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


if __name__ == "__main__":
    main()
