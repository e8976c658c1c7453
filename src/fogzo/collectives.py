"""What ranks must agree on: the mean of the probe losses. Nothing happens in a single process."""

import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(losses: Tensor) -> Tensor:
    """The mean over ranks, in one all-reduce, so that every rank takes the same step.

    Gradients are averaged by then (DDP) and all ranks draw the same directions from the same
    seed, so these scalars are the only thing left to exchange. A non-finite loss on one rank
    makes the mean non-finite on all, and all fall back together.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return losses
    total = losses.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total / dist.get_world_size()
