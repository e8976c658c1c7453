"""What a training step of each row takes, measured so that a busy moment hits all rows alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from fogzo.recipes.config import TrainConfig
from fogzo.recipes.data import load_images
from fogzo.recipes.train import (
    build_estimator,
    build_model,
    build_optimizer,
    shuffled_batches,
    training_step,
)


def run_seconds(
    configs: Mapping[str, TrainConfig], rounds: int = 15, steps: int = 20
) -> dict[str, float]:
    """Training seconds of a whole run of each config, from steps taken in turns.

    Args:
        configs: Runs by name, of the same number of steps.
        rounds: How often each has its turn; the median turn counts.
        steps: Steps a turn.
    """
    # A run that begins with plain STE is as long as its two parts.
    parts = {name: replace(config, start=0.0) for name, config in configs.items()}
    parts |= {
        f"{name} before": replace(config, start=0.0, estimator="ste")
        for name, config in configs.items()
        if config.start
    }
    turns = {name: _turn(config, steps) for name, config in parts.items()}
    for turn in turns.values():
        turn()  # warm up
    measured = [{name: turn() for name, turn in turns.items()} for _ in range(rounds)]
    step = {name: statistics.median(m[name] for m in measured) / steps for name in turns}
    return {
        name: config.max_steps
        * ((1 - config.start) * step[name] + config.start * step.get(f"{name} before", 0.0))
        for name, config in configs.items()
    }


def _turn(config: TrainConfig, steps: int) -> Callable[[], float]:
    """A function that trains on for some steps and returns the seconds they took."""
    data = load_images(config.data)
    model = build_model(config, data)
    estimator = build_estimator(config, model)
    optimizer, scheduler = build_optimizer(config, model)
    batches = shuffled_batches(data.train, config.batch_size, config.seed)

    def turn() -> float:
        seconds = 0.0
        for _ in range(steps):
            images, labels = next(batches)
            began = time.perf_counter()
            training_step(model, estimator, optimizer, images, labels)
            scheduler.step()
            seconds += time.perf_counter() - began
        return seconds

    return turn
