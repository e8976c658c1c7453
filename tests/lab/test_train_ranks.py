"""Training on two ranks against one process: the same global batches, the same numbers.

This file is also the program that each rank runs.
"""

import contextlib
import io
import json
import math
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from fogzo.collectives import full
from fogzo_lab.cli.main import main
from fogzo_lab.data.config import TextConfig
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.checkpoint import load_checkpoint, newest_checkpoint
from fogzo_lab.training.loop import train, training_step
from fogzo_lab.training.method_config import MethodConfig
from fogzo_lab.training.model_config import LlamaConfig, ResNetConfig
from fogzo_lab.training.parallel import Ranks, join_ranks, parallelize
from fogzo_lab.training.run_folder import read_metrics
from fogzo_lab.training.state import Training
from forked import Python, finish

VARIANTS = {
    f"n={n}, accumulation {k}": {"num_samples": n, "accumulation": k} for n, k in ((1, 1), (2, 3))
}
STEPS = 6
CAGE = MethodConfig(name="cage", strength=1.0, start=0.5)
METHODS = {
    # Learned step sizes without a gradient in the first half.
    "cage after float": {"estimator": "ste", "quantize_from": 0.5, "method": CAGE},
    "cewt": {"estimator": "ste", "method": MethodConfig(name="cewt"), "weight_decay": 0.0},
}


def config(folder, **changes):
    recipe = RECIPES["pydoc-llama"]()
    return replace(
        recipe,
        model=LlamaConfig(width=16, depth=2, heads=2),
        data=TextConfig(context=16, max_eval_blocks=32),
        # AdamW divides by gradients that are nearly zero, which makes rounding errors large.
        optimizer="sgd",
        learning_rate=0.1,
        batch_size=12,
        max_steps=STEPS,
        log_every=1,
        checkpoint_every=3,
        output_dir=folder,
        **changes,
    )


def weights(folder):
    return load_checkpoint(newest_checkpoint(folder), only=["model"])["model"]


def rank_program(folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that sums in another order flip no rounded weight
    with join_ranks("cpu") as ranks:
        for name, changes in (VARIANTS | METHODS).items():
            for parallel in ("ddp",) if name == "cewt" else ("ddp", "fsdp"):
                train(config(folder / parallel / name, parallel=parallel, **changes))
        # From the checkpoint of one process in mid-run, and on with shards.
        train(config(folder / "resumed", parallel="fsdp", resume=True))
        # With batch norm each rank normalizes by its own part of the batch, so that nothing equals
        # a run of one process.
        train(
            replace(
                RECIPES["digits-resnet"](),
                model=ResNetConfig(widths=(8, 8), depths=(1, 1), small_images=True),
                batch_size=16,
                max_steps=4,
                output_dir=folder / "batch norm",
            )
        )
        seen = {parallel: look_closely(parallel, ranks) for parallel in ("ddp", "fsdp")}
        seen["refused"] = refusal(folder / "refused")
        (folder / f"{ranks.rank}.json").write_text(json.dumps(seen))


def look_closely(parallel, ranks):
    """Whether the ranks' weights are the same to the last bit, and how much of them each holds."""
    training = Training(config(Path("unused"), parallel=parallel), ranks)
    for _ in range(2):
        training_step(training, training.next_window())
    same = True
    for param in training.model.parameters():
        whole = full(param.detach()).clone()
        first = whole.clone()
        dist.broadcast(first, src=0)
        same = same and torch.equal(whole, first)
    held = sum(
        (p.to_local() if parallel == "fsdp" else p).numel() for p in training.model.parameters()
    )
    total = sum(p.numel() for p in training.model.parameters())
    units = sum(isinstance(module, FSDPModule) for module in training.model.modules())
    return {"same": same, "share": held / total, "units": units}


def refusal(folder):
    """What the command says of a batch that the ranks cannot share, and its exit code."""
    with contextlib.redirect_stderr(io.StringIO()) as told, pytest.raises(SystemExit) as end:
        main(["train", "digits-mlp", "--output-dir", str(folder), "--batch-size", "15"])
    return [end.value.code, told.getvalue()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    torch.set_default_dtype(torch.float64)
    try:
        for name, changes in (VARIANTS | METHODS).items():
            train(config(folder / "alone" / name, **changes))
    finally:
        torch.set_default_dtype(torch.float32)
    shutil.copytree(folder / "alone" / "n=1, accumulation 1", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / f"step-{STEPS:06d}")
    # What torchrun tells its processes.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    finish(*[Python(__file__, folder, environment=rank) for rank in ranks], timeout=240)
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def assert_same_run(first, second):
    for a, b in zip(*(read_metrics(f / "metrics.jsonl") for f in (first, second)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        # From differences of losses that transformers takes in float32.
        assert a.get("agreement") == pytest.approx(b.get("agreement"), abs=1e-2)
    results = [json.loads((f / "result.json").read_text()) for f in (first, second)]
    for name in results[0]:
        if name != "seconds":
            assert results[0][name] == pytest.approx(results[1][name], rel=1e-5), name
    for (name, a), b in zip(weights(first).items(), weights(second).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", VARIANTS | METHODS)
def test_ddp_trains_as_one_process_does(folder, name):
    assert_same_run(folder / "ddp" / name, folder / "alone" / name)


@pytest.mark.parametrize("name", [*VARIANTS, "cage after float"])
def test_fsdp_trains_as_ddp_does(folder, name):
    assert_same_run(folder / "fsdp" / name, folder / "ddp" / name)


def test_ranks_hold_the_same_weights_and_with_fsdp_half_of_them_each(folder):
    for rank in (0, 1):
        seen = json.loads((folder / f"{rank}.json").read_text())
        assert seen["ddp"] == {"same": True, "share": 1.0, "units": 0}
        assert seen["fsdp"]["same"]
        assert seen["fsdp"]["share"] == pytest.approx(0.5, abs=0.01)
        assert seen["fsdp"]["units"] == 3  # two blocks and the root


def test_a_run_of_one_process_is_resumed_on_two(folder):
    assert_same_run(folder / "resumed", folder / "alone" / "n=1, accumulation 1")


def test_a_network_with_batch_norm_trains(folder):
    result = json.loads((folder / "batch norm" / "result.json").read_text())
    assert result["refined_steps"] == 4
    assert math.isfinite(result["test_loss"])


def test_the_command_runs_under_torchrun_and_one_rank_speaks(tmp_path):
    arguments = ("train", "digits-mlp", "--output-dir", tmp_path, "--max-steps", 4)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = Python(*torchrun, "-m", "fogzo_lab.cli.main", *arguments)
    told, errors = done.communicate(timeout=240)
    assert done.returncode == 0, errors[-3000:]
    assert told.count("report:") == 1
    assert math.isfinite(json.loads((tmp_path / "result.json").read_text())["test_loss"])


def test_shards_lie_where_the_ranks_compute(monkeypatch):
    """On a machine with a GPU, fully_shard would take that for ranks on the CPU."""
    meshes = []

    def fully_shard(module, mesh=None):
        meshes.append(mesh)
        return module

    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", fully_shard)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        ranks = Ranks(torch.device("cpu"), 0, 2)
        parallelize(nn.Linear(2, 2), "fsdp", ranks)
        assert [(mesh.device_type, mesh.size()) for mesh in meshes] == [("cpu", 2)]
    finally:
        dist.destroy_process_group()


def test_a_batch_that_ranks_cannot_share_is_one_message(folder):
    for rank in (0, 1):
        code, told = json.loads((folder / f"{rank}.json").read_text())["refused"]
        assert code == 2
        assert len(told.splitlines()) == 1
        assert "cannot be shared equally by 2 rank(s)" in told
        assert "--batch-size 14" in told
    assert not (folder / "refused").exists()


if __name__ == "__main__":
    rank_program(Path(sys.argv[1]))
