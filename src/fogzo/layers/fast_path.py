"""Transformer encoders' fast path in eval mode, which would go around quantized layers."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from fogzo.layers.quantized_input import QuantizedInput
from fogzo.layers.quantized_layer import QuantizedLayer

# Torch's own marks of an encoder layer without a fast path, and of an encoder without the format of
# that path.
_WITHOUT_FAST_PATH: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def leave_fast_path(model: nn.Module, kind: type[nn.Module] = QuantizedLayer) -> None:
    """Make transformer encoders call their layers of this kind.

    In eval mode they would read the weights alone, raw, and take inputs in float.
    """
    for module, name, value in _encoders(model):
        if _holds(module, kind):
            module.__dict__.setdefault("_fast_path", getattr(module, name))
            setattr(module, name, value)


def give_fast_path_back(model: nn.Module) -> None:
    """Undo `leave_fast_path` where no layer is left that quantizes its weight or input."""
    for module, name, _ in _encoders(model):
        if "_fast_path" in module.__dict__ and not _holds(module, QuantizedInput):
            setattr(module, name, module.__dict__.pop("_fast_path"))


def _encoders(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Transformer encoders and their layers, each with its mark and what it then holds."""
    for module in model.modules():
        for kind, (name, value) in _WITHOUT_FAST_PATH.items():
            if isinstance(module, kind):
                yield module, name, value


def _holds(module: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(layer, kind) for layer in module.modules())
