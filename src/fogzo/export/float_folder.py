"""The float format: the quantized weights as float numbers, which any reader of the network reads.

Rotations are folded in. The file has the size of the float model. Models of transformers are named
as on the hub, so that programs other than transformers find their tensors.
"""

from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from fogzo.export.folder import WEIGHTS, read_tensors, write_config, write_tensors
from fogzo.export.hub_folder import write_hub_folder
from fogzo.export.source import Source
from fogzo.export.verify import ReadBack, answer


def write(source: Source, folder: Path) -> None:
    """Write a model."""
    baked = {id(layer.weight): layer.weight.dequantize() for layer in source.layers.values()}
    weights = {
        f"{name}.weight".lstrip("."): baked[id(layer.weight)]
        for name, layer in source.layers.items()
    }
    if source.of_transformers:
        write_hub_folder(source, folder, weights)
    else:
        write_tensors(source.other_tensors() | weights, folder)
        write_config(source.model, folder)


def read_back(source: Source, folder: Path) -> ReadBack:
    """What transformers makes of it, or safetensors where tensors are tied, or torch."""
    from safetensors.torch import load_model

    own: Any = source.model
    if source.of_transformers:
        return _as_read("transformers", type(own).from_pretrained(folder), source)
    model = source.baked()
    tensors = read_tensors(folder)
    if model.state_dict().keys() == tensors.keys():
        model.load_state_dict(tensors)
        return _as_read("torch load_state_dict", model, source)
    load_model(model, folder / WEIGHTS)  # knows that tied tensors are there once
    return _as_read("safetensors.torch.load_model", model, source)


def _as_read(reader: str, model: nn.Module, source: Source) -> ReadBack:
    layers = dict(model.named_modules())
    weights = {name: cast(Tensor, layers[name].weight) for name in source.layers}
    return ReadBack(reader, weights, lambda example: answer(model, example))
