"""The padding rows of embeddings, which training leaves what they are."""

import warnings
from typing import cast

import torch
from torch import Tensor, nn

from fogzo.quantizers import Quantizer
from fogzo.quantizers.experts import ExpertQuantizer
from fogzo.wording import caveat, listed

# Beside the mean magnitude of a layer's weights.
_NOTHING = 1e-4


def padding_rows(layer: nn.Module) -> Tensor | None:
    """Which rows of an embedding are padding, and must stay what they are."""
    index = getattr(layer, "padding_idx", None)
    if not isinstance(layer, nn.Embedding) or index is None:
        return None
    rows = torch.zeros(layer.num_embeddings, 1, dtype=torch.bool)
    rows[index] = True
    return rows


def moves_padding(
    layer: nn.Module, quantizer: Quantizer | ExpertQuantizer, step: Tensor | None
) -> bool:
    """Whether the padding of an embedding is zero, and is not once it is quantized.

    What a row's own step size makes of it, measured in every forward pass, is next to nothing.
    """
    rows = padding_rows(layer)
    if rows is None:
        return False
    weight = cast(Tensor, layer.weight).detach()
    zero = (weight == 0) & rows.to(weight.device)
    if not zero.any():
        return False
    padding = quantizer.quantize_weight(weight, step)[zero]
    return bool(padding.abs().max() > _NOTHING * weight.abs().mean())


def warn_of_padding(names: list[str]) -> None:
    """Say which embeddings have padding that does not stay zero."""
    if names:
        warnings.warn(
            f"the padding row of {listed(names)} is zero, and does not stay so, as the quantizer "
            'has no level there: levels="integer", as in fogzo.lsq(2, levels="integer"), or '
            "fogzo.ternary() has one. To leave an embedding in float: fogzo.quantize_(model, "
            "quantizer, filter_fn=lambda module, name: name not in {...})" + caveat("Zero weights"),
            UserWarning,
            stacklevel=3,
        )
