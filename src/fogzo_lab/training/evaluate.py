"""Evaluation of a finished run, as it was trained or quantized after training."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from fogzo_lab.data.record import changed_data, digest_data
from fogzo_lab.options import Example, Options, PositiveInt
from fogzo_lab.system.devices import Device
from fogzo_lab.training.methods import start_in_float
from fogzo_lab.training.model_config import QuantizerConfig, check_quantizers
from fogzo_lab.training.models import build_model
from fogzo_lab.training.parallel import join_ranks
from fogzo_lab.training.run_folder import Metrics, read_config
from fogzo_lab.training.state import calibrate_activations, load_weights
from fogzo_lab.training.tasks import load_task

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig(Options):
    """An evaluation of a run's newest checkpoint."""

    run: tyro.conf.Positional[Annotated[Path, Example("runs/digits-mlp")]]
    """The --output-dir of the run."""
    json: bool = False
    """Print the numbers as JSON."""
    device: Device = "auto"
    """auto takes a GPU if there is one."""
    batch_size: Annotated[PositiveInt | None, Example(256)] = None
    """Images or blocks of text per forward pass; by default 256 or, if fewer, 16,384 tokens."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """Post-training quantization of the weights of a float run."""
    activations: QuantizerConfig = field(default_factory=QuantizerConfig)
    """Post-training quantization of the activations of a float run."""

    def check_together(self, prefix: str) -> None:
        """Raise a `ValueError` unless weights and activations can be quantized so together."""
        check_quantizers(self.quantizer, self.activations)


def evaluate_run(config: EvalConfig) -> Metrics:
    """Evaluate a run's newest whole checkpoint on every split.

    Returns:
        For each split the loss in nats and the accuracy, as fractions, of the hard-quantized
        network, with averaged weights if the run averaged them; and the run and its step.

    Raises:
        ValueError: If there is no such run, or it is quantized already and should be again.
    """
    run = read_config(config.run)
    if config.quantizer.preset != "none":
        if run.quantizer.preset != "none":
            raise ValueError(
                f"{config.run} is quantized already ({run.quantizer.preset}): leave --quantizer "
                "out, or give a run that was trained with --quantizer.preset none"
            )
        run = replace(run, quantizer=config.quantizer, activations=config.activations)
    if changes := changed_data(config.run, digest_data(run.data)):
        _LOG.warning("the data are not those that %s was trained on: %s", config.run, changes)
    with join_ranks(config.device) as ranks:
        task = load_task(run)
        model = build_model(run, task.shapes)
        step = load_weights(model, config.run)
        if run.quantize_from:
            start_in_float(run, model, step)
        model.to(ranks.device)
        if config.quantizer.preset != "none":
            calibrate_activations(model.eval(), run, task, ranks.device)
        numbers: Metrics = {"run": str(config.run), "step": step}
        for split in task.splits:
            found = task.evaluate(model, split, ranks, config.batch_size)
            numbers |= {f"{split}_{name}": value for name, value in found.items()}
    return numbers
