"""The cost of quantizing a layer's weight: forward and backward pass over the float layer's."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fogzo_lab.bench.cases import Case
from fogzo_lab.bench.comparing import compare
from fogzo_lab.bench.config import BenchConfig, Suite
from fogzo_lab.bench.peers import FLOAT, LAYERS, Layer, Make


@dataclass(frozen=True)
class Shape:
    """A layer and its input."""

    name: str
    layer: Callable[[], Layer]
    input_shape: tuple[int, ...]


def _linear(inputs: int, outputs: int, batch: int) -> Shape:
    name = f"Linear {inputs} x {outputs}, batch {batch}"
    return Shape(name, lambda: nn.Linear(inputs, outputs), (batch, inputs))


def _convolution(channels: int, size: int, batch: int) -> Shape:
    name = f"Conv2d {channels} x {channels} x 3 x 3 on {size} x {size}, batch {batch}"
    shape = (batch, channels, size, size)
    return Shape(name, lambda: nn.Conv2d(channels, channels, 3, padding=1), shape)


_LINEAR = (_linear(256, 256, 64), _linear(1024, 1024, 256))
_CONVOLUTION = _convolution(64, 16, 16)
SHAPES: dict[Suite, tuple[Shape, ...]] = {
    "tiny": (_linear(8, 8, 4), _convolution(4, 4, 2)),
    "quick": (*_LINEAR, _CONVOLUTION),
    "full": (*_LINEAR, _linear(4096, 1024, 64), _CONVOLUTION),
}


def run(config: BenchConfig, device: torch.device) -> Iterator[Case]:
    """One case per shape, mode and way to quantize; the full suite compiles the layers too."""
    modes = ("eager", "compiled") if config.suite == "full" else ("eager",)
    for shape, mode in itertools.product(SHAPES[config.suite], modes):
        if mode == "compiled":
            torch.compiler.reset()  # earlier shapes would count towards its limit of compilations
        plain = shape.layer().to(device)
        makers = {
            name: partial(_forward_and_backward, plain, make, shape, mode)
            for name, make in LAYERS.items()
        }
        facts = {"layer": shape.name, "mode": mode}
        title = f"{shape.name}, {mode}"
        yield from compare(title, makers, FLOAT, facts, config.limits, device)


def _forward_and_backward(
    plain: Layer, make: Make, shape: Shape, mode: str
) -> Callable[[], object]:
    """A pass as in the middle of a network: gradients of the input and of all parameters."""
    layer = make(copy.deepcopy(plain))
    forward = torch.compile(layer, dynamic=False) if mode == "compiled" else layer
    device = plain.weight.device
    x = torch.randn(shape.input_shape, device=device, requires_grad=True)
    inputs = [x, *layer.parameters()]
    above = torch.randn_like(plain(x))

    def both() -> object:
        return torch.autograd.grad(forward(x), inputs, above)

    return both
