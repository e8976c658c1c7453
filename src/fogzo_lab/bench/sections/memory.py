"""The memory of a FOGZO step beyond an STE step, in units of the quantized weights."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fogzo import FogzoEstimator
from fogzo.probing.measure import Evaluate
from fogzo_lab.bench.cases import Case, attempt
from fogzo_lab.bench.config import BenchConfig, Suite
from fogzo_lab.bench.peak_memory import peak_bytes
from fogzo_lab.bench.sections.steps import NETWORKS, Make
from fogzo_lab.bench.stepping import Steps

_LEFT_OUT = {"wide MLP, large batch"}
"""The memory of the estimator does not depend on the batch."""


def run(config: BenchConfig, device: torch.device) -> Iterator[Case]:
    """One case per network, the same as those whose steps are timed."""
    for name, make in _networks(config.suite).items():
        yield attempt(name, {}, partial(measure, make, device))


def measure(make: Make, device: torch.device) -> Case:
    """Peaks of each kind of step, and the excess of FOGZO's in copies of the weights."""
    network = make(device)
    steps = Steps(network)
    steps.ste()  # so that the optimizer's state is not part of the difference
    plain = _peak(steps, steps.ste, device)
    copies = {}
    kinds: dict[str, Evaluate] = {"default": "in_place", "lean": "lean"}
    for name, evaluate in kinds.items():
        estimator = FogzoEstimator(network.weights, evaluate=evaluate)
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
