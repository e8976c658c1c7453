"""What FOGZO's probe measures on a density of weights, and what it makes of it.

A probe moves weight i by ``a_i = r (sqrt(beta) ghat_i + sqrt(q) u_i)`` and by ``-a_i``, r being the
radius in the weight's units. A straight-through gradient predicts that the weights used change by
2 a. They change by whole steps, where a threshold lies between. So to first order the agreement is
the step times the density at thresholds over the share of weights inside the range. Where weights
gather at a threshold, four things that vanish slowly with d change it and what it does:

- their density changes over the length of a probe, which is of order r / sqrt(d);
- weights on either side of the threshold are pulled towards it by their mean gradient, so more of
  them cross on the way down the slope than on the way up;
- the loss is a parabola along the gradient, so the side on which more cross is measured as less
  steep;
- each weight that crosses has a part in the measured slope, which multiplies its own move. This is
  all that the measurement knows of a single weight: it pushes weights away from a threshold beyond
  which the loss is higher.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fogzo_lab.dynamics.setting import Array, Regression

RADIUS = 1 / math.sqrt(12)
"""Of uniform noise, in steps."""


class Factor(NamedTuple):
    """What a step's gradient is multiplied by: its mean, and its mean square."""

    mean: float
    square: float


UNREFINED = Factor(1.0, 1.0)


def gradient_square(setting: Regression, count: int | None, inside: float, risk: float) -> float:
    """Squared norm of the straight-through gradient of all weights."""
    drift = risk / count if count else 0.0
    return (inside if setting.masked else 1.0) * gradient_variance(setting, risk) + drift


def gradient_variance(setting: Regression, risk: float) -> float:
    """Variance of one weight's gradient, times d: ``k2 V / B``."""
    _, k2 = setting.input_moments
    return k2 * (setting.label_noise**2 + risk) / setting.batch_size


# Quadratures over the noise of a gradient and over u.
_NORMALS, _SHARES = np.polynomial.hermite_e.hermegauss(16)
_SHARES = (_SHARES / _SHARES.sum())[:, None] / 8
_UNIFORMS = math.sqrt(3) * (2 * (np.arange(8) + 0.5) / 8 - 1)


class _Crossing(NamedTuple):
    """Weights next to a threshold, on one side: over the noise of their gradient and of the probe.

    Attributes:
        row: Of the teacher.
        distance: Of each cell from the threshold; negative on the other side.
        move: Of a weight by a probe that goes up the gradient, of shape (nodes, nodes).
        forth: Whether it crosses when the probe goes up the gradient, else when it goes down.
        change: Of the loss if it crosses, to first order.
        share: How many weights of all cross, by node.
    """

    row: int
    distance: Array
    move: Array
    forth: NDArray[np.bool_]
    change: Array
    share: Array


def measure(
    setting: Regression,
    count: int,
    edges: Array,
    mass: Array,
    teachers: Array,
    risk: float,
    kappa: float,
) -> tuple[Factor, Array]:
    """The measured agreement, and the drift that each weight's own part in it adds, over eta.

    Args:
        setting: What is trained.
        count: d.
        edges: Of cells.
        mass: In them, of shape (teachers, cells), adding to 1.
        teachers: Their values.
        risk: As trained.
        kappa: Of the noise.
    """
    _, k2 = setting.input_moments
    w = (edges[1:] + edges[:-1]) / 2
    inside = float(mass[:, np.abs(w) <= setting.omega].sum())
    norm_square = gradient_square(setting, count, inside, risk)
    push = np.zeros_like(mass)
    if norm_square == 0:
        return Factor(0.0, 0.0), push
    noise_share = kappa / (count + kappa)
    crossings = list(_crossings(setting, count, edges, mass, teachers, risk, norm_square, kappa))
    # Sums over the weights that cross when a probe goes up the gradient, and down.
    along, squares, crossed = (
        np.array(
            [
                sum(float((c.share * (c.forth == forth) * c.change**n).sum()) for c in crossings)
                for forth in (True, False)
            ]
        )
        for n in (1, 2, 0)
    )
    # The Hessian of a batch along its own gradient, and half of it along one step of one weight.
    curvature = k2 * ((inside if setting.masked else 1.0) / setting.batch_size + 1 / count)
    single = k2 * setting.spacing**2 / (2 * count)
    up, down = along + curvature / 2 * along**2 / norm_square + single * crossed
    size = math.sqrt(1 - noise_share) / (2 * RADIUS * setting.spacing * math.sqrt(norm_square))
    mean = size * float(up - down)
    # Each weight crosses or not by chance: by its own change of the loss, with that of those which
    # have crossed already, and by those of pairs.
    factor = 1 + curvature * along / norm_square
    variance = factor**2 * squares + 2 * single * factor * along + single**2 * crossed
    variance += 2 * (single * crossed) ** 2 / setting.batch_size
    for c in crossings:
        reach = np.abs(c.move)
        near = (c.distance > 0) & (c.distance < reach.max())
        crosses = reach > c.distance[near, None, None]
        part = np.where(c.forth, c.change * factor[0] + single, -c.change * factor[1] - single)
        added = (_SHARES * crosses * part * c.move).sum((1, 2))
        push[c.row, near] -= count * added / (2 * (RADIUS * setting.spacing) ** 2)
    return Factor(mean, mean**2 + size**2 * float(variance.sum())), push


def _crossings(
    setting: Regression,
    count: int,
    edges: Array,
    mass: Array,
    teachers: Array,
    risk: float,
    norm_square: float,
    kappa: float,
) -> Iterator[_Crossing]:
    """Of each teacher at both sides of each threshold."""
    k1, k2 = setting.input_moments
    noise_share, spread = kappa / (count + kappa), gradient_variance(setting, risk) / count
    w = (edges[1:] + edges[:-1]) / 2
    for row, teacher in enumerate(teachers):
        below = np.append(0.0, np.cumsum(mass[row]))
        for threshold in setting.thresholds:
            for side in (-1, 1):
                pull = k1 * teacher - k2 * (threshold + side * setting.spacing / 2)
                gradient = -pull / count + math.sqrt(spread) * _NORMALS[:, None]
                guided = math.sqrt((1 - noise_share) / norm_square) * gradient
                move = RADIUS * setting.spacing * (guided + math.sqrt(noise_share) * _UNIFORMS)
                ends = np.interp([threshold, *(threshold + side * np.abs(move)).flat], edges, below)
                near = side * (ends[1:] - ends[0]).reshape(move.shape)
                yield _Crossing(
                    row=row,
                    distance=side * (w - threshold),
                    move=move,
                    forth=side * move < 0,
                    change=-side * setting.spacing * gradient,
                    share=count * _SHARES * near,
                )
