"""What a FOGZO step needs of memory beyond an STE step, in units of the quantized weights."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fogzo import FogzoEstimator
from fogzo_lab.bench.cases import Case, attempt
from fogzo_lab.bench.config import BenchConfig, Suite
from fogzo_lab.bench.memory import peak_bytes
from fogzo_lab.bench.sections.steps import NETWORKS, Make
from fogzo_lab.bench.stepping import Steps

_LEFT_OUT = {"wide MLP, large batch"}
"""The batch does not change what the estimator holds."""


def run(config: BenchConfig, device: torch.device) -> Iterator[Case]:
    """One case per network, the same as those whose steps are timed."""
    for name, make in _networks(config.suite).items():
        yield attempt(name, {}, partial(measure, make, device))


def measure(make: Make, device: torch.device) -> Case:
    """Peaks of steps of each kind, and how many copies of the weights FOGZO's are higher."""
    network = make(device)
    steps = Steps(network)
    steps.ste()  # the optimizer's own state is none of the difference
    plain = _peak(steps, steps.ste, device)
    copies = {}
    kinds: dict[str, dict[str, Any]] = {
        "default": {},
        "redrawn": {"keep_noise": False},
        "lean": {"lean": True},
    }
    for name, options in kinds.items():
        estimator = FogzoEstimator(network.weights, **options)
        peak = _peak(steps, partial(steps.refined, estimator), device)
        copies[f"{name}_copies"] = (peak - plain) / network.weight_bytes
    return Case(
        name=network.name,
        facts={
            "quantized_weights": network.num_weights,
            "weight_bytes": network.weight_bytes,
            "ste_peak_bytes": plain,
            **copies,
        },
    )


def _peak(steps: Steps, step: Callable[[], None], device: torch.device) -> int:
    """The peak of two steps: what the first leaves behind is there during the second."""
    steps.forget_gradients()

    def twice() -> None:
        step()
        step()

    return peak_bytes(twice, device)


def _networks(suite: Suite) -> dict[str, Make]:
    return {name: make for name, make in NETWORKS[suite].items() if name not in _LEFT_OUT}
