"""What a training step of each row takes, by interleaved timing."""

import time
from collections.abc import Mapping
from dataclasses import replace

from fogzo_lab.interleaved import Timed, take_turns
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.loop import training_step
from fogzo_lab.training.parallel import Ranks, join_ranks
from fogzo_lab.training.state import Training, own_random_streams

_FEWEST_ROUNDS = 3


def run_seconds(
    configs: Mapping[str, TrainConfig], rounds: int = 15, steps: int = 20, limit: float = 60.0
) -> dict[str, float]:
    """Training seconds of a whole run of each config.

    Args:
        configs: Runs by name, of the same number of steps.
        rounds: How often each has its turn; the median turn counts.
        steps: Steps per turn.
        limit: Seconds to measure for, about: slow steps get shorter turns, and fewer of them.
    """
    # A run that begins with plain STE is as long as its two parts.
    parts = {name: replace(config, start=0.0) for name, config in configs.items()}
    parts |= {
        f"{name} before": replace(config, start=0.0, estimator="ste")
        for name, config in configs.items()
        if config.start
    }
    some = next(iter(configs.values()))
    with join_ranks(some.device) as ranks, own_random_streams(some.seed):
        turns = {name: _turn(config, ranks) for name, config in parts.items()}
        for turn in turns.values():
            turn(1)  # warm up
        each = sum(turn(1) for turn in turns.values())
        steps = max(1, min(steps, int(limit / (_FEWEST_ROUNDS * each))))
        rounds = max(_FEWEST_ROUNDS, min(rounds, int(limit / (steps * each))))
        step = take_turns(turns, dict.fromkeys(turns, steps), rounds).seconds()
    return {
        name: config.max_steps
        * ((1 - config.start) * step[name] + config.start * step.get(f"{name} before", 0.0))
        for name, config in configs.items()
    }


def _turn(config: TrainConfig, ranks: Ranks) -> Timed:
    """A function that trains on for some steps and returns the seconds they took."""
    training = Training(config, ranks)

    def turn(steps: int) -> float:
        seconds = 0.0
        for _ in range(steps):
            window = training.next_window()
            began = time.perf_counter()
            training_step(training, window)
            seconds += time.perf_counter() - began
        return seconds

    return turn
