"""What is wrong with a run: its newest weights, and the inspections made while it trained."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fogzo import Inspection, inspect
from fogzo.inspection import Finding, agreement_note, diagnose
from fogzo_lab.options import Example, NonNegativeInt, Options, at_least_one
from fogzo_lab.system.devices import Device, find_device
from fogzo_lab.training.checkpoint import newest_checkpoint
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.models import build_model, logits
from fogzo_lab.training.parallel import Ranks
from fogzo_lab.training.run_folder import (
    Metrics,
    check_not_in_float,
    read_inspections,
    read_metrics,
    read_quantized_config,
    read_result,
)
from fogzo_lab.training.state import load_weights
from fogzo_lab.training.tasks import load_task

# Logged steps with an agreement that make a mean.
_ENOUGH = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig(Options):
    """What is wrong with trained runs, by layer: masks, dead channels, flips, clipped inputs.

    The newest checkpoint is looked at. What takes several steps to count, flips for instance, is
    known of runs that were trained with --inspect-every.
    """

    runs: tyro.conf.Positional[
        Annotated[tuple[Path, ...], at_least_one("run"), Example(("runs/digits-mlp",))]
    ]
    """The --output-dir of a run, or of several to compare."""
    agreement: Annotated[NonNegativeInt, Example(8)] = 0
    """Measure the agreement of each layer, on one batch, along so many directions."""
    json: bool = False
    """Print everything as JSON."""
    device: Device = "auto"
    """auto takes a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """A run that was looked at.

    Attributes:
        run: Its folder.
        step: Of the weights.
        inspection: Of the weights, with what the last inspection of the run had counted.
        history: The inspections of the run.
        findings: What is wrong, the gravest first.
    """

    run: Path
    step: int
    inspection: Inspection
    history: Sequence[Inspection]
    findings: Sequence[Finding]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": str(self.run),
            **replace(self.inspection, findings=self.findings, step=self.step).as_dict(),
            "history": [inspection.as_dict() for inspection in self.history],
        }


def examine(run: Path, agreement: int = 0, device: Device = "cpu") -> Examination:
    """Look at the newest checkpoint of a run, or its last inspection, and at its history.

    Args:
        run: The folder.
        agreement: Directions per layer along which to measure the agreement, 0 for none.
        device: Where.

    Raises:
        ValueError: If there is no such run, it was trained in float or by PARQ, is in float yet,
            has neither a checkpoint nor inspections, or no checkpoint to measure agreement on.
    """
    config = read_quantized_config(run, "look at")
    history = read_inspections(run)
    if history and newest_checkpoint(run) is None:
        if agreement:
            raise ValueError(
                f"{run} has inspections but no checkpoint, on which the agreement is measured: "
                "--agreement 0, or train it with --checkpoint-every 0"
            )
        inspection, step = history[-1], history[-1].step or 0
    else:
        inspection, step = _look(config, run, agreement, find_device(device))
        if history:
            inspection = _with_counts(inspection, history[-1])
    diverged = _of_divergence(config, run)
    if not diverged:
        check_not_in_float(config, run, step)
    findings = [
        *diverged,
        *diagnose([*history, inspection]),
        *_of_metrics(read_metrics(run / "metrics.jsonl"), inspection),
    ]
    return Examination(
        run=run, step=step, inspection=inspection, history=history, findings=findings
    )


def _look(
    config: TrainConfig, run: Path, agreement: int, device: torch.device
) -> tuple[Inspection, int]:
    task = load_task(config)
    model = build_model(config, task.shapes)
    step = load_weights(model, run)
    model.to(device).eval()
    raw = next(task.windows(config, Ranks(device)))[0]
    batch = task.prepare(raw, device, training=False)
    if agreement:
        task.loss(model, batch).backward()
    found = inspect(
        model,
        forward=lambda: logits(model, batch[0]),
        closure=(lambda: task.loss(model, batch)) if agreement else None,
        num_samples=max(1, agreement),
    )
    return found, step


def _with_counts(inspection: Inspection, earlier: Inspection) -> Inspection:
    """An inspection with what an earlier one of the same network counted."""
    by_name = {layer.name: layer for layer in earlier.layers}
    counted = ("flips", "flips_back", "moved", "frozen", "dead")
    layers = [
        replace(layer, **{key: getattr(by_name[layer.name], key) for key in counted})
        if layer.name in by_name
        else layer
        for layer in inspection.layers
    ]
    return replace(inspection, layers=layers, counted=earlier.counted, step=earlier.step)


def _of_divergence(config: TrainConfig, run: Path) -> list[Finding]:
    result = read_result(run) if (run / "result.json").exists() else {}
    if not result.get("diverged"):
        return []
    return [
        Finding(
            kind="learning_rate",
            severity="high",
            layers=(),
            message=f"training diverged at step {result['steps']}, with a learning rate of "
            f"{config.learning_rate:g}",
            code="a smaller learning rate",
            options=f"--learning-rate {config.learning_rate / 10:g}",
        )
    ]


def _of_metrics(metrics: Sequence[Metrics], inspection: Inspection) -> list[Finding]:
    """What the agreement says that was logged while the run trained."""
    values = [m["agreement"] for m in metrics if m.get("agreement") is not None]
    measured = any(layer.agreement is not None for layer in inspection.layers)
    if measured or len(values) < _ENOUGH:
        return []
    error = statistics.stdev(values) / math.sqrt(len(values))
    note = agreement_note(statistics.fmean(values), error, inspection.mean("masked") or 0.0)
    return [note] if note else []
