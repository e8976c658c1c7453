"""The folder format of vLLM and transformers: integers packed into int32 words, a config group.

Readers have misread files with several config groups, and 3, 5, 6 and 7 bits changed their layout
under the same name. So there is one group here, of 2, 4 or 8 bits.
"""

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fogzo.export import holds
from fogzo.export.hub_folder import linear_layers_in_float, write_hub_folder
from fogzo.export.packing import pack_bits
from fogzo.export.source import InputForm, Source
from fogzo.export.verify import ReadBack, answer


def write(source: Source, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    inputs = next(iter(source.layers.values())).input  # all are alike, but for their steps
    bits = holds.stored(source, next(iter(source.layers)), "compressed-tensors").width  # of all
    group = _group_size(source)
    tensors: dict[str, Tensor] = {}
    for name, layer in source.layers.items():
        weight = layer.weight
        if layer.input is None:
            words = pack_bits(weight.integers.short() + 2 ** (bits - 1), bits)
            tensors[f"{name}.weight_packed"] = words
            tensors[f"{name}.weight_shape"] = torch.tensor(weight.integers.shape)
        else:
            tensors[f"{name}.weight"] = weight.integers
            step = cast(Tensor, layer.input.step)
            tensors[f"{name}.input_scale"] = (step * layer.input.quantizer.grid.spacing).reshape(1)
        # One for each row also where the matrix has one, as vLLM reads no scales of a matrix.
        scale = weight.row_scale()
        groups = 1 if group is None else weight.integers.shape[1] // group
        scale = scale.repeat_interleave(groups // scale.shape[1], 1)
        tensors[f"{name}.weight_scale"] = scale.to(weight.dtype)
    write_hub_folder(source, folder, tensors, _config(source, inputs, bits, group))


def read_back(source: Source, folder: Path) -> ReadBack:
    """What transformers makes of it, which asks compressed-tensors."""
    import compressed_tensors

    model = cast(Any, type(source.model)).from_pretrained(folder)
    model.hf_quantizer.compressor.decompress_model(model)  # as the first forward pass would
    weights = {name: model.get_submodule(name).weight for name in source.layers}
    reader = f"transformers with compressed-tensors {compressed_tensors.__version__}"
    return ReadBack(reader, weights, lambda example: answer(model, example))


def _group_size(source: Source) -> int | None:
    """A group size that divides those of all layers; None for one scale per row."""
    weights = [layer.weight for layer in source.layers.values()]
    if all(weight.group_size is None for weight in weights):
        return None
    return math.gcd(*(weight.group_size or weight.integers.shape[1] for weight in weights))


def _config(
    source: Source, inputs: InputForm | None, bits: int, group: int | None
) -> dict[str, Any]:
    of_weights = _args(bits, "channel" if group is None else "group") | {"group_size": group}
    of_inputs = None
    if inputs is not None:
        of_inputs = _args(inputs.quantizer.grid.num_levels.bit_length() - 1, "tensor")
    scheme = {
        "targets": ["Linear"],
        "weights": of_weights,
        "input_activations": of_inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if inputs is None else "int-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": linear_layers_in_float(source),
        "config_groups": {"group_0": scheme},
    }


def _args(bits: int, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": False,
    }
