"""Measuring the step sizes of activations on inputs of one's choice."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fogzo.collectives import is_sharded
from fogzo.layers.bypasses import warn_of_bypassed_layers
from fogzo.layers.quantizable import require_module
from fogzo.layers.quantized_input import QuantizedInput
from fogzo.wording import listed

logger = logging.getLogger(__name__)


@contextmanager
def calibrate_(model: nn.Module) -> Iterator[None]:
    """Measure the step sizes of activations on what passes through, in any mode.

    ``with fogzo.calibrate_(model): model(x)``. Each becomes the mean over the forward
    passes inside the block (over the calls, if a layer is called several times), and levels become
    unsigned where no input was negative. A measurement overrides earlier and learned ones; step
    sizes that were given (``fogzo.fixed(2, step_size=0.1)``) and dynamic scales have none.
    Across ranks, do it before DDP or ``fully_shard``, on the same inputs everywhere.

    >>> import fogzo, torch
    >>> model = nn.Sequential(nn.ReLU(), nn.Linear(4, 2))
    >>> _ = fogzo.quantize_(model, fogzo.lsq(2), lambda *_: True, activations=fogzo.lsq(2))
    >>> with torch.no_grad(), fogzo.calibrate_(model.eval()):
    ...     _ = model(torch.tensor([[0.5, 1.5, -3.0, 4.0]]))
    >>> round(model[1].input_step.item(), 4)  # 2 mean|x| / sqrt(3), as the largest level is 3
    1.7321
    >>> model[1].activation_quantizer.grid.name
    'uniform2-unsigned'

    Raises:
        ValueError: If no layer quantizes its input, FSDP has sharded the model, or another such
            block is open for one of its layers.
    """
    require_module(model, "with fogzo.calibrate_(model): model(x)")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedInput) and module.activation_quantizer is not None
    }
    if not layers:
        raise ValueError(
            "no layer of this model quantizes its input: "
            "fogzo.quantize_(model, fogzo.lsq(2), activations=fogzo.lsq(2))"
        )
    measuring = {name: layer for name, layer in layers.items() if layer.measures_input}
    if any(is_sharded(layer.weight) for layer in measuring.values()):
        raise ValueError(
            "this model is sharded, and a step size measured now would be lost with the gathered "
            "parameters: call fogzo.calibrate_(model) before fully_shard(model)"
        )
    if begun := [name for name, layer in measuring.items() if layer.is_tallying]:
        raise ValueError(
            f"{listed(begun)} are measured by another fogzo.calibrate_(model) already, and its "
            "inputs would be lost: open one block around all forward passes, with "
            "fogzo.calibrate_(model): model(first); model(second)"
        )
    for layer in measuring.values():
        layer.begin_tally()
    try:
        yield
        missed = [name for name, layer in measuring.items() if not layer.tallied]
        if in_float := [name for name in missed if measuring[name].is_in_float]:
            logger.warning(
                "calibrate_ measured nothing of %s, which compute in float until the switch of "
                "fogzo.methods.quantize_from, where inputs are measured anew anyway: calibrate "
                "once switch.is_quantized",
                ", ".join(in_float),
            )
        elif missed:
            logger.warning("calibrate_ saw no input other than zeros of %s", ", ".join(missed))
        warn_of_bypassed_layers(model)
    finally:
        for layer in measuring.values():
            layer.end_tally()
