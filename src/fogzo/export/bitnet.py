"""The folder format of BitNet in transformers: ternary weights, four outputs to a byte.

Its layers round their inputs to 8 bits per token. ``bitlinear`` unpacks the weights in every
forward pass and keeps two bits of each in memory; the variant ``autobitlinear`` unpacks them once.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fogzo.export.hub_folder import linear_layers_in_float, write_hub_folder
from fogzo.export.packing import pack_digits, unpack_digits
from fogzo.export.source import Source
from fogzo.export.verify import ReadBack, answer


def write(source: Source, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    linear_class = _linear_class(source)
    tensors: dict[str, Tensor] = {}
    for name, layer in source.layers.items():
        weight = layer.weight
        tensors[f"{name}.weight"] = pack_quarters(weight.unsigned())
        scale = weight.scale.reshape(1)
        bias = getattr(layer.module, "bias", None)
        if linear_class == "bitlinear":
            scale = weight.divisor().reshape(1)
        elif bias is not None:
            # It multiplies what it has added the bias to.
            tensors[f"{name}.bias"] = (bias.detach() / scale).to(bias.dtype)
        tensors[f"{name}.weight_scale"] = scale.to(weight.dtype)
    config = {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": linear_layers_in_float(source),
    }
    write_hub_folder(source, folder, tensors, config)


def read_back(source: Source, folder: Path) -> ReadBack:
    """What transformers makes of it.

    Its ``bitlinear`` has no weights, but divides what it makes of integers. What they then stand
    for is in float32, as half precision would hide by how much a divisor was rounded.
    """
    import accelerate  # noqa: F401  # transformers would ask for it in a longer way

    model = cast(Any, type(source.model)).from_pretrained(folder)
    weights = {name: _weight(model.get_submodule(name), source, name) for name in source.layers}

    def call(example: Any) -> Tensor:
        with torch.compiler.set_stance("force_eager"):  # its layers compile themselves
            return answer(model, example)

    return ReadBack("transformers", weights, call)


def pack_quarters(u: Tensor) -> Tensor:
    """Rows of trits, four rows to one of bytes: those that are a quarter of all rows apart.

    >>> pack_quarters(torch.tensor([[1], [2], [0], [1]]))
    tensor([[73]], dtype=torch.uint8)
    """
    outputs, inputs = u.shape
    return pack_digits(u.reshape(4, -1).T, 4).reshape(outputs // 4, inputs)


def _linear_class(source: Source) -> str:
    return source.options.variant or "bitlinear"


def _weight(layer: Any, source: Source, name: str) -> Tensor:
    if _linear_class(source) == "autobitlinear":
        return cast(Tensor, layer.weight * layer.weight_scale)
    trained = source.layers[name].weight
    quarters = unpack_digits(layer.weight.reshape(-1, 1), 4, 4).T
    integers = quarters.reshape(trained.integers.shape).float() - 1
    return integers / layer.weight_scale.float()
