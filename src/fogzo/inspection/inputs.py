"""How many input values of each layer lie beyond the levels of its activation quantizer."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fogzo.layers import QuantizedLayer, QuantizedWeight
from fogzo.probing.lender import Lender
from fogzo.quantizers.step_sizes import positive_step_size

Layers = Sequence[tuple[str, QuantizedLayer]]


def clipped_inputs(
    layers: Layers, weights: Sequence[QuantizedWeight], forward: Callable[[], object]
) -> dict[str, float]:
    """The share of input values that are clipped, by layer, in one forward pass.

    It runs without gradient and in the mode that the model is in. Buffers, modes and random
    streams come back as they were, and a compiled model runs uncompiled.

    Args:
        layers: To look at; those that take their inputs in float are left out.
        weights: All of the model, whose records name it.
        forward: Runs the model.
    """
    counts = {name: [0, 0] for name, layer in layers if layer.activation_quantizer is not None}
    if not counts:
        return {}
    lender = Lender(weights)
    with torch.no_grad(), ExitStack() as stack:
        for name, layer in layers:
            if name in counts:
                stack.enter_context(_hooked(layer, partial(_count, counts[name])))
        stack.enter_context(lender.lend([], copy=False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes seconds to load
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        lender.evaluate(lambda: _nothing(forward()))
    return {name: clipped / seen for name, (clipped, seen) in counts.items() if seen}


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
