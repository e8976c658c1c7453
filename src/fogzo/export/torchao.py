"""Weights as torchao's integer tensors, to hand a model over to torch.export or ExecuTorch.

A function and not a format of `export`: in memory and in a file they take 8 bits per weight.
"""

import torch
from torch import nn

from fogzo.export import holds
from fogzo.export.source import ActivationChoice, Options, Source


def to_torchao(model: nn.Module, *, activations: ActivationChoice = "keep") -> nn.Module:
    """A plain copy of a quantized model whose layers hold torchao's ``IntxUnpackedToInt8Tensor``.

    It computes with the trained weights, bit for bit.

    Args:
        model: Quantized; it stays as it is.
        activations: ``"drop"`` leaves inputs in float where they are quantized.

    Returns:
        The copy, in eval mode.

    Raises:
        ValueError: If torchao cannot hold a layer; see ``fogzo.export.check(model, "torchao")``.
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor

    source = Source.of(model, Options(activations=activations))
    problems = holds.problems(source, "torchao")
    if problems:
        raise ValueError(problems[0])
    served = source.baked()
    layers = dict(served.named_modules())
    made: dict[int, nn.Parameter] = {}
    for name, layer in source.layers.items():
        weight = layer.weight
        if id(weight) not in made:
            bits = (weight.num_levels - 1).bit_length()
            low = -(2 ** (bits - 1))
            scale = (weight.row_scale() * weight.stride).to(weight.dtype)
            # Between two integers if zero is between two levels.
            zero = torch.full_like(scale, weight.zero + low)
            tensor = IntxUnpackedToInt8Tensor(
                (weight.unsigned().int() + low).to(torch.int8),
                scale,
                zero.to(torch.int8) if float(weight.zero).is_integer() else zero,
                getattr(torch, f"int{bits}"),
                (1, weight.integers.shape[1] // scale.shape[1]),
                weight.dtype,
                None,
            )
            made[id(weight)] = nn.Parameter(tensor, requires_grad=False)
        layers[name].weight = made[id(weight)]
    return served
