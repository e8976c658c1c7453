"""The theory of the regression beside simulations, with nothing fitted.

    python experiments/dynamics.py [--quick] [--theory] [--output-dir FOLDER]

`fogzo_lab.dynamics` predicts the curve of a regression with quantized weights from an equation in
one dimension. Here each prediction stands beside real runs of quantized layers:

- `sizes`: how the distance between the two shrinks with the number of weights d.
- `long`: long runs by rounding to the nearest, drawn and adjacent: where each stops.
- `figure`: the setting of a figure of Ichikawa, Kashiwamura and Sakata (arXiv 2510.10693): weights
  and inputs of 2 bits, 3000 weights.
- `agreements`: FOGZO's measured agreement in settings that the theory was not made on.

With --theory only the theory is computed again, for the runs in the folder. Writes results.json and
curves.svg.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from fogzo_lab.comparison.intervals import Summary
from fogzo_lab.comparison.tables import where
from fogzo_lab.dynamics import (
    Curve,
    Density,
    Regression,
    gaussian_closure,
    regression_dynamics,
    simulate,
)
from fogzo_lab.figures import drawing
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table

FOLDER = Path(__file__).parent / "dynamics"
BASE = Regression(omega=2.0, learning_rate=0.1)
"""One step of SGD per input, levels at ±2/3 and ±2, every weight of the teacher 1."""
LONG = {
    "STE": replace(BASE, learning_rate=0.05),
    "drawn": replace(BASE, learning_rate=0.05, rounding="drawn"),
    "adjacent": replace(BASE, learning_rate=0.05, rounding="adjacent"),
}
FIGURE = replace(BASE, learning_rate=0.05, input_bits=2)
BATCHES = replace(BASE, learning_rate=1.0, batch_size=32, label_noise=0.1, estimator="fogzo")
AGREEMENTS = {
    "range 2": BATCHES,
    "range 2, masked": replace(BATCHES, masked=True),
    "range 3": replace(BATCHES, omega=3.0),
    "range 3, masked": replace(BATCHES, omega=3.0, masked=True),
    "range 2, 3 bits": replace(BATCHES, bits=3),
    "range 1.5, noisy labels": replace(BATCHES, omega=1.5, label_noise=0.5),
    "range 2, kappa 1": replace(BATCHES, kappa=1.0),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much is run.

    Attributes:
        sizes: d and the number of seeds, of `sizes`.
        sizes_end: tau at the end of these runs.
        long_weights: d of `long`.
        long_end: tau.
        long_seeds: How many.
        figure_weights: d of `figure`.
        figure_times: tau at which it is looked at.
        weights: d of `agreements`.
        steps: Of these runs.
        seeds: How many.
        points: Of a curve, apart from the start.
        time_steps: Of the theory's solver.
    """

    sizes: tuple[tuple[int, int], ...] = ((100, 16), (300, 8), (1000, 4), (3000, 3))
    sizes_end: float = 20.0
    long_weights: int = 500
    long_end: float = 150.0
    long_seeds: int = 2
    figure_weights: int = 3000
    figure_times: tuple[float, ...] = (0.0, 10.0, 25.0, 50.0)
    weights: int = 1000
    steps: int = 750
    seeds: int = 6
    points: int = 30
    time_steps: int = 400


QUICK = Config(
    sizes=((20, 2),),
    sizes_end=1.0,
    long_weights=20,
    long_end=2.0,
    figure_weights=20,
    figure_times=(0.0, 1.0),
    weights=50,
    steps=10,
    seeds=2,
    points=5,
    time_steps=10,
)


def main() -> None:
    """Run everything and write the results."""
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
        config = Config(**results["config"])
    else:
        results = {"environment": environment(), "config": asdict(config), **measured(config)}
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        write_text(path, dumps(results, indent=1) + "\n")  # minutes of runs, before anything else
    add_theory(results, config)
    write_text(path, dumps(results, indent=1) + "\n")
    plot(results, arguments.output_dir / "curves.svg")


def measured(config: Config) -> dict[str, list[dict[str, Any]]]:
    """All runs."""
    d = config.weights
    return {
        "sizes": [
            {"weights": size, "seeds": seeds}
            | runs(BASE, times_of(config.sizes_end, config), size, seeds)
            for size, seeds in config.sizes
        ],
        "long": [
            {"name": name}
            | runs(
                setting,
                times_of(config.long_end, config),
                config.long_weights,
                config.long_seeds,
                density=True,
            )
            for name, setting in LONG.items()
        ],
        "figure": [
            {"setting": FIGURE.described()}
            | runs(FIGURE, config.figure_times, config.figure_weights, 1)
        ],
        "agreements": [
            {"name": name} | runs(setting, late_times(config), d, config.seeds)
            for name, setting in AGREEMENTS.items()
        ],
    }


def times_of(end: float, config: Config) -> list[float]:
    """Evenly spread."""
    return [end * point / config.points for point in range(config.points + 1)]


def late_times(config: Config) -> list[float]:
    """The start, the last tenth and the end of the runs of `agreements`."""
    return [steps / config.weights for steps in (0, config.steps * 9 // 10, config.steps)]


def runs(
    setting: Regression,
    times: Sequence[float],
    weights: int,
    seeds: int,
    density: bool = False,
) -> dict[str, Any]:
    """Runs of one setting: their curves, and where latent weights end on average."""
    found = [simulate(setting, times, weights=weights, seed=seed) for seed in range(seeds)]
    result: dict[str, Any] = {
        "times": list(times),
        "measured": [rounded(run.risk) for run in found],
        "agreements": [rounded(run.agreement[1:]) for run in found],
    }
    if density:
        histograms = [run.density for run in found if run.density is not None]
        result["density_at"] = rounded(histograms[0].weights)
        result["density"] = rounded(np.mean([h.density for h in histograms], 0))
    return result


def add_theory(results: dict[str, Any], config: Config) -> None:
    """What theory says of each entry, without anything fitted, and how far it is from the runs."""
    steps = config.time_steps

    def curve_of(setting: Regression, entry: dict[str, Any], weights: int | None = None) -> Curve:
        curve = regression_dynamics(setting, entry["times"], weights=weights, time_steps=steps)
        entry["theory"] = rounded(curve.risk)
        return curve

    for entry in results["sizes"]:
        gaps = np.array(entry["measured"]) - curve_of(BASE, entry).risk
        rms = float(np.sqrt((gaps**2).mean()))
        entry |= {
            "rms": rms,
            "rms_times_root": rms * math.sqrt(entry["weights"]),
            "mean_gap": float(gaps.mean()),
        }
    for entry in results["long"]:
        setting = LONG[entry["name"]]
        curve = curve_of(setting, entry)
        closed = gaussian_closure(LONG["STE"], entry["times"]).risk
        assert curve.density is not None
        entry |= {
            "floor": setting.least_risk,
            "fixed_point": setting.fixed_point_risk,
            "gaussian": rounded(closed) if entry["name"] == "STE" else None,
            "theory_density": rounded(in_bins(curve.density, np.array(entry["density_at"]))),
        }
    for entry in results["figure"]:
        curve_of(FIGURE, entry)
    for entry in results["agreements"]:
        setting = AGREEMENTS[entry["name"]]
        curve = curve_of(setting, entry, config.weights)
        entry["theory_agreement"] = float(curve.agreement[1:].mean())
        entry["first_order"] = first_order(setting, curve)


def in_bins(density: Density, at: Any) -> Any:
    """The density averaged over the bins of a histogram with these middles."""
    width, cell = at[1] - at[0], density.weights[1] - density.weights[0]
    edges = np.append(at - width / 2, at[-1] + width / 2)
    mass, _ = np.histogram(density.weights, edges, weights=density.density * cell)
    return mass / width


def first_order(setting: Regression, curve: Curve) -> float:
    """The step times the density at thresholds, over the share that has a gradient, at the end."""
    assert curve.density is not None
    at = np.interp(setting.thresholds, curve.density.weights, curve.density.density)
    return float(setting.spacing * at.sum() / (1 - setting.masked * curve.outside[-1]))


def rounded(values: Any) -> list[float | None]:
    """To as many digits as are looked at; None for NaN, which JSON has not."""
    return [None if math.isnan(value) else float(f"{value:.5g}") for value in values]


def table(results: dict[str, Any]) -> Table:
    """Agreements in all settings, for docs/dynamics.md."""
    heading = (
        "setting",
        "risk, theory",
        "measured",
        "agreement, first order",
        "theory",
        "measured",
    )
    rows = []
    for entry in results["agreements"]:
        risk = Summary.of([run[-1] for run in entry["measured"]])
        agreement = Summary.of([run[-1] for run in entry["agreements"]])
        rows.append(
            [
                entry["name"],
                f"{entry['theory'][-1]:.4f}",
                f"{risk.mean:.4f} ± {risk.sd:.4f}",
                f"{entry['first_order']:.2f}",
                f"{entry['theory_agreement']:.2f}",
                f"{agreement.mean:.2f} ± {agreement.sd:.2f}",
            ]
        )
    config = results["config"]
    caption = (
        "FOGZO of kappa 0 (lambda alone) unless it says kappa, as measured and without a shrunk "
        f"agreement. {config['weights']} weights of 2 bits unless it says 3, {config['steps']} "
        f"steps of {BATCHES.batch_size} inputs, label noise {BATCHES.label_noise:g}, learning rate "
        f"{BATCHES.learning_rate:g}; the agreement is that of the last tenth of the steps. Mean ± "
        f"standard deviation over {config['seeds']} seeds. {where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


def sizes_table(results: dict[str, Any]) -> Table:
    """The distance from theory by d."""
    rows = [
        [
            str(entry["weights"]),
            f"{entry['rms']:.3f}",
            f"{entry['rms_times_root']:.2f}",
            f"{entry['mean_gap']:+.3f}",
            str(entry["seeds"]),
        ]
        for entry in results["sizes"]
    ]
    heading = ("weights d", "rms distance of a run", "times sqrt(d)", "mean", "seeds")
    (found,) = results["figure"]
    pairs = ", ".join(
        f"{theory:.3f} / {measured:.3f} at tau {time:g}"
        for time, theory, measured in zip(
            found["times"], found["theory"], found["measured"][0], strict=True
        )
        if time
    )
    caption = (
        f"Excess risk of runs minus that of theory, over a curve to tau "
        f"{results['config']['sizes_end']:g}. In the setting of the paper's figure (2-bit weights "
        f"and inputs, {results['config']['figure_weights']} weights), theory / one run: {pairs}. "
        f"{where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


STYLES = {"STE": ("black", "o"), "drawn": ("0.45", "s"), "adjacent": ("0.65", "^")}


def plot(results: dict[str, Any], path: Path) -> None:
    """Theory as lines, measurement as marks: risk over time, and where the latent weights end."""
    with drawing(path, (8.2, 3.4)) as drawn:
        left, right = drawn.subplots(1, 2)
        draw_risks(left, results["long"])
        draw_densities(right, results["long"])
        drawn.legend(
            *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
        )


def draw_risks(axes: Axes, runs: list[dict[str, Any]]) -> None:
    """Excess risk over time."""
    for run in runs:
        color, marker = STYLES[run["name"]]
        axes.plot(run["times"], run["theory"], color=color, linewidth=1.2)
        axes.plot(
            run["times"],
            np.mean(run["measured"], 0),
            color=color,
            marker=marker,
            markersize=3,
            linestyle="none",
            label=run["name"],
        )
        if run["gaussian"] is not None:
            axes.plot(
                run["times"],
                run["gaussian"],
                color=color,
                linewidth=0.8,
                linestyle=":",
                label="STE, Gaussian closure",
            )
    for name in ("floor", "fixed_point"):
        axes.axhline(runs[0][name], color="0.8", linewidth=0.6, zorder=0)
    axes.set(yscale="log", xlabel="tau = steps / d", ylabel="excess risk", title="lines: theory")


def draw_densities(axes: Axes, runs: list[dict[str, Any]]) -> None:
    """Where latent weights are at the end."""
    for run in runs[:2]:
        color, marker = STYLES[run["name"]]
        axes.step(run["density_at"], run["theory_density"], where="mid", color=color, linewidth=1.2)
        axes.plot(
            run["density_at"],
            run["density"],
            color=color,
            marker=marker,
            markersize=3,
            linestyle="none",
        )
    for level in BASE.levels:
        axes.axvline(level, color="0.8", linewidth=0.6, zorder=0)
    for threshold in BASE.thresholds:
        axes.axvline(threshold, color="0.8", linewidth=0.6, linestyle=":", zorder=0)
    axes.set(
        xlim=(-0.2, 2.2),
        xlabel="latent weight (levels solid, thresholds dotted)",
        ylabel="density at the end",
    )


if __name__ == "__main__":
    main()
