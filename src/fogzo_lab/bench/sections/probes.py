"""What kinds of probes cost: many at once, fewer and cheaper ones, and MeZO's in place."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fogzo import FogzoEstimator, SpsaEstimator, every
from fogzo.probing.stacked import chunk_size
from fogzo_lab.bench import mezo
from fogzo_lab.bench.cases import Case, Facts
from fogzo_lab.bench.comparing import compare
from fogzo_lab.bench.config import BenchConfig, Suite
from fogzo_lab.bench.networks import Network, mlp
from fogzo_lab.bench.stepping import Steps
from fogzo_lab.system.devices import drawing_gpus

SAMPLES: dict[Suite, tuple[int, ...]] = {
    "tiny": (2,),
    "quick": (10, 100),
    "full": (10, 100, 1000),
}
"""Samples n of the probes at once."""
_SAMPLES_IN_PLACE: dict[Suite, tuple[int, ...]] = {"tiny": (2,), "quick": (1,), "full": (1, 8)}
_INTERVAL = 4
_PART = 8
# The same for all, so that none differs by its default.
_NOISE_SHARE = 1e-6


def run(config: BenchConfig, device: torch.device) -> Iterator[Case]:
    """The cases of all three comparisons."""
    tiny = config.suite == "tiny"
    small = mlp((784, 10, 10), 16 if tiny else 128, device)
    for n in SAMPLES[config.suite]:
        yield from at_once(small, n, config, device)
    wide = mlp((784, 16, 10) if tiny else (784, 1024, 256, 10), 16 if tiny else 128, device)
    yield from cheaper(wide, config, device)
    for network in (small, wide):
        for n in _SAMPLES_IN_PLACE[config.suite]:
            yield from in_place(network, n, config, device)


def at_once(network: Network, n: int, config: BenchConfig, device: torch.device) -> Iterator[Case]:
    """A FOGZO step of n samples, its probes one by one or together, and what both must do."""
    steps = Steps(network)
    makers = {
        "one by one": lambda: _fogzo(steps, num_samples=n),
        "at once": lambda: _fogzo(steps, num_samples=n, evaluate="stacked"),
        "products of input and weights alone": lambda: _products(network, 2 * n),
    }
    title = f"{network.name}, n = {n}"
    facts: Facts = {"kind": "at once", "num_samples": n}
    return compare(title, makers, "one by one", facts, config.limits, device)


def _products(network: Network, forwards: int) -> Callable[[], None]:
    """The matrix products of so many forward passes, as many at once as stacked probes take.

    They bound what any way to evaluate probes in the network's own precision can cost. The first
    layer's input is the same for all, so that its weights, side by side, are one matrix.
    """
    layers = [module for module in network.model.modules() if isinstance(module, nn.Linear)]
    calls = math.ceil(forwards / (2 * chunk_size(network.weights)))
    size = math.ceil(forwards / calls)
    operands = []
    for layer in layers:
        weights = layer.weight.detach().expand(size, *layer.weight.shape).clone()
        x = torch.randn(network.batch, layer.in_features, device=weights.device)
        first = layer is layers[0]
        operands.append((x, weights.flatten(0, 1).T if first else weights.transpose(1, 2)))

    def products() -> None:
        for _ in range(calls):
            for x, weights in operands:
                torch.matmul(x, weights)

    return products


def cheaper(network: Network, config: BenchConfig, device: torch.device) -> Iterator[Case]:
    """Every way to pay less, over the default step; the STE step is what no probe can undercut."""
    steps = Steps(network)

    def in_half_precision() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return network.loss()

    def on_a_part() -> Tensor:
        return network.loss_of(max(1, network.batch // _PART))

    now_and_then = every(_INTERVAL, _NOISE_SHARE)
    makers: dict[str, Callable[[], Callable[[], None]]] = {
        "default FOGZO step": lambda: _fogzo(steps),
        "one-sided": lambda: _fogzo(steps, one_sided=True),
        f"every {_INTERVAL}th step": lambda: _fogzo(steps, noise_share=now_and_then),
        f"1/{_PART} of the batch": lambda: _fogzo(steps, on_a_part),
        "bf16 autocast": lambda: _fogzo(steps, in_half_precision),
        "lean": lambda: _fogzo(steps, evaluate="lean"),
        "STE step": lambda: steps.ste,
    }
    # As many steps a call as hold one that probes, where few steps do.
    repeated = {name: lambda make=make: _several(make()) for name, make in makers.items()}
    facts: Facts = {"kind": "cheaper", "num_samples": 1}
    title, base = f"{network.name}, n = 1", "default FOGZO step"
    return compare(title, repeated, base, facts, config.limits, device, steps_per_call=_INTERVAL)


def in_place(network: Network, n: int, config: BenchConfig, device: torch.device) -> Iterator[Case]:
    """A gradient by n-SPSA, from this package and by the baseline that edits weights in place."""
    weights = network.weights
    estimator = SpsaEstimator(weights, num_samples=n)

    def baseline(draw: mezo.Draw) -> Callable[[], None]:
        return lambda: mezo.write_gradients_(weights, network.loss, num_samples=n, draw=draw)

    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "SpsaEstimator": lambda: lambda: estimator.refine_grads_(network.loss),
        "MeZO, same noise": lambda: baseline(mezo.own_law),
        "MeZO, normal noise": lambda: baseline(mezo.normal),
    }
    facts: Facts = {"kind": "MeZO", "num_samples": n}
    with torch.random.fork_rng(drawing_gpus()):  # which the baseline reseeds
        title = f"{network.name}, n-SPSA, n = {n}"
        yield from compare(title, makers, "SpsaEstimator", facts, config.limits, device)


def _fogzo(
    steps: Steps, closure: Callable[[], Tensor] | None = None, **options: Any
) -> Callable[[], None]:
    """A step of FOGZO with these options, to call again and again."""
    estimator = FogzoEstimator(steps.network.weights, **{"noise_share": _NOISE_SHARE} | options)
    return lambda: steps.refined(estimator, closure)


def _several(step: Callable[[], None]) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(_INTERVAL):
            step()

    return steps
