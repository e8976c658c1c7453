"""Which quantizer each layer's inputs get, from what `quantize_` was given."""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fogzo.layers.experts import ExpertMatrices
from fogzo.quantizers import Quantizer
from fogzo.wording import listed

logger = logging.getLogger(__name__)

Activations = Quantizer | Callable[[nn.Module, str], Quantizer | None] | None


def activation_quantizers(
    layers: Mapping[str, nn.Module], activations: Activations
) -> dict[str, Quantizer | None]:
    """The activation quantizer of each layer to be quantized.

    Raises:
        ValueError: If one is no quantizer or does not fit its layer.
    """
    if activations is not None and not isinstance(activations, Quantizer):
        try:
            inspect.signature(activations).bind(nn.Identity(), "name")
        except TypeError:
            raise ValueError(
                "activations must be a fogzo.Quantizer, or a function of (module, name) that "
                f"returns one or None, got {activations!r:.80}: for example "
                "fogzo.quantize_(model, fogzo.lsq(2), activations=fogzo.lsq(2))"
            ) from None
    experts = [name for name, layer in layers.items() if isinstance(layer, ExpertMatrices)]
    if experts and activations is not None:
        logger.warning(
            "the inputs of fused experts, %s, stay in float: one forward computes with all of "
            "them, and what lies between is out of reach",
            listed(experts),
        )
    quantizers: dict[str, Quantizer | None] = {}
    for name, layer in layers.items():
        chosen = activations
        if isinstance(layer, nn.Embedding | ExpertMatrices):
            chosen = None  # its inputs are indices, or within the forward of another module
        elif chosen is not None and not isinstance(chosen, Quantizer):
            chosen = chosen(layer, name)
        if chosen is not None:
            _check(name, layer, chosen)
        quantizers[name] = chosen
    return quantizers


def _check(name: str, layer: nn.Module, quantizer: object) -> None:
    if not isinstance(quantizer, Quantizer):
        raise ValueError(
            f"the activation quantizer of {name!r} must be a fogzo.Quantizer or None, got "
            f"{type(quantizer).__name__}: activations=lambda module, name: fogzo.lsq(2)"
        )
    if quantizer.scale.has_state and quantizer.granularity != "tensor":
        raise ValueError(
            f"a {quantizer.scale.kind} step size of activations serves the whole tensor, as the "
            f"number of tokens varies, but {name!r} was given "
            f"granularity={quantizer.granularity!r}: "
            'use granularity="tensor", for example activations=fogzo.lsq(2), or a scale that '
            'measures every input, fogzo.abs_max(8, granularity="token") or fogzo.quest(4)'
        )
    weight: Any = layer.weight
    features = getattr(layer, "in_channels", weight.shape[1 if isinstance(layer, nn.Linear) else 0])
    try:
        quantizer.check_dtype(weight.dtype)
        quantizer.quantize_input(torch.ones(1, features), torch.ones(1, 1))
    except ValueError as error:
        raise ValueError(f"cannot quantize the input of {name!r}: {error}") from None
