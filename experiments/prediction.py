"""Measured agreement beside the one that backward's gradient predicts, over a training with STE.

    python experiments/prediction.py [--quick] [--output-dir FOLDER]

In some steps of each run two slopes are measured, and the gradients left as backward left them:

- along STE's gradient, as "lambda only" would, beside `FogzoEstimator.predicted_agreement`;
- along the update that AdamW is about to make, divided by what the gradient predicts for it.

What the prediction leaves unexplained is all that forward passes know beyond backward's gradient.
Writes results.json with the numbers of each quarter of each run. Needs data/mnist and
data/shakespeare.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import paper
import torch
from torch import Tensor, nn

import fogzo
from fogzo.probing.directions import Directions
from fogzo_lab.comparison.intervals import Summary
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system.environment import environment
from fogzo_lab.table import Table
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.loop import training_step
from fogzo_lab.training.model_config import QuantizerConfig
from fogzo_lab.training.parallel import Ranks
from fogzo_lab.training.state import Training, own_random_streams

FOLDER = Path(__file__).parent / "prediction"
QUARTERS = 4
NUMBERS = ("measured", "predicted", "error", "update", "update_predicted")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is run.

    Attributes:
        seeds: Of every run.
        steps: Of a run, by network.
        points: Steps of a run in which the slopes are measured.
        cases: Names in `CASES`; empty for all.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: dict[str, int]
    points: int = 120
    cases: tuple[str, ...] = ()


FULL = Config(steps={"mlp": 1200, "llama": 450, "digits": 0})
QUICK = Config(seeds=(0, 1), steps={"digits": 32}, points=16, cases=("digits-lsq",))


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        label: What it is.
        network: mlp, llama or digits.
        quantizer: Of its weights.
    """

    label: str
    network: str
    quantizer: QuantizerConfig


def _fixed(surrogate: Any = "identity") -> QuantizerConfig:
    return QuantizerConfig(preset="fixed", bits=2, surrogate=surrogate)


_LSQ, _LSQ_4 = (QuantizerConfig(preset="lsq", bits=bits) for bits in (2, 4))
_QUEST, _QUEST_4 = (QuantizerConfig(preset="quest", bits=bits) for bits in (2, 4))

CASES: dict[str, Case] = {
    "mlp-fixed": Case("MLP: fixed, identity, W2", "mlp", _fixed()),
    "mlp-unmasked": Case("MLP: fixed, unmasked, W2", "mlp", _fixed("identity_unmasked")),
    "mlp-lsq": Case("MLP: LSQ, W2", "mlp", _LSQ),
    "mlp-lsq-4": Case("MLP: LSQ, W4", "mlp", _LSQ_4),
    "mlp-quest": Case("MLP: QuEST, W2", "mlp", _QUEST),
    "mlp-quest-4": Case("MLP: QuEST, W4", "mlp", _QUEST_4),
    "llama-fixed": Case("LLaMA: fixed, identity, W2", "llama", _fixed()),
    "llama-lsq": Case("LLaMA: LSQ, W2", "llama", _LSQ),
    "digits-lsq": Case("digits: LSQ, W2", "digits", _LSQ),
}


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(QUICK if options.quick else FULL)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(config: Config) -> dict[str, Any]:
    """All runs of all seeds."""
    rows = []
    for name in config.cases or CASES:
        steps = config.steps.get(CASES[name].network)
        if steps:
            runs = [quarters(run(CASES[name], steps, config, seed)) for seed in config.seeds]
            rows.append({"name": name, "runs": runs})
    return {"config": asdict(config), "environment": environment(), "rows": rows}


def run(case: Case, steps: int, config: Config, seed: int) -> list[dict[str, float]]:
    """What was measured in one training with STE, point by point."""
    settings = replace(
        recipe(case.network), quantizer=case.quantizer, seed=seed, estimator="ste", max_steps=steps
    )
    return train(settings, steps // config.points)[1]


def train(settings: TrainConfig, every: int) -> tuple[nn.Module, list[dict[str, float]]]:
    """A network trained with STE, and what was measured in every so-manieth step; 0 for none."""
    with own_random_streams(settings.seed):
        training = Training(settings, Ranks(torch.device("cpu")))
        points: list[dict[str, float]] = []
        if every:
            observer = Observer(training.model, training.optimizer, every, points)
            training.estimator = observer  # type: ignore[assignment]  # the part that is used
        for _ in range(settings.max_steps):
            training_step(training, training.next_window())
    return training.model, points


def recipe(network: str) -> TrainConfig:
    """The recipe of a network; LLaMA's at the learning rate that STE chose for these steps."""
    if network == "llama":
        return replace(paper.shakespeare_llama(), learning_rate=3.16e-3)
    return paper.mnist_mlp() if network == "mlp" else RECIPES["digits-mlp"]()


class Observer:
    """Stands in the loop for an estimator, measures, and changes no gradient.

    Args:
        model: That is trained.
        optimizer: AdamW, which trains it.
        every: Steps from one measurement to the next.
        points: Gets what was measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: int,
        points: list[dict[str, float]],
    ) -> None:
        self._points = points
        self.record_rng = nullcontext
        self._weights = fogzo.quantized_weights(model)
        self._optimizer = optimizer
        self._along = fogzo.FogzoEstimator(self._weights, noise_share=0.0, agreement="measured")
        self._linear = fogzo.LinearizedLoss(model)
        self._every = every
        self._step = 0

    @torch.no_grad()
    def refine_grads_(
        self, closure: Callable[[], Tensor], expected_loss: Tensor | None = None
    ) -> fogzo.RefineStats:
        """Measure, in every so-manieth step."""
        self._step += 1
        if not self._step % self._every:
            grads = [weight.param.grad for weight in self._weights]
            point = self._measure(grads, closure)
            if point is not None:
                self._points.append(point)
            for weight, grad in zip(self._weights, grads, strict=True):
                weight.param.grad = grad
        return fogzo.RefineStats(self._step)

    def _measure(
        self, grads: Sequence[Tensor], closure: Callable[[], Tensor]
    ) -> dict[str, float] | None:
        along_gradient = self._slopes([grad.clone() for grad in grads], closure)
        updates = [
            self._update(weight.param, grad)
            for weight, grad in zip(self._weights, grads, strict=True)
        ]
        # A gradient along which the weights move as the update moves them.
        parts = Directions(self._weights, seed=0).parts
        guides = [
            part.rotated((part.rotated(update) / part.eps.square()).nan_to_num_(posinf=0.0))
            for part, update in zip(parts, updates, strict=True)
        ]
        along_update = self._slopes(guides, closure)
        if along_gradient is None or along_update is None:
            return None
        told = math.fsum(float((g * u).sum()) for g, u in zip(grads, updates, strict=True))
        scale = along_update[3] ** 2 / told
        measured, predicted, error, _ = along_gradient
        numbers = (measured, predicted, error, along_update[0] * scale, along_update[1] * scale)
        return dict(zip(NUMBERS, numbers, strict=True))

    def _slopes(
        self, guides: Sequence[Tensor], closure: Callable[[], Tensor]
    ) -> tuple[float, float, float, float] | None:
        """The agreement with a guide: measured, predicted, its error, and the guide's norm."""
        for weight, guide in zip(self._weights, guides, strict=True):
            weight.param.grad = guide
        predicted = self._along.predicted_agreement(self._linear)
        stats = self._along.refine_grads_(closure)
        if predicted is None or stats.agreement is None or stats.fallback is not None:
            return None
        assert stats.agreement_error is not None and stats.gradient_norm is not None
        return stats.agreement, predicted, stats.agreement_error, stats.gradient_norm

    def _update(self, param: Tensor, grad: Tensor) -> Tensor:
        """What AdamW is about to subtract, for a learning rate of 1."""
        [group] = [g for g in self._optimizer.param_groups if any(p is param for p in g["params"])]
        state, (first, second) = self._optimizer.state[param], group["betas"]
        count = float(state["step"]) + 1
        mean = torch.lerp(state["exp_avg"], grad, 1 - first)
        square = second * state["exp_avg_sq"] + (1 - second) * grad.square()
        root = (square / (1 - second**count)).sqrt() + group["eps"]
        return mean / (1 - first**count) / root


def quarters(points: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The numbers of each quarter of a run: means, spreads, and what the prediction explains."""
    length = len(points) // QUARTERS
    return [summary(points[i * length : (i + 1) * length]) for i in range(QUARTERS)]


def summary(points: Sequence[dict[str, float]]) -> dict[str, float]:
    """The numbers of some points."""
    columns = {name: [point[name] for point in points] for name in NUMBERS}
    found = {name: statistics.fmean(values) for name, values in columns.items()}
    for along, told in (("measured", "predicted"), ("update", "update_predicted")):
        left = [m - p for m, p in zip(columns[along], columns[told], strict=True)]
        found[f"{along}_spread"] = statistics.stdev(columns[along])
        found[f"{along}_correlation"] = statistics.correlation(columns[along], columns[told])
        found[f"{along}_unexplained"] = statistics.pvariance(left) / statistics.pvariance(
            columns[along]
        )
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def table(results: dict[str, Any]) -> Table:
    """What the prediction explains early and late, and the agreement along both directions."""
    heading = ["run", "correlation, first → last quarter", "unexplained, first → last quarter"]
    heading += ["agreement along the gradient", "along the update"]
    config, facts = results["config"], results["environment"]
    rows = []
    for row in results["rows"]:

        def over(key: str, *which: int, runs: Any = row["runs"]) -> list[float]:
            return [statistics.fmean(run[i][key] for i in which) for run in runs]

        ends = (0, QUARTERS - 1)
        whole = tuple(range(QUARTERS))
        cells = [
            " → ".join(f"{statistics.fmean(over(key, i)):{digits}}" for i in ends)
            for key, digits in (("measured_correlation", ".3f"), ("measured_unexplained", ".2f"))
        ]
        for along in ("measured", "update"):
            found = Summary.of(over(along, *whole))
            cells.append(f"{found.mean:.2f} ± {found.sd:.2f}")
        rows.append([CASES[row["name"]].label, *cells])
    caption = (
        f"STE at the recipe's learning rate, {len(config['seeds'])} seeds, {config['points']} "
        f"measured steps of {config['steps']['mlp']} (MLP 784-10-10 on MNIST) or "
        f"{config['steps']['llama']} (LLaMA, 64 wide, on Shakespeare). Unexplained: the variance "
        "of measured minus predicted agreement over that of the measured one. Agreements: means "
        f"over all points, ± the standard deviation over seeds. {facts['processor']}, torch "
        f"{facts['torch']}, {facts['date']}."
    )
    return Table("", heading, rows, caption)


if __name__ == "__main__":
    main()
