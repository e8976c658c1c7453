"""Sharded checkpoints: two ranks of FSDP2 against one process.

This file is also the program that each rank runs: ``python test_checkpoint_ranks.py FOLDER RANK``.
"""

import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_tools import files, same, state_of
from torch import nn
from torch.nn.functional import mse_loss

from fogzo_lab.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    restore_rng,
    rng_state,
    save_checkpoint,
)
from fogzo_lab.training.parallel import leave_ranks
from forked import Python, finish

RANKS = 2


def network():
    stream = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()  # 7 and 3 are odd
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.rand(parameter.shape, generator=stream, dtype=torch.float64) - 0.5
            )
    return model


def batch(step):
    stream = torch.Generator().manual_seed(step)
    return (torch.rand(8, n, generator=stream, dtype=torch.float64) for n in (5, 3))


def train_step(model, optimizer, step):
    x, y = batch(step)
    mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def build(kind, shard):
    model = network()
    if shard:
        shard(model)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    return model, getattr(torch.optim, kind)(model.parameters(), lr=0.1, **options)


def state_dicts(model, optimizer):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def resume(path, model, optimizer):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    like = {"model": model.state_dict(), "optimizer": {"state": dict(enumerate(parameters))}}
    state = load_checkpoint(path, like)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state


def gathered(value):
    """A copy of the state with every DTensor gathered."""
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list):
        return [gathered(item) for item in value]
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.clone() if isinstance(value, torch.Tensor) else value


def ranks_program(folder, rank):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    round_trips(folder, rank)
    failures(folder, rank)
    dist.barrier()
    leave_ranks()


def round_trips(folder, rank):
    """What is saved from shards comes back, as shards and whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))

    def shard(model):
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)

    for kind in ("AdamW", "SGD"):
        run = folder / kind
        model, optimizer = build(kind, shard)
        for step in (1, 2):
            train_step(model, optimizer, step)
        torch.rand(rank + 1)
        state = state_dicts(model, optimizer) | {"rng": rng_state(), "rank": rank}
        path = save_checkpoint(run, 2, state, keep=1)
        expected = torch.rand(1)
        at_save = gathered(state_dicts(model, optimizer))
        train_step(model, optimizer, 3)

        again, its_optimizer = build(kind, shard)
        assert newest_checkpoint(run) == path
        loaded = resume(path, again, its_optimizer)
        assert same(gathered(state_dicts(again, its_optimizer)), at_save)
        shard_shape = loaded["model"]["0.weight"].to_local().shape
        assert shard_shape == again[0].weight.to_local().shape != (7, 5)
        assert loaded["rank"] == 0
        restore_rng(loaded["rng"])
        assert torch.equal(torch.rand(1), expected)
        train_step(again, its_optimizer, 3)
        after = gathered(state_dicts(model, optimizer))
        assert same(gathered(state_dicts(again, its_optimizer)), after)

        # A checkpoint of one process, sharded now.
        one = folder / f"one-{kind}" / "checkpoints" / "step-000002"
        again, its_optimizer = build(kind, shard)
        resume(one, again, its_optimizer)
        train_step(again, its_optimizer, 3)
        if rank == 0:
            torch.save(at_save, folder / f"{kind}-2.pt")
            torch.save(after, folder / f"{kind}-3.pt")
        single = gathered(again.state_dict())
        for name, tensor in single.items():
            torch.testing.assert_close(tensor, after["model"][name], rtol=1e-9, atol=1e-12)
    copies(folder, mesh)


def copies(folder, mesh):
    """A replicated DTensor is written once; one cut along columns comes back from rows."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    whole = torch.arange(35.0).view(5, 7).to(torch.complex64)  # raw bytes in the file
    rows, columns, copied = (
        distribute_tensor(whole, mesh, [p]) for p in (Shard(0), Shard(1), Replicate())
    )
    few = distribute_tensor(torch.ones(1, 2), mesh, [Shard(0)])  # nothing is left for rank 1
    state = {"cut": rows, "copied": copied, "few": few}
    path = save_checkpoint(folder / "copies", 1, state, keep=1)
    located = json.loads((path / "state.json").read_text())["dict"]
    assert [len(node["pieces"]) for _, node in located] == [2, 1, 1]
    loaded = load_checkpoint(path, {"cut": columns, "copied": rows, "few": few})
    assert loaded["cut"].placements == columns.placements
    assert torch.equal(loaded["cut"].to_local(), columns.to_local())
    assert torch.equal(loaded["copied"].to_local(), rows.to_local())
    assert torch.equal(loaded["few"].to_local(), few.to_local())
    assert torch.equal(load_checkpoint(path)["cut"], whole)


def failures(folder, rank):
    """What fails on one rank fails on all, and leaves nothing."""
    run = folder / "failures"
    good = save_checkpoint(run, 1, state_of(1), keep=1)
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    sharded = distribute_tensor(torch.zeros(100, 1000), mesh, [Shard(0)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    with pytest.raises(CheckpointError, match=rf"Errno 27.*the newest good one is {good}") as told:
        save_checkpoint(run, 2, {"weight": sharded}, keep=1)
    assert rank == 1 or "(rank 1)" in str(told.value)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(ValueError, match="got object in state") as told:
        save_checkpoint(run, 2, {"odd": object() if rank == 1 else 1}, keep=1)
    assert rank == 1 or "(rank 1)" in str(told.value)
    dist.barrier()
    assert os.listdir(run / "checkpoints") == ["step-000001"]
    os.truncate(good / "state.json", 3) if rank == 0 else None
    dist.barrier()
    assert newest_checkpoint(run) is None


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    for kind in ("AdamW", "SGD"):
        model, optimizer = build(kind, None)
        for step in (1, 2):
            train_step(model, optimizer, step)
        save_checkpoint(folder / f"one-{kind}", 2, state_dicts(model, optimizer), keep=1)
    finish(*(Python(__file__, folder, rank) for rank in range(RANKS)))
    return folder


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_a_sharded_checkpoint_loads_in_one_process(ranks, kind):
    path = newest_checkpoint(ranks / kind)
    assert [name for name in files(path) if name.startswith("tensors")] == [
        f"tensors-0000{rank}-of-00002.safetensors" for rank in range(RANKS)
    ]
    loaded = load_checkpoint(path)
    expected = torch.load(ranks / f"{kind}-2.pt")
    assert same({key: loaded[key] for key in expected}, json_like(expected))
    assert len(loaded["rng"]["ranks"]) == RANKS
    model, optimizer = build(kind, None)
    resume(path, model, optimizer)
    train_step(model, optimizer, 3)
    after = torch.load(ranks / f"{kind}-3.pt")["model"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-9, atol=1e-12)


def json_like(value):
    """Plain dicts."""
    if isinstance(value, dict):
        return {key: json_like(item) for key, item in value.items()}
    return value


if __name__ == "__main__":
    ranks_program(Path(sys.argv[1]), int(sys.argv[2]))
