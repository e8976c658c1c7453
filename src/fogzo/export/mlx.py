"""The folder that mlx-lm reads: dense bits, and a scale and bias for each group of inputs.

A weight is ``scale * u + bias``. Both products with a step of float16 or bfloat16 are exact in
float32, and so their sum is the trained weight; scales are written in half precision where their
own products are exact in it, else in float32, which is slower on a Mac.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fogzo.export import holds
from fogzo.export.folder import read_tensors, write_config, write_tensors
from fogzo.export.hub_folder import hub_named
from fogzo.export.integers import IntegerWeight
from fogzo.export.packing import pack_bits, unpack_bits
from fogzo.export.source import Source
from fogzo.export.verify import ReadBack

_GROUPS = (128, 64, 32)


def write(source: Source, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    tensors = source.other_tensors()
    layers: dict[str, Any] = {}
    for name, layer in source.layers.items():
        weight, bits = layer.weight, _bits(source, name)
        group = _group(weight)
        called = _hub_name(source, f"{name}.weight").removesuffix(".weight")  # as its tensors are
        layers[called] = {"group_size": group, "bits": bits}
        tensors[f"{name}.weight"] = pack_bits(weight.unsigned(), bits).view(torch.uint32)
        scales, biases = _affine(weight, group)
        tensors[f"{name}.scales"], tensors[f"{name}.biases"] = scales, biases
    quantization: dict[str, Any] = {**next(iter(layers.values())), **layers}
    changes: dict[str, Any] = {"quantization": quantization}
    rope: Any = getattr(getattr(source.model, "config", None), "rope_parameters", None)
    if isinstance(rope, dict) and "rope_theta" in rope:
        changes["rope_theta"] = rope["rope_theta"]  # mlx-lm looks for it where it used to be
    owners: dict[int, str] = {}
    once = {n: tensor for n, tensor in tensors.items() if owners.setdefault(id(tensor), n) == n}
    write_tensors(hub_named(source.model, once), folder, "mlx")
    write_config(source.model, folder, quantization, **changes)


def read_back(source: Source, folder: Path) -> ReadBack:
    """The weights that MLX defines, computed as its dequantization does, in float32."""
    tensors = read_tensors(folder)
    weights = {}
    for name, layer in source.layers.items():
        keys = (f"{name}.{part}" for part in ("weight", "scales", "biases"))
        parts = (tensors[_hub_name(source, key)] for key in keys)
        rows = dequantize(*parts, bits=_bits(source, name))
        weights[name] = rows.to(layer.weight.dtype)
    return ReadBack("the definition of mx.dequantize", weights)


def dequantize(words: Tensor, scales: Tensor, biases: Tensor, *, bits: int) -> Tensor:
    """What ``mx.dequantize`` computes, of shape (outputs, inputs), in float32.

    >>> words = pack_bits(torch.arange(32).reshape(1, 32) % 4, 2).view(torch.uint32)
    >>> dequantize(words, torch.tensor([[2.0]]), torch.tensor([[-3.0]]), bits=2)[0, :5]
    tensor([-3., -1.,  1.,  3., -3.])
    """
    size = 32 * words.shape[1] // bits
    u = unpack_bits(words.view(torch.int32), bits, size).unflatten(1, (scales.shape[1], -1))
    return (u * scales.float().unsqueeze(-1) + biases.float().unsqueeze(-1)).flatten(1)


def _bits(source: Source, name: str) -> int:
    return holds.stored(source, name, "mlx").width


def _hub_name(source: Source, key: str) -> str:
    return next(iter(hub_named(source.model, {key: torch.empty(0)})))


def _group(weight: IntegerWeight) -> int:
    size = weight.group_size or weight.integers.shape[1]
    return next(group for group in _GROUPS if size % group == 0)


def _affine(weight: IntegerWeight, group: int) -> tuple[Tensor, Tensor]:
    """Scales and biases of every group, in the narrowest dtype that holds both exactly."""
    groups = weight.integers.shape[1] // group
    scales = weight.row_scale() * weight.stride
    scales = scales.repeat_interleave(groups // scales.shape[1], 1).contiguous()
    biases = scales * -weight.zero
    for dtype in (torch.float16, torch.bfloat16):
        if all(
            torch.equal(values.to(dtype).to(values.dtype), values) for values in (scales, biases)
        ):
            return scales.to(dtype), biases.to(dtype)
    return scales, biases
