"""The standard error of a measured agreement, and how the agreement is shrunk by it.

A probe moves most weights by far less than a step size, so few codes change and the loss jumps by
whole levels. A weight that moves by ``eps |v|`` to each side crosses a threshold with probability
``p = 2 eps |v| / level``; if it does, the loss changes by ``level * g``. The mean of
that is what the straight-through gradient predicts, its variance is the square of

    standard error of lambda = sqrt( sum_j ghat_j^2 |v_j| level / (2 eps) )

in scaled coordinates, for one two-sided probe. It needs no forward pass. More probes average out
less of it than their number says: all follow the same gradient, and where their noise is smaller
they cross the same thresholds. Where weights are not spread evenly between thresholds, how far
their density there is from even is the larger error.

Quantized inputs round differently, too, which `fogzo.estimators.input_scatter` adds.
"""

import math

import torch
from torch import Tensor

from fogzo.collectives import sum_over_shards
from fogzo.probing.directions import Directions, Part

_SAMPLE = 2**12  # weights; more of them would cost a small network time and memory
_NEAR = (0.1, 0.01)  # of the distance of levels


def agreement_error(
    directions: Directions,
    noise_share: float,
    loss_error: float,
    num_probes: int,
    one_sided: bool,
) -> float:
    """The standard error of a measured agreement where STE is right.

    Args:
        directions: Of the step.
        noise_share: q.
        loss_error: Rounding error of one loss, in the loss's units.
        num_probes: How many slopes are averaged.
        one_sided: Whether each slope is measured from the weights themselves.
    """
    beta, norm = 1 - noise_share, directions.norm
    if not (beta > 0 and norm > 0):
        return math.inf
    parts, scaled_norm = directions.parts, norm * directions.grad_scale
    numbers = [_sum_of_cubes(part, scaled_norm) for part in parts]
    for part, size in zip(parts, directions.sizes, strict=True):  # of u's factor in v
        repeats = part.param.numel() / max(part.eps.numel(), 1)
        numbers.append((part.eps * size).square().sum() * repeats)
    sums = sum_over_shards(numbers, 2 * [part.weight.param for part in parts])
    flips, shared = [], []
    for part, own_norm, cubes, squares in zip(
        parts, directions.norms, sums[: len(parts)], sums[len(parts) :], strict=True
    ):
        weight, count = part.weight, part.weight.param.numel()
        own = own_norm / scaled_norm
        if weight.rotate is not None:  # a rotation makes Gaussians
            cubes = own**3 * math.sqrt(8 / math.pi / count)
        # |v| is at most sqrt(beta) |ghat| + sqrt(q) |u|, and E |u| at most 1.
        guide = math.sqrt(beta) * cubes
        noise = math.sqrt(noise_share) * math.sqrt(squares / count) * own**2
        spacing = weight.grid.spacing if weight.grid else 1.0
        flips.append(spacing / (2 * weight.surrogate.radius) * (guide + noise))
        # Crossings that any two probes have in common, by the guide. The square is no theorem: the
        # scatter of simulated probes follows it within a third, as a test sees to.
        shared.append(flips[-1] * (guide / (guide + noise)) ** 2 if guide else 0.0)
    rounding = loss_error**2 / (2 * norm**2)
    sides, common = 2 if one_sided else 1, math.fsum(shared)
    single = sides * (math.fsum(flips) - common + rounding) + noise_share
    # One-sided probes of either sign cross the thresholds on either side.
    together = common * (1 + (sides - 1) / num_probes)
    return math.sqrt((together + single / num_probes) / beta)


def unevenness(directions: Directions) -> float:
    """How far the density of weights at thresholds is from that of an even spread, which is 1.

    A gradient predicts a slope as if they were spread evenly. Weights that crowd on levels (a
    dequantized checkpoint) hardly round differently however right it is; those that cross
    thresholds together or oscillate about them do so more often. It is weighted by the gradient's
    squares and estimated from a sample.
    """
    parts = [p for p in directions.parts if p.weight.grid is not None and p.grad is not None]
    numbers = [number for part in parts for number in _near_thresholds(part)]
    kinds = 1 + len(_NEAR)
    params = [part.weight.param for part in parts for _ in range(kinds)]
    values = sum_over_shards(numbers, params)
    inside, *near = (math.fsum(values[kind::kinds]) for kind in range(kinds))
    if not inside > 0:
        return 0.0
    densities = [part / (2 * width * inside) for part, width in zip(near, _NEAR, strict=True)]
    return max(abs(1 - density) for density in densities)


def shrink(agreement: float, error: float) -> float:
    """The agreement, drawn towards 1 by its standard error (positive-part James-Stein).

    Within two errors of 1 it is 1, far from 1 it is what was measured. A negative one, which
    would turn the gradient round, counts only from two errors below zero; else it is 0. What that
    gains, and costs where STE is wrong, is measured in ``experiments/agreement``.

    >>> [round(shrink(*pair), 3) for pair in [(1.2, 0.3), (4.0, 0.3), (-0.5, 0.4), (-1.0, 0.1)]]
    [1.0, 3.88, 0.0, -0.98]
    """
    distance = agreement - 1
    if abs(distance) <= 2 * error:
        return 1.0
    shrunk = 1 + distance * (1 - (2 * error / distance) ** 2)
    return shrunk if agreement < -2 * error else max(shrunk, 0.0)


def _sum_of_cubes(part: Part, norm: float) -> Tensor | float:
    """The sum of ``|eps * grad / norm|^3``, from a sample of a large tensor."""
    if part.grad is None or not part.grad.numel() or part.weight.rotate is not None:
        return 0.0
    grad, eps = _sampled(part, part.grad), _sampled(part, part.eps)
    # In the units of the norm, as cubes of small gradients are too small for float32.
    cubes = (grad.to(part.dtype) * eps).div_(norm).abs_().pow_(3).sum()
    return cubes * (part.grad.numel() / grad.numel())


def _near_thresholds(part: Part) -> list[Tensor]:
    """Squares of a sample's scaled gradients: of all weights inside, and of those near thresholds.

    One number for each distance of `_NEAR`.
    """
    weight, grid = part.weight, part.weight.grid
    assert part.grad is not None and grid is not None
    param, grad, eps = (_sampled(part, tensor) for tensor in (part.param, part.grad, part.eps))
    param, grad = part.rotated(param), part.rotated(grad)
    cells = param / eps * (weight.surrogate.radius / grid.spacing)
    cells = cells - grid.thresholds[0] / grid.spacing
    distance = (cells - cells.round().clamp(0, len(grid.thresholds) - 1)).abs()
    squares = (grad * eps).square()
    return [(squares * (distance <= d)).sum(dtype=torch.float64) for d in (0.5, *_NEAR)]


def _sampled(part: Part, tensor: Tensor) -> Tensor:
    """Of a tensor that broadcasts to a large weight some entries, flat, always the same ones.

    Entries and not rows, of which a few may all be without gradient: tokens that a batch lacks,
    experts that it does not use, dead channels.
    """
    count = part.param.numel()
    # Rows of a rotated weight are rotated one by one, if they are its outputs.
    if count <= _SAMPLE or part.weight.rotate is not None:
        return tensor
    if tensor.numel() == 1:
        return tensor.reshape(())
    stride = math.ceil(count / _SAMPLE)
    while math.gcd(stride, count) > 1:  # else it might stay in a few columns, or kernel positions
        stride += 1
    tensor = tensor.expand(part.param.shape)
    if tensor.is_contiguous():
        return tensor.view(-1)[::stride]
    return tensor.take(torch.arange(0, count, stride, device=tensor.device))
