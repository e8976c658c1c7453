"""How far a measured agreement can be trusted, and what is made of it.

A probe moves most weights by far less than a step, so few codes change and the loss jumps by
whole levels. Of a weight that moves by ``eps |v|`` to each side a threshold lies between with
probability ``p = 2 eps |v| / level``; if one does, the loss changes by ``level * g``. The mean of
that is what the straight-through gradient predicts, its variance is the square of

    standard error of lambda = sqrt( sum_j ghat_j^2 |v_j| level / (2 eps) )

in scaled coordinates, per two-sided probe. It needs no forward pass.
"""

import math
from collections.abc import Sequence

from fogzo.directions import Moments


def agreement_error(
    moments: Sequence[Moments],
    noise_share: float,
    norm: float,
    loss_error: float,
    num_probes: int,
    one_sided: bool,
) -> float:
    """The standard error of a measured agreement where STE is right.

    Args:
        moments: One per weight.
        noise_share: q.
        norm: N, in the loss's units.
        loss_error: Rounding error of one loss, in the loss's units.
        num_probes: How many slopes are averaged.
        one_sided: Whether each slope is measured from the weights themselves.
    """
    beta = 1 - noise_share
    if not (beta > 0 and norm > 0):
        return math.inf
    # |v| is at most sqrt(beta) |ghat| + sqrt(q) |u|, and E |u| at most 1.
    flips = math.fsum(
        m.flip_size * (math.sqrt(beta) * m.cubes + math.sqrt(noise_share) * m.noise * m.squares)
        for m in moments
    )
    rounding = loss_error**2 / (2 * norm**2)
    sides = 2 if one_sided else 1
    return math.sqrt((sides * (flips + rounding) + noise_share) / beta / num_probes)


def shrink(agreement: float, error: float) -> float:
    """The agreement, drawn towards 1 by its standard error (positive-part James-Stein).

    Within one error of 1 it is 1, far from 1 it is what was measured. A negative one, which would
    turn the gradient round, counts only from two errors below zero; else it is 0.

    >>> shrink(1.2, 0.3), shrink(4.0, 0.3), shrink(-0.5, 0.4), shrink(-1.0, 0.1)
    (1.0, 3.97, 0.0, -0.995)
    """
    distance = agreement - 1
    if abs(distance) <= error:
        return 1.0
    shrunk = 1 + distance * (1 - (error / distance) ** 2)
    return shrunk if agreement < -2 * error else max(shrunk, 0.0)
