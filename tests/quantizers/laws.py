"""What the smoothing laws must be the derivatives of, in closed form."""

import math

import torch
from torch import Tensor

from fogzo.quantizers import Grid
from fogzo.quantizers.smoothing import (
    Crest,
    Logistic,
    Normal,
    Scaled,
    SmoothingLaw,
    Triangular,
    Uniform,
)


def cdf(law: SmoothingLaw, z: Tensor) -> Tensor:
    """P(Z <= z)."""
    match law:
        case Uniform(width):
            return (z / width + 0.5).clamp(0, 1)
        case Triangular(half_width):
            y = (z / half_width).clamp(-1, 1)
            return 0.5 + y - 0.5 * y * y.abs()
        case Logistic(tau):
            return 0.5 + 0.5 * torch.tanh(tau * z)
        case Normal(sigma):
            return 0.5 * torch.erfc(-z / (sigma * math.sqrt(2)))
        case Crest(amplitude, width):
            z, a = (z / width).clamp(-0.5, 0.5), math.sqrt(2) * math.pi * amplitude
            root = math.sqrt(1 - a**2)
            angle = torch.atan((torch.tan(math.pi / 2 * z.abs()) + a) / root)
            half = 4 / (math.pi * root) * (angle - math.atan(a / root)) - z.abs()
            return 0.5 + z.sign() * half / law.mean_slope
        case Scaled(inner, factor):
            return cdf(inner, z / factor)
    raise AssertionError(law)


def smooth(law: SmoothingLaw, x: Tensor, grid: Grid) -> Tensor:
    """``E Q(x + z)``, the smooth function whose slope the backward pass uses."""
    jumps = [grid.spacing * cdf(law, x - threshold) for threshold in grid.thresholds]
    return grid.low + torch.stack(jumps).sum(0)
