"""The methods on two ranks, under DDP and FSDP2, against one process with all of the batch.

This file is also the program that each rank runs.
"""

import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import fogzo
from fogzo import collectives
from fogzo.methods import cage, cewt, dampening, project_, quantize_from, winq
from toolbox import cpu_mesh, draw, everything, fill, joined, run_ranks

STEPS = 6
PRESETS = {
    "fixed": lambda: fogzo.fixed(2),
    "lsq per channel": lambda: fogzo.lsq(2, granularity="channel"),
    "lsq per group": lambda: fogzo.lsq(3, granularity=4),
    "quest": lambda: fogzo.quest(2),
    "bbq": lambda: fogzo.bbq(2),
}
METHODS = {
    "cage": lambda model, optimizer: cage(model, optimizer, total_steps=STEPS, start=0.2),
    "winq": lambda model, optimizer: winq(model, every=2, keep=0.5),
    "dampening": lambda model, optimizer: dampening(model, total_steps=STEPS),
    "switch": lambda model, optimizer: quantize_from(model, 0.5, total_steps=STEPS),
    "project": lambda model, optimizer: partial(project_, model),
}
CASES = [
    (method, preset)
    for method in METHODS
    for preset in PRESETS
    if method == "switch" or preset != "bbq"
    if method != "project" or preset == "fixed"  # the only constant steps
]


def network(preset):
    layers = [nn.Linear(8, 15), nn.Tanh(), nn.Linear(15, 8), nn.Tanh(), nn.Linear(8, 3)]
    model = fill(nn.Sequential(*layers), 0.5).double()
    # Rows of 15 can neither be rotated nor cut into groups of 4.
    uneven = preset in ("quest", "bbq", "lsq per group")
    keep = (lambda module, name: name != "2") if uneven else everything
    return fogzo.quantize_(model, PRESETS[preset](), keep)


def train(method, preset, rank=None, fsdp=False):
    """The parameters after training, gathered; all of the batch where there is no rank."""
    model = network(preset)
    parallel = model
    if fsdp:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=cpu_mesh())
    elif rank is not None:
        unused = method == "switch"  # learned steps, in the float phase
        parallel = DistributedDataParallel(model, find_unused_parameters=unused)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    made = METHODS[method](model, optimizer)
    for step in range(STEPS):
        x, y = draw(16, 8, seed=step).double(), draw(16, 3, seed=100 + step).double()
        part = slice(rank, None, 2) if rank is not None else slice(None)
        optimizer.zero_grad()
        mse_loss(parallel(x[part]), y[part]).backward()
        if method == "dampening":
            made.add_grads_()
        optimizer.step()
        if method in ("cage", "winq"):
            made.pull_()
        elif method == "switch":
            made.advance_()
        elif method == "project":
            made()
    return {n: collectives.full(p.detach()).clone() for n, p in model.named_parameters()}


def refusals():
    """What a sharded model is told."""
    from torch.distributed.fsdp import fully_shard

    said = []
    model = fully_shard(network("fixed"), mesh=cpu_mesh())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    inputs = fill(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))
    fogzo.quantize_(inputs, fogzo.lsq(2), activations=fogzo.lsq(4))
    with fogzo.calibrate_(inputs):
        inputs(draw(4, 8))
    fully_shard(inputs, mesh=cpu_mesh())
    for call in (
        lambda: cewt(model, optimizer),
        lambda: quantize_from(inputs, 0.5, total_steps=10),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def main(rank, folder):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*find_unused_parameters.*")
    with joined(rank, folder):
        found = {
            (method, preset, fsdp): train(method, preset, rank, fsdp)
            for method, preset in CASES
            for fsdp in (False, True)
        }
        torch.save({"found": found, "refusals": refusals()}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize(("method", "preset"), CASES)
def test_two_ranks_train_as_one(ranks, method, preset, fsdp):
    alone = train(method, preset)
    for rank in ranks:
        found = rank["found"][method, preset, fsdp]
        assert found.keys() == alone.keys()
        for name, param in found.items():
            torch.testing.assert_close(param, alone[name], atol=1e-9, rtol=1e-7)


def test_what_no_rank_can_know_is_refused(ranks):
    for rank in ranks:
        constrained, inputs = rank["refusals"]
        assert "ranks of its values are among all of them: train with DDP" in constrained
        assert "has a step that is measured once, which a sharded model cannot" in inputs


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
