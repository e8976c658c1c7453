"""The gain of `torch.compile`: the same steps with the network compiled and as it is."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch

from fogzo import FogzoEstimator
from fogzo_lab.bench.cases import Case, attempt, timed
from fogzo_lab.bench.config import BenchConfig, Suite
from fogzo_lab.bench.sections.steps import NETWORKS, Make
from fogzo_lab.bench.stepping import Steps
from fogzo_lab.bench.timing import time_in_turns

NAMES: dict[Suite, tuple[str, ...]] = {
    "tiny": ("small MLP",),
    "quick": (),  # to compile one takes longer than everything else
    "full": ("wide MLP", "LLaMA", "ResNet"),
}
"""The networks that are compiled."""
_FIRST_STEPS = 3
"""Steps in which the compiler sees the network with and without gradients."""


def run(config: BenchConfig, device: torch.device) -> Iterator[Case]:
    """One case per network."""
    for name in NAMES[config.suite]:
        torch.compiler.reset()  # earlier networks would count towards its limit of compilations
        make = NETWORKS[config.suite][name]
        yield attempt(name, {}, partial(measure, make, config, device))


def measure(make: Make, config: BenchConfig, device: torch.device) -> Case:
    """STE and FOGZO steps, eager and compiled, interleaved."""
    eager, compiled = Steps(make(device)), Steps(make(device))
    alternatives: dict[str, Callable[[], None]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, of its own parts
        compiled.network.model.compile(dynamic=False)
        for mode, steps in (("eager", eager), ("compiled", compiled)):
            estimator = FogzoEstimator(steps.network.weights)
            alternatives[f"STE step, {mode}"] = steps.ste
            alternatives[f"FOGZO step, {mode}"] = partial(steps.refined, estimator)
        for step in alternatives.values():
            for _ in range(_FIRST_STEPS):
                step()
    # From here on a step that recompiles fails, which its row reports.
    with torch.compiler.set_stance("fail_on_recompile"):
        turns = time_in_turns(alternatives, config.limits, device)
    return timed(
        eager.network.name,
        turns,
        {
            f"{kind}, compiled / eager": turns.ratio(f"{kind}, compiled", f"{kind}, eager")
            for kind in ("STE step", "FOGZO step")
        },
        {"quantized_weights": eager.network.num_weights},
    )
