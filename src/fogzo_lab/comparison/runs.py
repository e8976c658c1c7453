"""The runs a comparison is made of, and how one is computed."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fogzo_lab.comparison.rows import ROWS
from fogzo_lab.comparison.run_cache import RunCache, config_hash, finish
from fogzo_lab.training.checkpoint import newest_checkpoint
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.evaluate import EvalConfig, evaluate_run
from fogzo_lab.training.loop import DivergedError, train
from fogzo_lab.training.run_folder import Metrics, read_result


@dataclass(frozen=True)
class Run:
    """One training run of a row, or the quantization of one after training.

    Attributes:
        row: Name of the row.
        recipe: The recipe with the run's learning rate, seed and number of steps, before the row
            changes it.
        value: Of the row's own parameter, if it has one.
    """

    row: str
    recipe: TrainConfig
    value: float | None = None

    @property
    def candidate(self) -> tuple[float, float | None]:
        """What is tuned: the learning rate and the row's own parameter."""
        return self.recipe.learning_rate, self.value

    @cached_property
    def config(self) -> TrainConfig:
        """What is trained."""
        return ROWS[self.row].config(self.recipe, self.value)

    @property
    def trained(self) -> "Run":
        """The run that trains the network: itself, unless it is quantized after training."""
        return Run("float", self.recipe) if ROWS[self.row].quantized_after else self

    @property
    def label(self) -> str:
        """The readable part of its folder's name."""
        parameter, recipe = ROWS[self.row].parameter, self.recipe
        own = "" if parameter is None else f"-{parameter.name.replace(' ', '-')}{self.value:g}"
        return (
            f"{self.row}-lr{recipe.learning_rate:g}{own}-steps{recipe.max_steps}-seed{recipe.seed}"
        )

    @cached_property
    def key(self) -> str:
        """The hash of what it is."""
        if not ROWS[self.row].quantized_after:
            return config_hash(self.config)
        quantizers = [self.recipe.quantizer, self.recipe.activations]
        # The layers that are quantized are a part of the float run's config already.
        return config_hash(self.config, json.dumps([dataclasses.asdict(q) for q in quantizers]))

    def path(self, cache: RunCache) -> Path:
        """Its folder."""
        return cache.path(self.label, self.key)


def missing(cache: RunCache, runs: Sequence[Run]) -> list[Run]:
    """The runs that are not finished."""
    return [run for run in runs if cache.result(run.path(cache)) is None]


def run_in(run: Run, path: Path, trained: Path) -> None:
    """Compute a run in its folder.

    Args:
        run: What to compute.
        path: Its folder, whose name is its identity.
        trained: The folder of the run that trains the network, where that is another one.
    """
    config = dataclasses.replace(run.config, output_dir=path, resume=False, overwrite=True)
    result = _quantize(run, path, trained) if ROWS[run.row].quantized_after else _train(config)
    finish(path, config, result)


def _train(config: TrainConfig) -> Metrics:
    try:
        return train(config)
    except DivergedError:
        # It has no losses: this learning rate can never be chosen.
        return read_result(config.output_dir)


def _quantize(run: Run, path: Path, trained: Path) -> Metrics:
    result = read_result(trained)
    training = {name: result[name] for name in ("steps", "seconds")}
    if result.get("diverged"):
        return training | {"diverged": True}
    if newest_checkpoint(trained) is None:  # somebody has deleted it, or it is damaged
        # Beside the quantized one, of the same code, as the other may be of another version.
        code = path.name.rpartition("-")[2]
        trained = path.with_name(f"{run.trained.label}-{run.trained.key}-{code}")
        config = dataclasses.replace(run.config, output_dir=trained, overwrite=True)
        finish(trained, config, train(config))
    recipe = run.recipe
    numbers = evaluate_run(
        EvalConfig(
            run=trained,
            device=recipe.device,
            quantizer=recipe.quantizer,
            activations=recipe.activations,
        )
    )
    scores = {name: value for name, value in numbers.items() if name not in ("run", "step")}
    return training | {"extra_forwards": 0} | scores
