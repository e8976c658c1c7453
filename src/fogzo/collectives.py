"""Communication between ranks, and their shards of a weight. It does nothing in a single process.

FSDP2 (`torch.distributed.fsdp.fully_shard`) leaves each rank some rows of every weight, as the
local tensor of a DTensor. The functions here pass any other tensor through untouched.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fogzo.wording import caveat

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Placement


def num_ranks(group: Any = None) -> int:
    """How many ranks there are, in all or in a process group."""
    is_ready = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if is_ready else 1


def mean_over_ranks(numbers: Sequence[Tensor], device: torch.device, group: Any) -> list[float]:
    """The mean over ranks of each number, in one all-reduce, so that all take the same step.

    Gradients are averaged by then (DDP, FSDP) and all ranks draw the same directions from the
    same seed. A non-finite loss on one rank makes the mean non-finite on all, and all fall back
    together.

    Args:
        numbers: Scalars.
        device: Where the process group can reach them.
        group: The process group; None is all ranks.
    """
    if not numbers:
        return []
    together = torch.stack(list(numbers))
    if (count := num_ranks(group)) > 1:
        together = together.to(device, torch.float64)
        dist.all_reduce(together, op=dist.ReduceOp.SUM, group=group)
        together /= count
    return together.tolist()


@contextmanager
def without_broadcasts() -> Iterator[dict[Any, bool]]:
    """Let DDP's forward passes leave buffers as they are, and leave no trace in DDP.

    A forward pass without gradients broadcasts the buffers of the first rank if the last one had
    gradients, and has the next one not do so: of a probe's two sides only one would begin with
    this rank's own buffers, and the ranks' buffers would never be made equal again.

    Yields:
        The modules of DDP that have run so far, and whether each is to broadcast next time.

    Raises:
        ValueError: In the forward pass of a module whose ranks may run out of batches.
    """
    flags: dict[Any, bool] = {}
    if num_ranks() == 1:
        yield flags
        return
    cls: Any = nn.parallel.DistributedDataParallel
    own = cls.will_sync_module_buffers

    def never(module: Any) -> bool:
        if module._join_config.enable:  # a rank without batches would not answer the others
            raise ValueError(
                "probes measure on all ranks together, and in DDP's join() some may have run out "
                "of batches: give every rank as many, DistributedSampler(data, drop_last=True), "
                "and leave join() out; in accelerate leave out join_uneven_inputs, whose loaders "
                f"are even by default{caveat('DDP')}"
            )
        flags.setdefault(module, module.require_forward_param_sync)
        return False

    cls.will_sync_module_buffers = never
    try:
        yield flags
    finally:
        cls.will_sync_module_buffers = own
        for module, flag in flags.items():
            module.require_forward_param_sync = flag


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether other ranks hold other parts of this tensor."""
    # A sharded weight implies that this module is loaded; importing it here would add 1 s to every
    # start.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def sharded_dims(tensor: Tensor) -> set[int]:
    """The dimensions along which a tensor is cut into shards."""
    return set(_cuts(tensor).values()) if is_sharded(tensor) else set()


def check_not_flat(name: str, tensor: Tensor) -> None:
    """Raise a `ValueError` if FSDP1 has made a weight a part of a vector, without rows."""
    if getattr(tensor, "_fsdp_flattened", False) and tensor.dim() == 1:  # not gathered
        raise ValueError(
            f"{name!r} was sharded by FSDP1, which leaves {tensor.numel()} of its numbers here and "
            "no rows of it: use FSDP2, fully_shard(model) and not FullyShardedDataParallel(model), "
            f"or fsdp_version=2 where accelerate or transformers shards{caveat('FSDP2')}"
        )


def check_placements(name: str, tensor: Tensor) -> None:
    """Raise a `ValueError` unless each mesh dimension cuts a weight plainly or copies it."""
    check_not_flat(name, tensor)
    if not is_sharded(tensor):
        return
    from torch.distributed.tensor import Replicate, Shard

    if not all(type(placement) in (Shard, Replicate) for placement in tensor.placements):
        raise ValueError(
            f"{name!r} has the placements {tensor.placements}, but only Shard and Replicate are "
            "supported: use FSDP2 without tensor parallelism, fully_shard(model)"
        )


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the tensor's own memory. Belongs under `torch.no_grad`."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from all ranks, which have to ask for it together."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        reached: Any = tensor.to(compute_device(tensor))  # NCCL cannot reach offloaded shards
        whole: Tensor = reached.full_tensor()
        return whole.to(tensor.device)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor that belongs to this rank's part of ``like``, without communication.

    Args:
        tensor: The same on all ranks, broadcastable to ``like``.
        like: What decides where to cut.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh, dims = like.device_mesh, like.dim()
    whole = tensor.reshape((1,) * (dims - tensor.dim()) + tensor.shape)
    everywhere = [Replicate()] * mesh.ndim
    placements: list[Placement] = list(everywhere)
    for mesh_dim, dim in _cuts(like).items():
        if whole.shape[dim] == like.shape[dim]:  # else of size 1, for all ranks
            placements[mesh_dim] = like.placements[mesh_dim]
    replicated = DTensor.from_local(whole, mesh, everywhere, run_check=False)
    part = replicated.redistribute(placements=placements).to_local()
    return part.to(tensor.device)  # offloaded weights are not where their mesh is


def distributed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that all ranks hold in whole, cut into shards if ``like`` is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


def sum_over_parts_of_rows(tensor: Tensor, like: Tensor) -> Tensor:
    """Sum a tensor over the ranks that hold the same rows of ``like`` and other parts of them."""
    if not is_sharded(like):
        return tensor
    mesh, total = like.device_mesh, tensor.to(like.device_mesh.device_type)
    for mesh_dim, dim in _cuts(like).items():
        if dim > 0:
            dist.all_reduce(total, group=mesh.get_group(mesh_dim))
    return total.to(tensor.device)


def sum_over_shards(
    numbers: Sequence[float | Tensor], tensors: Sequence[Tensor], norms: bool = False
) -> list[float]:
    """Sums over the ranks that share each tensor, in one all-reduce per mesh and one wait for it.

    Args:
        numbers: What this rank's part of each tensor contributes, scalars.
        tensors: One per number. Replicas of the same shard are not summed.
        norms: Whether the numbers are norms, so that their squares are what adds up.
    """
    sums = list(numbers)
    meshes: dict[tuple[Any, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_sharded(tensor):
            meshes.setdefault((tensor.device_mesh, *_cuts(tensor)), []).append(i)
    for (mesh, *cuts), indices in meshes.items():
        options: dict[str, Any] = {"dtype": torch.float64, "device": mesh.device_type}
        together = torch.stack([torch.as_tensor(numbers[i], **options) for i in indices])
        together = together.square() if norms else together
        for dim in cuts:
            dist.all_reduce(together, group=mesh.get_group(dim))
        together = (together.sqrt() if norms else together).to(tensors[indices[0]].device)
        for i, total in zip(indices, together.unbind(), strict=True):
            sums[i] = total
    scalars = [number for number in sums if isinstance(number, Tensor)]
    if len({(scalar.device, scalar.dtype) for scalar in scalars}) > 1:
        scalars = [scalar.to(scalars[0].device, torch.float64) for scalar in scalars]
    values = iter(torch.stack(scalars).tolist() if scalars else [])
    return [next(values) if isinstance(number, Tensor) else number for number in sums]


def compute_device(tensor: Tensor) -> torch.device:
    """Where the model computes with a weight: not where it is stored, if FSDP offloads it."""
    if is_sharded(tensor) and tensor.device.type != tensor.device_mesh.device_type:
        return torch.empty(0, device=tensor.device_mesh.device_type).device
    return tensor.device


def reshard(models: Iterable[nn.Module]) -> None:
    """Free the gathered weights that FSDP kept from a forward pass.

    They are out of date once a shard is edited, and FSDP's outermost module would use them again.
    """
    for module in _fsdp_modules(models):
        module.reshard()


def recover(models: Iterable[nn.Module]) -> None:
    """Let FSDP forget a forward pass that an exception ended, and what it had gathered for it."""
    for module in _fsdp_modules(models):
        if hasattr(module, "reset_iter_state"):  # torch 2.6 has no such thing
            # Only the outermost module may be asked, and only if a forward pass has begun.
            with suppress(RuntimeError, AttributeError):
                module.reset_iter_state()


def _cuts(tensor: "DTensor") -> dict[int, int]:
    """For each dimension of the mesh that shards a tensor, the tensor's dimension."""
    from torch.distributed.tensor import Shard

    return {i: p.dim for i, p in enumerate(tensor.placements) if isinstance(p, Shard)}


def _fsdp_modules(models: Iterable[nn.Module]) -> "Iterator[FSDPModule]":
    cls: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if cls is not None:
        for model in models:
            yield from (module for module in model.modules() if isinstance(module, cls))
