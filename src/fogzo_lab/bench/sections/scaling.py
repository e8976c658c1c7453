"""How the cost of a FOGZO step grows: with weights, samples, batch and ranks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from fogzo import FogzoEstimator
from fogzo_lab.bench.cases import Case, Facts, attempt, timed
from fogzo_lab.bench.config import BenchConfig, Suite
from fogzo_lab.bench.networks import Network, mlp
from fogzo_lab.bench.ranks import RankSettings, time_on_ranks
from fogzo_lab.bench.sections import memory
from fogzo_lab.bench.stepping import Steps
from fogzo_lab.bench.timing import time_in_turns
from fogzo_lab.interleaved import Turns

INPUTS, CLASSES = 784, 10


@dataclass(frozen=True)
class Point:
    """One setting of a perceptron with one hidden layer.

    Attributes:
        width: Of the hidden layer.
        samples: n.
        batch: Examples a step, on each rank.
    """

    width: int = 256
    samples: int = 1
    batch: int = 128


@dataclass(frozen=True)
class Sweeps:
    """What is varied, one at a time, around a middle."""

    middle: Point
    widths: tuple[int, ...]
    samples: tuple[int, ...]
    batches: tuple[int, ...]
    rank_rounds: int
    ranks: tuple[int, ...] = (1, 2)

    def points(self) -> Iterator[tuple[str, int, Point]]:
        """What is varied, its value, and the point."""
        for width in self.widths:
            yield "width", width, replace(self.middle, width=width)
        for samples in self.samples:
            yield "n", samples, replace(self.middle, samples=samples)
        for batch in self.batches:
            yield "batch", batch, replace(self.middle, batch=batch)


SWEEPS: dict[Suite, Sweeps] = {
    "tiny": Sweeps(Point(8, 1, 4), (4, 8), (1, 2), (2, 4), 2),
    "quick": Sweeps(Point(), (16, 256, 2048), (1, 4, 16), (16, 128, 1024), 31),
    "full": Sweeps(Point(), (16, 64, 256, 1024, 4096), (1, 2, 4, 8, 16), (16, 64, 256, 1024), 101),
}


def run(config: BenchConfig, device: torch.device) -> Iterator[Case]:
    """Times against width, n, batch and ranks; memory against width."""
    sweeps = SWEEPS[config.suite]
    for sweep, value, point in sweeps.points():
        name, facts = f"{sweep} {value}", _facts(sweep, value)
        yield attempt(name, facts, partial(_time, name, facts, point, config, device))
    for ranks in sweeps.ranks:
        name, facts = f"ranks {ranks}", _facts("ranks", ranks)
        yield attempt(name, facts, partial(_time_ranks, name, facts, ranks, config))
    for width in sweeps.widths:
        name, facts = f"memory, width {width}", _facts("memory", width)
        point = replace(sweeps.middle, width=width)
        yield attempt(name, facts, partial(_memory, name, facts, point, device))


def _facts(sweep: str, value: int) -> Facts:
    return {"sweep": sweep, "value": value}


def _time(name: str, facts: Facts, point: Point, config: BenchConfig, device: torch.device) -> Case:
    network = _network(point, device)
    steps = Steps(network)
    estimator = FogzoEstimator(network.weights, num_samples=point.samples)
    turns = time_in_turns(
        {"STE step": steps.ste, "FOGZO step": lambda: steps.refined(estimator)},
        config.limits,
        device,
    )
    return _case(name, {**facts, "quantized_weights": network.num_weights}, turns)


def _time_ranks(name: str, facts: Facts, ranks: int, config: BenchConfig) -> Case:
    """Always on CPUs, as a machine seldom has two accelerators; each rank has a whole batch."""
    sweeps = SWEEPS[config.suite]
    point = sweeps.middle
    settings = RankSettings(
        ranks=ranks,
        widths=(INPUTS, point.width, CLASSES),
        batch=point.batch,
        threads=config.threads,
        rounds=min(sweeps.rank_rounds, config.limits.rounds),
        calls=4,
    )
    return _case(name, facts, time_on_ranks(settings))


def _case(name: str, facts: Facts, turns: Turns) -> Case:
    return timed(name, turns, {"FOGZO / STE": turns.ratio("FOGZO step", "STE step")}, facts)


def _memory(name: str, facts: Facts, point: Point, device: torch.device) -> Case:
    case = memory.measure(partial(_network, point), device)
    return Case(name=name, facts={**case.facts, **facts})


def _network(point: Point, device: torch.device) -> Network:
    return mlp((INPUTS, point.width, CLASSES), point.batch, device)
