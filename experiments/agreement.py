"""What to make of a measured agreement: rules compared where the right answer is known.

    python experiments/agreement.py [--quick] [--output-dir FOLDER]

A probe measures the slope of the quantized loss along the straight-through gradient from few
roundings, so the agreement scatters by its standard error. Each rule turns the pair into the factor
that the gradient gets. Three settings:

- `toy`: a quadratic of d quantized weights whose gradient is right, four times too large, without
  any relation to the loss, or reversed. Plain SGD; the excess loss that remains, of what it was.
- `regression`: 2-bit linear regression against a known teacher (see regression.py), at the kappa
  that FOGZO was tuned to there, each rule at its own best learning rate; the excess risk.
- `quest-mlp`: the MNIST perceptron with QuEST's quantizer, where the unshrunk estimator loses
  points, at FOGZO's tuned learning rate, beside STE and the placebo at theirs. Needs data/mnist.

Writes results.json.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import regression
import regression_runs
import torch

import fogzo
from fogzo.estimators.agreement import shrink
from fogzo_lab.comparison.intervals import Interval, Summary
from fogzo_lab.comparison.tables import where
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table
from fogzo_lab.training.config import TrainConfig, from_dict

FOLDER = Path(__file__).parent / "agreement"
Rule = Callable[[float, float], float]


def shrunk_by(errors: float) -> Rule:
    """The library's rule, of two errors, with another number of them."""

    def shrunk(agreement: float, error: float) -> float:
        distance = agreement - 1
        if abs(distance) <= errors * error:
            return 1.0
        found = 1 + distance * (1 - (errors * error / distance) ** 2)
        return found if agreement < -2 * error else max(found, 0.0)

    return shrunk


RULES: dict[str, Rule] = {
    "measured": lambda agreement, error: agreement,
    "clamped at 0": lambda agreement, error: max(agreement, 0.0),
    "shrunk by 1 error": shrunk_by(1),
    "shrunk by 2 errors": shrink,
    "shrunk by 3 errors": shrunk_by(3),
    "always 1": lambda agreement, error: 1.0,
}
TRUTHS = ("right", "too large", "unrelated", "reversed")


def main() -> None:
    """Run all settings and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and short runs")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(1 if options.quick else 8)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": environment()}

    def keep(name: str, rows: list[dict[str, Any]]) -> None:
        results[name] = rows
        write_text(options.output_dir / "results.json", dumps(results, indent=1) + "\n")

    sizes, steps = ((100,), 2) if options.quick else ((100, 1000, 10_000), 200)
    keep("toy", toys(seeds, sizes, steps))
    if Path("data/mnist").exists() and not options.quick:
        keep("quest-mlp", quest_mlp(range(5)))
    keep("regression", regressions(seeds, quick=options.quick))


@contextmanager
def rule(name: str) -> Any:
    """Every estimator inside follows this rule."""
    with (
        mock.patch("fogzo.estimators.family.shrink", RULES[name]),
        mock.patch.object(regression_runs, "AGREEMENT", "shrunk"),
    ):
        yield


def toys(seeds: range, sizes: tuple[int, ...], steps: int) -> list[dict[str, Any]]:
    """Every rule on every truth."""
    return [
        {"truth": truth, "weights": d, "rule": name}
        | summary([toy(truth, d, name, seed, steps) for seed in seeds])
        for truth in TRUTHS
        for d in sizes
        for name in RULES
    ]


def toy(truth: str, d: int, name: str, seed: int, steps: int) -> float:
    """The excess loss that SGD leaves, as a share of what it was."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(d, generator=generator))
    target = torch.randn(d, generator=generator)
    step = 0.25
    optimizer = torch.optim.SGD([weight], lr=0.05)

    def loss() -> torch.Tensor:
        return 0.5 * ((weight / step).round() * step - target).square().sum()

    estimator = fogzo.FogzoEstimator([("weight", weight, step)], noise_share=0.0, seed=seed)
    with torch.no_grad(), rule(name):
        start = float(loss())
        for _ in range(steps):
            gradient = (weight / step).round() * step - target
            if truth == "too large":
                gradient = 4 * gradient
            elif truth == "reversed":
                gradient = -gradient
            elif truth == "unrelated":
                gradient = torch.randn(d, generator=generator) * gradient.norm() / math.sqrt(d)
            weight.grad = gradient
            estimator.refine_grads_(loss)
            optimizer.step()
        return min(float(loss()) / start, 1e3)


OMEGA = 2.0
"""Ends of the range of levels in the regression, where STE is known to stick at thresholds."""


def regressions(seeds: range, *, quick: bool) -> list[dict[str, Any]]:
    """Every rule in the regression, each at a learning rate of its own."""
    config = regression.QUICK if quick else regression.Config()
    tuned = json.loads((regression.FOLDER / "results.json").read_text(encoding="utf-8"))
    (setting,) = (found for found in tuned["settings"] if found["omega"] == OMEGA)
    rates = config.learning_rates[config.omegas.index(OMEGA)]
    found = []
    for row in setting["rows"]:
        if row["name"] not in ("fogzo", "fogzo-unmasked"):
            continue
        which = regression.Row(row["name"].split("-")[0], row["name"].endswith("unmasked"))
        grid = {which: [regression.Choice(rate, row["strength"]) for rate in rates]}
        for name in RULES:
            with rule(name):
                choice = regression.best(regression.tune(OMEGA, grid, config)[which])
                risks = [
                    regression.run(
                        which, choice, OMEGA, seed, regression.draw(seed, config), config
                    )["risk"]
                    for seed in seeds
                ]
            found.append(
                {"row": row["name"], "rule": name, "learning_rate": choice.learning_rate}
                | summary(risks)
            )
    return found


def quest_mlp(seeds: range) -> list[dict[str, Any]]:
    """The perceptron that FOGZO loses on, by every rule; test accuracy in %."""
    folder = FOLDER.parent / "mnist-mlp-quest-w2"
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    rates = {row["name"]: row["learning_rate"] for row in rows if row["budget"] == "steps"}
    tuned = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base = replace(from_dict(TrainConfig, tuned["base"]), agreement="shrunk")
    runs: list[tuple[str, TrainConfig]] = []
    for estimator in ("ste", "placebo", "fogzo"):
        config = replace(base, estimator=estimator, learning_rate=rates[estimator])
        names = RULES if estimator == "fogzo" else ("always 1",)
        runs += [(name, config) for name in names]
    default = replace(runs[-1][1], noise_shape="tensor_rms", kappa=1e-3)
    runs.append(("shrunk by 2 errors", default))
    accuracies = [accuracy(name, config, seeds) for name, config in runs]
    return [
        {
            "estimator": config.estimator,
            "noise_shape": config.noise_shape,
            "kappa": config.kappa,
            "learning_rate": config.learning_rate,
            "rule": name,
            "minus_ste": vars(Interval.paired(own, accuracies[0])),
        }
        | summary(own)
        for (name, config), own in zip(runs, accuracies, strict=True)
    ]


def accuracy(name: str, config: TrainConfig, seeds: range) -> list[float]:
    """Test accuracy in %, by seed."""
    from fogzo_lab.training.loop import train

    found = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder, rule(name):
            result = train(replace(config, seed=seed, output_dir=Path(folder) / "run"))
        found.append(100 * result["test_accuracy"])
    return found


def summary(values: list[float]) -> dict[str, Any]:
    """Mean and spread over seeds."""
    found = Summary.of(values)
    return {"values": values, "mean": found.mean, "std": found.sd}


SHOWN = tuple(truth for truth in TRUTHS if truth != "too large")
"""The truths of the table; what the fourth adds is said in its caption."""


def table(results: dict[str, Any]) -> Table:
    """Every rule in every setting, for docs/results.md."""
    heading = ("rule", *(f"gradient {truth}" for truth in SHOWN), "regression, omega 2", "QuEST")
    rows = [[name, *_cells(name, results)] for name in RULES]
    ste, size = results["quest-mlp"][0], results["toy"][0]
    toys = sorted({row["weights"] for row in results["toy"]})
    right, large = (
        [row["mean"] for row in results["toy"] if row["truth"] == truth] for truth in TRUTHS[:2]
    )
    apart = max(abs(a - b) for a, b in zip(right, large, strict=True))
    caption = (
        f"Gradient: share of the excess loss that remains, for {' / '.join(map(str, toys))} "
        f"weights; one four times too large changes it by {apart:.3f} at most. Regression: excess "
        f"risk over masked / unmasked STE. QuEST: test accuracy %, kappa {ste['kappa']:g}; STE "
        f"{_plain(ste)}, default noise {_plain(results['quest-mlp'][-1])}. Means of "
        f"{len(ste['values'])} (QuEST) or {len(size['values'])} seeds. "
        f"{where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


def _cells(name: str, results: dict[str, Any]) -> list[str]:
    toys = [
        " / ".join(
            f"{row['mean']:.3f}"
            for row in results["toy"]
            if (row["truth"], row["rule"]) == (truth, name)
        )
        for truth in SHOWN
    ]
    risks = [row for row in results["regression"] if row["rule"] == name]
    (quest,) = (
        row
        for row in results["quest-mlp"]
        if (row["estimator"], row["rule"], row["noise_shape"]) == ("fogzo", name, "isotropic")
    )
    return [*toys, " / ".join(f"{row['mean']:.3f}" for row in risks), _plain(quest)]


def _plain(row: dict[str, Any]) -> str:
    return f"{row['mean']:.1f} ± {row['std']:.1f}"


if __name__ == "__main__":
    main()
