"""What a training step of each row takes, by interleaved timing."""

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from fogzo_lab.interleaved import take_turns
from fogzo_lab.options import deferred_checks
from fogzo_lab.system.devices import synchronize
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.loop import training_step
from fogzo_lab.training.method_config import MethodConfig
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
        steps: Steps per turn, about: a turn holds as many probes as any other of its row.
        limit: Seconds to measure for, about: slow steps get shorter turns, and fewer of them.
    """
    phases = {name: phases_of(config) for name, config in configs.items()}
    alike = dict.fromkeys(part for parts in phases.values() for part, _ in parts)
    names = {part: f"part {number}" for number, part in enumerate(alike)}
    some = next(iter(configs.values()))
    with join_ranks(some.device) as ranks, own_random_streams(some.seed):
        trainings = {name: _endless(part, ranks) for part, name in names.items()}
        turns = {name: partial(_turn, training) for name, training in trainings.items()}
        try:
            for turn in turns.values():
                turn(1)  # warm up
            each = sum(turn(1) for turn in turns.values())
            period = math.lcm(*(part.probe_every for part in alike))
            steps = min(steps, int(limit / (_FEWEST_ROUNDS * each)))
            steps = max(1, steps // period) * period
            rounds = max(_FEWEST_ROUNDS, min(rounds, int(limit / (steps * each))))
            step = take_turns(turns, dict.fromkeys(turns, steps), rounds).seconds()
        finally:
            for training in trainings.values():
                training.windows.close()
    return {
        name: configs[name].max_steps * sum(share * step[names[part]] for part, share in parts)
        for name, parts in phases.items()
    }


def phases_of(config: TrainConfig) -> list[tuple[TrainConfig, float]]:
    """Runs whose steps are all alike, and which fraction of a run's steps are like theirs.

    A run changes where its probes, its quantization or the pull to the grid begin.
    """
    probing = max(config.start, config.quantize_from)
    method = config.method
    pulling = method.options.get("start", 0.0)
    bounds = sorted({0.0, 1.0, config.quantize_from, probing, pulling})
    found = []
    for begin, end in itertools.pairwise(bounds):
        acts = begin >= pulling
        with deferred_checks():  # a float phase alone may not be averaged, as part of a run it may
            alike = replace(
                config,
                start=0.0,
                estimator=config.estimator if begin >= probing else "ste",
                quantize_from=0.0 if begin >= config.quantize_from else 1.0,
                method=replace(method, start=0.0 if "start" in method.options else None)
                if acts
                else MethodConfig(),
            )
        found.append((alike, end - begin))
    return found


def _endless(config: TrainConfig, ranks: Ranks) -> Training:
    """A training whose turns may go on past the run's end, in float if it is in float."""
    training = Training(config, ranks)
    if config.quantize_from == 1:
        training.methods.switch = None
    return training


def _turn(training: Training, steps: int) -> float:
    """Train on for some steps; the seconds they took."""
    seconds = 0.0
    for _ in range(steps):
        window = training.next_window()
        synchronize(training.ranks.device)
        began = time.perf_counter()
        training_step(training, window)
        synchronize(training.ranks.device)  # which still computes what the optimizer does
        seconds += time.perf_counter() - began
    return seconds
