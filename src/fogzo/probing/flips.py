"""Which codes a probe changes."""

import torch
from torch import Tensor

from fogzo.collectives import shard_like, sum_over_shards
from fogzo.layers.weights import QuantizedWeight
from fogzo.probing.directions import Direction, Directions


@torch.no_grad()
def flip_rate(directions: Directions, direction: Direction, one_sided: bool) -> float | None:
    """The share of integer codes that differ between the two losses of a direction.

    Args:
        directions: Of this step. The weights must be unperturbed, and are so again afterwards.
        direction: One of them.
        one_sided: Whether the first of the losses is that at the weights themselves.

    Returns:
        The share, or None where a weight's record does not tell its codes.
    """
    weights = directions.weights
    if any(weight.codes is None for weight in weights):
        return None
    flips: list[float | Tensor] = []
    for index, part in enumerate(directions.parts):
        saved = part.param.detach().clone()
        try:
            before = _codes(part.weight) if one_sided else None
            directions.move_(part.param, index, direction)
            if before is None:
                before = _codes(part.weight)
                part.param.lerp_(saved, 2.0)  # as Lender.mirror_ does
            flips.append((before != _codes(part.weight)).sum())
        finally:
            part.param.copy_(saved)
    params = [weight.param for weight in weights]
    total = sum(param.numel() for param in params)
    return sum(sum_over_shards(flips, params)) / total


def _codes(weight: QuantizedWeight) -> Tensor:
    """This rank's part of the integer codes."""
    assert weight.codes is not None
    return shard_like(weight.codes(), weight.param)
