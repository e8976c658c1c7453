"""How many input values of each layer lie beyond the levels of its activation quantizer."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fogzo.layers import QuantizedLayer, QuantizedWeight
from fogzo.probing.lender import Lender
from fogzo.quantizers.step_sizes import positive_step_size


def clipped_inputs(
    layers: Mapping[str, Sequence[QuantizedLayer]],
    weights: Sequence[QuantizedWeight],
    forward: Callable[[], object],
) -> dict[str, float]:
    """The share of input values that are clipped, by weight, in one forward pass.

    It runs without gradient and in the mode that the model is in. Buffers, modes and random
    streams come back as they were, and a compiled model runs uncompiled.

    Args:
        layers: To look at, tied ones together, of which the worst counts; those that take their
            inputs in float are left out.
        weights: All of the model, whose records name it.
        forward: Runs the model.
    """
    counts = [
        (name, layer, [0, 0])
        for name, tied in layers.items()
        for layer in tied
        if layer.activation_quantizer is not None
    ]
    if not counts:
        return {}
    lender = Lender(weights)
    with torch.no_grad(), ExitStack() as stack:
        for _, layer, count in counts:
            stack.enter_context(_hooked(layer, partial(_count, count)))
        stack.enter_context(lender.lend([], copy=False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes seconds to load
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        lender.evaluate(lambda: _nothing(forward()))
    worst: dict[str, float] = {}
    for name, _, (clipped, seen) in counts:
        if seen:
            worst[name] = max(worst.get(name, 0.0), clipped / seen)
    return worst


def _nothing(output: object) -> float:
    return 0.0


@contextmanager
def _hooked(layer: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _count(counts: list[int], layer: QuantizedLayer, args: tuple[Any, ...]) -> None:
    quantizer, step = layer.activation_quantizer, layer.input_step
    if quantizer is None or not args or not args[0].numel():
        return
    if step is not None:
        if not bool(step.isfinite().all()):
            return  # not measured yet
        if layer.input_step_knee is not None:
            step = positive_step_size(step, layer.input_step_knee)
    x: Tensor = args[0]
    features = x.movedim(1 - layer.weight.dim(), -1)
    rows = quantizer.in_step_sizes(features.reshape(-1, features.shape[-1]), step)
    grid, reach = quantizer.grid, quantizer.grid.spacing / 2
    counts[0] += int(((rows < grid.low - reach) | (rows > grid.high + reach)).sum())
    counts[1] += rows.numel()
