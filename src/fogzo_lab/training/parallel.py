"""One process, or the ranks that torchrun or accelerate launch started."""

import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fogzo_lab.system.devices import find_device
from fogzo_lab.training.models import blocks


@dataclass(frozen=True)
class Ranks:
    """This process and the others of a run.

    Attributes:
        device: Its device.
        rank: Its number, from 0; rank 0 alone writes and prints.
        count: Number of ranks.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    def turns(self, count: int) -> range:
        """This rank's share of a number of turns, rounded up so that all ranks have the same."""
        return range(self.rank, -(-count // self.count) * self.count, self.count)

    def sum(self, tensor: Tensor) -> Tensor:
        """The elementwise sum over ranks, on the CPU."""
        if self.count == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def maximum(self, value: int) -> int:
        """The maximum of a number over ranks."""
        if self.count == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def mean(self, value: Tensor) -> float:
        """The mean over ranks of a scalar."""
        return self.sum(value.double()).item() / self.count


@contextmanager
def join_ranks(device: str = "auto") -> Iterator[Ranks]:
    """Join the process group that a launcher prepared, or be a single process.

    Raises:
        ValueError: If there is no such device.
    """
    chosen = find_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or dist.is_initialized():
        initialized = dist.is_available() and dist.is_initialized()
        rank, count = (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)
        yield Ranks(chosen, rank, count)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(chosen, dist.get_rank(), count)
        gc.collect()
        dist.barrier()  # no rank leaves while others still communicate with it
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # which hold the model
        raise
    finally:
        leave_ranks()


def leave_ranks() -> None:
    """Destroy the process group, after everything that still refers to it.

    A DDP wrapper that outlives its group destroys it while holding the GIL, for which the thread of
    the group may be waiting: a deadlock.
    """
    gc.collect()
    dist.destroy_process_group()


def parallelize(
    model: nn.Module, strategy: str, ranks: Ranks, some_unused: bool = False
) -> nn.Module:
    """The network for this rank: itself, wrapped by DDP, or sharded in place by FSDP2.

    FSDP2 gathers the weights of one block at a time.

    Args:
        model: The network.
        strategy: ddp or fsdp.
        ranks: This process among the others.
        some_unused: Whether parameters may be without a gradient in some steps, for which DDP
            has to look.
    """
    if ranks.count == 1:
        return model
    if strategy == "ddp":
        return DistributedDataParallel(
            model, gradient_as_bucket_view=True, find_unused_parameters=some_unused
        )
    from torch.distributed.device_mesh import init_device_mesh  # here, as they take a second
    from torch.distributed.fsdp import fully_shard

    # By itself it takes a GPU wherever there is one, also for ranks that compute on the CPU.
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    return cast(nn.Module, fully_shard(model, mesh=mesh))


def without_sync(model: nn.Module, skip: bool) -> AbstractContextManager[Any]:
    """A context whose backward pass does not average gradients over ranks, if ``skip``."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync() if skip else nullcontext()
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) and isinstance(model, fsdp.FSDPModule):
        model.set_requires_gradient_sync(not skip)
    return nullcontext()


def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Give every rank the buffers of rank 0, as DDP does before forward passes.

    FSDP leaves the running statistics of batch norms to each rank.
    """
    if ranks.count > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
