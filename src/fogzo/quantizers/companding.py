"""Companding: a curve before rounding, so that the cells of a grid of even levels are uneven."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fogzo.quantizers.grids import Grid
from fogzo.quantizers.step_sizes import MIN_STEP_SIZE


@dataclass(frozen=True)
class Bell:
    """The Gaussian's own curve, which makes all codes equally frequent (arXiv 2603.01599).

    With t = w / rms of its group, ``x = num_levels * (Phi(t) - 1/2)`` step sizes from the middle
    of the grid. Gradients pass through the curve and through the rms.
    """

    def compress(self, groups: Tensor, grid: Grid) -> Tensor:
        """Weights of shape (groups, group size) in step sizes, float32 or finer, to be rounded."""
        wide = groups.to(torch.promote_types(groups.dtype, torch.float32))
        rms = _rms(wide)
        # What is zero stays in the middle, with a slope that is finite.
        rms = rms.where(rms > MIN_STEP_SIZE, 1.0)
        share = 0.5 * torch.erf(wide / (rms * math.sqrt(2)))
        return grid.spacing * grid.num_levels * share + (grid.low + grid.high) / 2

    def cell(self, groups: Tensor, grid: Grid) -> Tensor:
        """What one step is in units of each weight: the curve's inverse slope, in that shape.

        Beyond the last threshold it stays what it is there, as there is nothing to cross. It is 0
        where a group has no weights but zeros, as step sizes of such groups are.
        """
        wide = groups.to(torch.promote_types(groups.dtype, torch.float32))
        rms = _rms(wide)
        # Where Phi(t) is that of the last threshold.
        last = math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 / grid.num_levels)).item()
        t = (wide / rms.clamp(min=MIN_STEP_SIZE)).clamp(-last, last)
        density = torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)
        cell = rms / (grid.num_levels * grid.spacing * density)
        return cell.where(rms > MIN_STEP_SIZE, 0.0).to(groups.dtype)


def _rms(groups: Tensor) -> Tensor:
    # A norm has the gradient 0 where all is zero; the root of a mean has none there.
    return torch.linalg.vector_norm(groups, dim=1, keepdim=True) / math.sqrt(groups.shape[1])
