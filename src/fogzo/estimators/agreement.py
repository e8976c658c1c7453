"""How far a measured agreement can be trusted, and what is made of it.

A probe moves most weights by far less than a step, so few codes change and the loss jumps by
whole levels. Of a weight that moves by ``eps |v|`` to each side a threshold lies between with
probability ``p = 2 eps |v| / level``; if one does, the loss changes by ``level * g``. The mean of
that is what the straight-through gradient predicts, its variance is the square of

    standard error of lambda = sqrt( sum_j ghat_j^2 |v_j| level / (2 eps) )

in scaled coordinates, per two-sided probe. It needs no forward pass. Where weights are not spread
evenly between thresholds, how far their density there is from even is the larger error.
"""

import math
from collections.abc import Sequence

from fogzo.probing.directions import Moments


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


def is_explained(agreement: float, error: float, errors: float = 2.0) -> bool:
    """Whether it is 1 within so many standard errors."""
    return abs(agreement - 1) <= errors * error


def shrink(agreement: float, error: float, errors: float = 2.0) -> float:
    """The agreement, drawn towards 1 by its standard error (positive-part James-Stein).

    Within so many errors of 1 it is 1, far from 1 it is what was measured. A negative one, which
    would turn the gradient round, counts only from two errors below zero; else it is 0. What that
    gains, and costs where STE is wrong, is measured in ``experiments/agreement``.

    >>> [round(shrink(*pair), 3) for pair in [(1.2, 0.3), (4.0, 0.3), (-0.5, 0.4), (-1.0, 0.1)]]
    [1.0, 3.88, 0.0, -0.98]
    """
    if is_explained(agreement, error, errors):
        return 1.0
    distance = agreement - 1
    shrunk = 1 + distance * (1 - (errors * error / distance) ** 2)
    return shrunk if agreement < -2 * error else max(shrunk, 0.0)
