"""What a FOGZO step costs beyond an STE step, in units of the forward passes it must make.

The overhead ratio is (FOGZO step - STE step) / (2n forward passes without gradients): 1 where
nothing else costs time. A step whose probes cost nothing measures the estimator's own work apart
from what forward passes cost when they alternate with it.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch

from fogzo import FogzoEstimator
from fogzo_lab.bench.cases import Case, attempt, timed
from fogzo_lab.bench.config import BenchConfig, Suite
from fogzo_lab.bench.networks import Network, llama, mlp, resnet
from fogzo_lab.bench.stepping import Steps
from fogzo_lab.bench.timing import time_in_turns

Make = Callable[[torch.device], Network]

_QUICK: dict[str, Make] = {
    "small MLP": lambda device: mlp((784, 10, 10), 128, device),
    "wide MLP": lambda device: mlp((784, 1024, 256, 10), 128, device),
    "wide MLP, large batch": lambda device: mlp((784, 1024, 256, 10), 512, device),
    "LLaMA": lambda device: llama(192, 3, 8, 128, device),
    "ResNet": lambda device: resnet((32, 64, 128, 256), 128, device),
}
NETWORKS: dict[Suite, dict[str, Make]] = {
    "tiny": {
        "small MLP": lambda device: mlp((784, 10, 10), 16, device),
        "LLaMA": lambda device: llama(32, 1, 2, 8, device),
        "ResNet": lambda device: resnet((8, 16), 2, device),
    },
    "quick": _QUICK,
    "full": _QUICK | {"larger LLaMA": lambda device: llama(384, 4, 32, 128, device)},
}
"""Networks by what they are called until they are built."""


def target(num_weights: int) -> float:
    """The overhead ratio that this project aims at, by the number of quantized weights."""
    if num_weights >= 5_000_000:
        return 1.05
    return 1.15 if num_weights >= 500_000 else 1.3


def run(config: BenchConfig, device: torch.device) -> Iterator[Case]:
    """One case per network."""
    for name, make in NETWORKS[config.suite].items():
        yield attempt(name, {}, partial(measure, make, config, device))


def measure(make: Make, config: BenchConfig, device: torch.device) -> Case:
    """The step, its floor and its parts, interleaved."""
    network = make(device)
    steps = Steps(network)
    estimator = FogzoEstimator(network.weights)
    some_weight = network.weights[0].param.detach().view(-1)[0]
    steps.refined(estimator)  # the first step's checks are not for a loss that is none
    with warnings.catch_warnings():  # free probes agree with no gradient
        warnings.simplefilter("ignore", RuntimeWarning)
        turns = time_in_turns(
            {
                "STE step": steps.ste,
                "forwards": steps.forwards,
                "floor": steps.floor,
                "FOGZO step": lambda: steps.refined(estimator),
                "free probes": lambda: steps.refined(estimator, lambda: some_weight),
            },
            config.limits,
            device,
        )
    overhead = turns.spread(lambda s: (s["FOGZO step"] - s["STE step"]) / s["forwards"])
    own_work = turns.spread(lambda s: (s["free probes"] - s["STE step"]) / s["forwards"])
    return timed(
        network.name,
        turns,
        {
            "overhead": overhead,
            "own work": own_work,
            "FOGZO / floor": turns.ratio("FOGZO step", "floor"),
            "FOGZO / STE": turns.ratio("FOGZO step", "STE step"),
        },
        {
            "quantized_weights": network.num_weights,
            "num_samples": estimator.num_samples,
            "target": target(network.num_weights),
        },
    )
