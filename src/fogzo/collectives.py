"""What ranks must agree on: the mean of the probe losses. Nothing happens in a single process."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(losses: Sequence[Tensor], device: torch.device) -> list[float]:
    """The mean over ranks of each loss, in one all-reduce, so that all take the same step.

    Gradients are averaged by then (DDP) and all ranks draw the same directions from the same
    seed, so these scalars are the only thing left to exchange. A non-finite loss on one rank
    makes the mean non-finite on all, and all fall back together.

    Args:
        losses: Scalars.
        device: Where the process group can reach them.
    """
    if not losses:
        return []
    together = torch.stack(list(losses))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        together = together.to(device, torch.float64)
        dist.all_reduce(together, op=dist.ReduceOp.SUM)
        together /= dist.get_world_size()
    return together.tolist()
