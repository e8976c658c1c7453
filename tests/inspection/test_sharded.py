"""A watch on two ranks with FSDP2 sees what it sees in one process.

This file is also the program that each rank runs.
"""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo
from toolbox import cpu_mesh, draw, fill, joined, run_ranks

PRESETS = {
    "lsq per channel": lambda: fogzo.lsq(2, granularity="channel"),
    "fixed": lambda: fogzo.fixed(2),
    "quest": lambda: fogzo.quest(2),
    "bbq": lambda: fogzo.bbq(2),
}
STEPS = 6


def inspections(preset, rank=None):
    """What a watch saw of a run, as dictionaries."""
    model = fill(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), 0.5).double()
    with torch.no_grad():
        model[0].bias[3] = -100.0
    fogzo.quantize_(model, PRESETS[preset]())
    if rank is not None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=cpu_mesh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    watch = fogzo.Watch(model, every=3)
    part = slice(rank, None, 2) if rank is not None else slice(None)
    for step in range(STEPS):
        x, y = draw(16, 8, seed=step).double(), draw(16, 3, seed=100 + step).double()
        optimizer.zero_grad()
        mse_loss(model(x[part]), y[part]).backward()
        watch.update()
        optimizer.step()
    with torch.no_grad():
        model[0].weight.mul_(torch.inf)
    return [inspection.as_dict() for inspection in (*watch.history, fogzo.inspect(model))]


def main(rank, folder):
    warnings.simplefilter("error")
    with joined(rank, folder):
        torch.save({preset: inspections(preset, rank) for preset in PRESETS}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("preset", PRESETS)
def test_ranks_see_what_one_process_sees(ranks, preset):
    alone = inspections(preset)
    assert len(alone) == 3
    assert alone[1]["layers"][0]["flips"] > 0
    assert [layer["not_finite"] for layer in alone[2]["layers"]] == [1]
    for rank in ranks:
        for found, expected in zip(rank[preset], alone, strict=True):
            assert found["in_float"] == expected["in_float"]
            for layer, own in zip(found["layers"], expected["layers"], strict=True):
                assert layer == pytest.approx(own)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
