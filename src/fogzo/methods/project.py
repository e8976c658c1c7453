"""The projection of latent weights onto the range of their levels, after the optimizer's step.

A masked gradient never brings back a weight that has left the range; where weights cannot leave,
no mask holds any. So a masked STE gets what the unmasked one has anyway.
"""

import warnings

import torch
from torch import Tensor

from fogzo.collectives import full, local, reshard, shard_like
from fogzo.layers.weights import QuantizedWeight
from fogzo.methods.pull import Weights, free, in_float, rounded, weights_with_levels
from fogzo.wording import listed


@torch.no_grad()
def project_(weights: Weights) -> None:
    """Clamp latent weights to the range of their levels. Call it after the optimizer's step.

    ``w <- clip(w, lowest level, highest level)``, in the basis where the weight is rounded. Codes,
    step sizes, the optimizer's state, frozen weights, entries that a record holds and weights in
    the float phase of `quantize_from` stay what they are. A rotated weight in 16 bits is rounded as
    it is written: fewer than one in a hundred of its codes, next to thresholds, may change (with 8
    bits a few more), and one in a thousand weights be left beyond the range.

    Args:
        weights: A quantized model, or what `fogzo.quantized_weights` lists, which saves looking for
            them in every step.

    Raises:
        ValueError: If the levels of a weight are not known, or its step size is learned or measured
            from the weights in every forward pass. Then no weight has been changed.

    Warns:
        RuntimeWarning: If weights are in a float phase and left alone.
    """
    records = weights_with_levels(weights)
    for record in records:
        _check_step_is_constant(record)
    reshard({id(r.model): r.model for r in records if r.model is not None}.values())
    floating = in_float(records)
    if floating:
        left = [record.name for record in records if id(record.param) in floating]
        warnings.warn(
            f"{listed(left)} are still in float (fogzo.methods.quantize_from), and weights are "
            "not clamped to the range of levels before they are rounded to them: if "
            "switch.is_quantized: fogzo.methods.project_(model)",
            RuntimeWarning,
            stacklevel=3,
        )
    for record in records:
        if record.param.requires_grad and id(record.param) not in floating:
            _clamp_(record)


def _clamp_(weight: QuantizedWeight) -> None:
    param = local(weight.param)
    w, _, low, high = rounded(weight)
    inside = w.clamp(low, high)
    if weight.rotate is None:
        param.copy_(_within(inside.to(param.dtype), weight).where(free(weight), param))
    elif not torch.equal(inside, w):  # as rotating there and back would round
        # And beyond the end of the range a mask would drop them, so that they stop short of it.
        room = (high - low) * _room(weight)
        change = weight.rotate((w.clamp(low + room, high - room) - w).where(inside != w, 0))
        change = change * free(weight)
        param.copy_(param.to(change.dtype).add_(change))


def _room(weight: QuantizedWeight) -> float:
    """How far from the ends a rotated weight is put, over the range: more than rotating rounds."""
    grid = weight.grid
    assert grid is not None
    span = grid.high - grid.low
    rounds = 4 * torch.finfo(weight.param.dtype).eps * max(abs(grid.low), abs(grid.high))
    # At most half of the way to a threshold, beyond which it would have another code.
    return min(max(rounds, 2.0**-12 * grid.spacing), grid.spacing / 4) / span


def _within(end: Tensor, weight: QuantizedWeight) -> Tensor:
    """The end of a range, rounded inwards where a mask in the weight's own dtype would drop it."""
    grid = weight.grid
    assert grid is not None
    x = end / shard_like(full(weight.step_size()).detach().to(end), weight.param)
    return torch.where(
        (x < grid.low) | (x > grid.high), end * (1 - torch.finfo(end.dtype).eps), end
    )


def _check_step_is_constant(weight: QuantizedWeight) -> None:
    if not weight.has_constant_step_size:
        raise ValueError(
            f"the range of {weight.name!r} moves with its step size, which is learned or measured "
            "from the weights: clamping to it was measured to harm, and can drive a learned step "
            "to zero. Use fogzo.fixed(...), or leave the weights where they are and drop the "
            'mask, surrogate="identity_unmasked"'
        )
