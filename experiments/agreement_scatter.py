"""Does the standard error of an agreement say how far agreements scatter?

    python experiments/agreement_scatter.py [--output-dir FOLDER]

Reads FOGZO's finished runs that the long comparisons keep, at the learning rate that it chose: the
agreements of the steps that were logged, and the errors that the estimator gave them. Then trains a
DeiT for a few steps with inputs of several bits, to tell their part from that of the weights'
quantizer, which takes two minutes. Needs data/cifar10.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import paper
import torch
from masked_share import EXPERIMENTS, kept_runs, read
from tables import LONG
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fogzo
from fogzo.estimators.agreement import agreement_error, shrink, unevenness
from fogzo.estimators.base import Refined
from fogzo.probing.directions import Direction, Directions
from fogzo.probing.measure import Measurement
from fogzo_lab.comparison.results import Comparison
from fogzo_lab.comparison.tables import where
from fogzo_lab.data.batches import load
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.models import float_model, logits
from fogzo_lab.training.run_folder import read_metrics
from fogzo_lab.training.state import own_random_streams
from fogzo_lab.training.tasks import load_task

FOLDER = EXPERIMENTS / "agreement-scatter"
FAR = 3  # standard errors
STEPS, MEASURED = 160, 80
SHORT = {
    "LSQ, W2": (fogzo.lsq(2), None),
    "LSQ, W2A4": (fogzo.lsq(2), fogzo.lsq(4)),
    "LSQ, W2A2": (fogzo.lsq(2), fogzo.lsq(2)),
    "QuEST, W2": (fogzo.quest(2), None),
    "QuEST, W2A8": (fogzo.quest(2), fogzo.quest(8)),
    "QuEST, W2A2": (fogzo.quest(2), fogzo.quest(2)),
}


def main() -> None:
    """Read and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    short = {name: short_run(*quantizers) for name, quantizers in SHORT.items()}
    results = {"environment": environment(), "comparisons": collect(), "short": short}
    write_text(folder / "results.json", dumps(results, indent=1) + "\n")


def collect() -> dict[str, dict[str, float]]:
    """Of every long comparison how agreements scatter, and how far their errors say they do."""
    found = {}
    for label, folder in LONG.items():
        comparison = Comparison.from_dict(read(EXPERIMENTS / folder / "results.json"))
        rate = comparison.find("fogzo").learning_rate
        lines = [
            line
            for named, path in kept_runs(folder)
            if named["row"] == "fogzo" and float(named["rate"]) == rate
            for line in read_metrics(path / "metrics.jsonl")
            if line.get("agreement_error")
        ]
        found[label] = numbers(
            [line["agreement"] for line in lines], [line["agreement_error"] for line in lines]
        )
    return found


def numbers(agreements: Sequence[float], errors: Sequence[float]) -> dict[str, float]:
    """How they scatter."""
    pairs = zip(agreements, errors, strict=True)
    return {
        "steps": len(agreements),
        "mean": round(mean(agreements), 4),
        "sd": round(stdev(agreements), 4),
        "error": round(median(errors), 4),
        "far": round(mean(abs(agreement - 1) > FAR * error for agreement, error in pairs), 4),
    }


class _Both(fogzo.FogzoEstimator):
    """FOGZO, which also says what the error would be if it knew of the weights alone.

    That cannot be had from the error with inputs: where it explains an agreement, how unevenly the
    weights are spread is not asked for.
    """

    of_weights = math.nan

    def combine(
        self,
        noise_share: float,
        directions: Directions,
        plan: Sequence[Direction],
        measured: Measurement,
    ) -> Refined:
        """Of the parent, unchanged."""
        refined = super().combine(noise_share, directions, plan, measured)
        error = agreement_error(
            directions, noise_share, measured.loss_error, len(plan), self.one_sided
        )
        if shrink(refined.agreement, error) != 1:
            error = math.hypot(error, unevenness(directions))
        self.of_weights = error
        return refined


def short_run(
    quantizer: fogzo.Quantizer,
    activations: fogzo.Quantizer | None,
    recipe: TrainConfig | None = None,
    steps: int = STEPS,
    measured: int = MEASURED,
) -> dict[str, float]:
    """Agreements early in a training by STE and then FOGZO with its defaults.

    Args:
        quantizer: Of the weights.
        activations: Of the inputs.
        recipe: The network and its data, the DeiT of the comparisons without it.
        steps: Of the training.
        measured: How many of them, the last ones, are FOGZO's.
    """
    recipe = recipe or paper.deep_images()["cifar-deit"]
    task = load_task(recipe)
    examples, chosen = task.splits["train"], torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        indices = torch.randint(len(examples), (recipe.batch_size,), generator=chosen)
        raw = next(load(examples, [indices]))
        return task.prepare(raw, torch.device("cpu"), training=False)

    def compute_loss(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(logits(model, x), y)

    with own_random_streams(0):
        model = float_model(recipe.model, task.shapes)

    def is_inner(_: nn.Module, name: str) -> bool:
        return "projection" not in name and name != "classifier"

    # Its patches of three channels could not be rotated.
    fogzo.quantize_(model, quantizer, is_inner, activations=activations)
    if activations is not None and activations.scale.has_state:
        with fogzo.calibrate_(model):
            model(batch()[0])
    estimator = _Both(fogzo.quantized_weights(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    agreements, of_weights, errors = [], [], []
    for step in range(steps):
        x, y = batch()
        if step < steps - measured:
            compute_loss(x, y).backward()
        else:
            loss = estimator.record(compute_loss, x, y)
            loss.backward()
            stats = estimator.refine_grads_()
            agreements.append(stats.agreement)
            errors.append(stats.agreement_error)
            of_weights.append(estimator.of_weights)
        optimizer.step()
        optimizer.zero_grad()
    both = numbers(agreements, errors)
    found = numbers(agreements, of_weights)
    return {**found, "error_with_inputs": both["error"], "far_with_inputs": both["far"]}


def table(results: dict[str, Any]) -> Table:
    """A line for each comparison."""
    cells = [[name, *_cells(found)] for name, found in results["comparisons"].items()]
    caption = (
        "Steps of FOGZO that were logged, of all seeds at the learning rate that it chose, and the "
        "mean ± standard deviation of their agreements."
    )
    return Table("", ["comparison", *_HEADING], cells, caption)


def short_table(results: dict[str, Any]) -> Table:
    """A line for each pair of quantizers."""
    heading = ["quantizers", "agreement", "error, weights alone", f"more than {FAR} of them from 1"]
    heading += ["error, with inputs", f"more than {FAR} of them from 1"]
    cells = [
        [
            name,
            *_cells(found)[1:],
            f"{found['error_with_inputs']:.2f}",
            f"{found['far_with_inputs']:.0%}",
        ]
        for name, found in results["short"].items()
    ]
    caption = (
        f"DeiT, {MEASURED} steps of FOGZO with its defaults after {STEPS - MEASURED} of STE, one "
        f"seed; medians of errors. {where(results['environment'])}"
    )
    return Table("", heading, cells, caption)


_HEADING = ["steps", "agreement", "its standard error, median", f"more than {FAR} errors from 1"]


def _cells(found: dict[str, float]) -> list[str]:
    scatter = f"{found['mean']:.2f} ± {found['sd']:.2f}"
    return [str(found["steps"]), scatter, f"{found['error']:.2f}", f"{found['far']:.0%}"]


if __name__ == "__main__":
    main()
