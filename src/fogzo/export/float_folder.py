"""The float format: the quantized weights as float numbers, which any reader of the network reads.

Rotations are folded in. The file has the size of the float model.
"""

from pathlib import Path
from typing import cast

from torch import Tensor

from fogzo.export.folder import read_tensors, write_config, write_tensors
from fogzo.export.source import Source
from fogzo.export.verify import ReadBack, answer


def write(source: Source, folder: Path) -> None:
    """Write a model."""
    tensors = source.other_tensors()
    weights = {id(layer.weight): layer.weight.dequantize() for layer in source.layers.values()}
    for name, layer in source.layers.items():
        tensors[f"{name}.weight".lstrip(".")] = weights[id(layer.weight)]
    write_tensors(tensors, folder)
    write_config(source.model, folder)


def read_back(source: Source, folder: Path) -> ReadBack:
    """What `load_state_dict` makes of it, in a model that ties its own weights."""
    model = source.baked()
    tensors = read_tensors(folder)
    for name, tensor in model.state_dict().items():
        if name not in tensors:  # tied to one that is there
            same = tensor.data_ptr()
            owner = next(n for n, t in model.state_dict().items() if t.data_ptr() == same)
            tensors[name] = tensors[owner]
    model.load_state_dict(tensors)
    layers = dict(model.named_modules())
    weights = {name: cast(Tensor, layers[name].weight) for name in source.layers}
    return ReadBack("torch load_state_dict", weights, lambda example: answer(model, example))
