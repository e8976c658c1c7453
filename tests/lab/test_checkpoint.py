"""Checkpoints: what comes back, what a crash leaves, what is refused.

This file is also the program of the processes that are killed or starved of disk:
``python test_checkpoint.py PROGRAM FOLDER``.
"""

import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_tools import files, same, state_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from fogzo_lab.training import checkpoint_format
from fogzo_lab.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    restore_rng,
    rng_state,
    save_checkpoint,
)
from forked import Python, finish

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape)
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    whole = torch.frombuffer(bytearray(data or b"?"), dtype=torch.uint8)[: len(data)]
    tensor = whole.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


keys = st.integers() | st.text(max_size=4) | st.sampled_from(["a", "a.b", "b", "__metadata__"])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors()
states = st.dictionaries(
    keys,
    st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(keys, inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(state=states)
def test_what_was_saved_comes_back_bit_for_bit_and_type_for_type(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("run")
    path = save_checkpoint(folder, 1, state, keep=1)
    assert newest_checkpoint(folder) == path
    assert same(load_checkpoint(path), state)
    shutil.rmtree(folder)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(run, dtype):
    noise = torch.randint(0, 2, (6 * dtype.itemsize,), dtype=torch.uint8)
    state = {"scalar": noise.view(dtype)[0], "matrix": noise.view(dtype).view(2, 3).T}
    state |= {"empty": state["matrix"][:0], "one of another": noise}
    assert same(load_checkpoint(save_checkpoint(run, 1, state, keep=1)), state)


def test_tensors_may_share_memory_and_need_gradients(run):
    layer = nn.Linear(4, 4)
    tied = {
        "tied": layer.weight,
        "again": layer.weight,
        "row": layer.weight[1],
        "T": layer.weight.T,
    }
    loaded = load_checkpoint(save_checkpoint(run, 1, tied, keep=1))
    assert same(loaded, {name: tensor.detach() for name, tensor in tied.items()})
    assert not any(tensor.requires_grad for tensor in loaded.values())
    conjugate = torch.tensor([1 + 2j]).conj()
    loaded = load_checkpoint(save_checkpoint(run, 2, {"conjugate": conjugate}, keep=1))
    assert torch.equal(loaded["conjugate"], conjugate)


def test_the_base_of_a_subclass_comes_back(run):
    state = {"a": OrderedDict(b=np.float64(0.1)), "size": torch.Size([2])}
    assert same(
        load_checkpoint(save_checkpoint(run, 1, state, keep=1)), {"a": {"b": 0.1}, "size": (2,)}
    )


def test_a_loaded_tensor_outlives_its_file(run):
    path = save_checkpoint(run, 1, state_of(1), keep=1)
    loaded = load_checkpoint(path)
    shutil.rmtree(path)
    loaded["model"]["weight"] += 1
    assert loaded["model"]["weight"].tolist() == [2.0] * 64


def test_only_some_keys_are_read(run):
    path = save_checkpoint(run, 1, state_of(1), keep=1)
    assert load_checkpoint(path, only=["step", "lr"]) == {"step": 1, "lr": 1.0}


def test_the_files_are_safetensors_and_json_and_nothing_else(run):
    path = save_checkpoint(run, 123, state_of(123), keep=1)
    name = "tensors-00000-of-00001.safetensors"
    assert files(run / "checkpoints") == [
        f"step-000123/{file}" for file in ("manifest.json", "state.json", name)
    ]
    with safe_open(path / name, framework="pt") as file:
        assert sorted(file.keys()) == ["model.bias", "model.weight"]
        assert file.get_tensor("model.bias").tolist() == [123.0] * 3
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (checkpoint_format.FORMAT, 123)
    assert {n: r["size"] for n, r in manifest["files"].items()} == {
        n: (path / n).stat().st_size for n in (name, "state.json")
    }


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1, {2: object()}]}, r"got object in state\['a'\]\[1\]\[2\]: save its state_dict"),
        ({"a": {(1, 2): 3}}, r"keys are str or int, got \(1, 2\) in state\['a'\]: str\(key\)"),
        ({"a": torch.eye(2).to_sparse()}, r"dense .* in state\['a'\]: tensor.to_dense\(\)"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_and_leaves_nothing(run, state, message):
    save_checkpoint(run, 1, state_of(1), keep=1)
    before = files(run)
    with pytest.raises(ValueError, match=message):
        save_checkpoint(run, 2, state, keep=1)
    assert files(run) == before


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(run, keep):
    for step in (5, 10, 999_999, 1_000_000, 1_000_005):
        save_checkpoint(run, step, state_of(step), keep=keep)
    kept = [f"step-{step:06d}" for step in (5, 10, 999_999, 1_000_000, 1_000_005)][-keep:]
    assert sorted(os.listdir(run / "checkpoints")) == sorted(kept)
    assert newest_checkpoint(run).name == "step-1000005"


def test_the_one_just_written_stays_even_if_later_ones_are_there(run):
    for step in (10, 20):
        path = save_checkpoint(run, step, state_of(step), keep=2)
    (path / "state.json").write_text("{")
    save_checkpoint(run, 11, state_of(11), keep=1)
    assert sorted(os.listdir(run / "checkpoints")) == ["step-000011", "step-000020"]
    assert newest_checkpoint(run).name == "step-000011"


def test_a_step_can_be_saved_again(run):
    save_checkpoint(run, 1, {"version": 1}, keep=1)
    path = save_checkpoint(run, 1, {"version": 2, "more": torch.ones(2)}, keep=1)
    assert load_checkpoint(path)["version"] == 2
    assert os.listdir(run / "checkpoints") == ["step-000001"]


def test_a_crash_while_a_step_is_replaced_loses_nothing(run, monkeypatch):
    save_checkpoint(run, 1, {"version": 1}, keep=1)
    replace = os.replace

    def crash(source, target):
        if Path(source).name.endswith(".partial"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(run, 1, {"version": 2}, keep=1)
    monkeypatch.undo()
    assert load_checkpoint(newest_checkpoint(run)) == {"version": 1}
    save_checkpoint(run, 1, {"version": 3}, keep=1)
    assert load_checkpoint(newest_checkpoint(run)) == {"version": 3}
    assert os.listdir(run / "checkpoints") == ["step-000001"]


def test_what_a_killed_process_left_is_cleared(run):
    stale = run / "checkpoints" / ".step-000007.partial"
    stale.mkdir(parents=True)
    (stale / "state.json").write_text("half")
    assert newest_checkpoint(run) is None
    save_checkpoint(run, 8, state_of(8), keep=1)
    assert os.listdir(run / "checkpoints") == ["step-000008"]


def test_no_folder_no_checkpoint(run):
    assert newest_checkpoint(run) is None
    assert not run.exists()


def garble(path, damage):
    tensors, state, manifest = (
        path / name
        for name in ("tensors-00000-of-00001.safetensors", "state.json", "manifest.json")
    )
    if damage == "truncated tensors":
        os.truncate(tensors, tensors.stat().st_size - 1)
    elif damage == "missing tensors":
        tensors.unlink()
    elif damage == "truncated state":
        os.truncate(state, 5)
    elif damage == "missing manifest":
        manifest.unlink()
    elif damage == "empty manifest":
        os.truncate(manifest, 0)
    elif damage == "garbage manifest":
        manifest.write_bytes(b"\xff\x00garbage")
    elif damage == "other JSON":
        manifest.write_text('[{"format": 1}]')
    elif damage == "no hash":
        manifest.write_text('{"format": 1, "files": {"state.json": {"size": 3}}}')
    elif damage == "not in the manifest":
        manifest.write_text('{"format": 1, "files": {}}')
    elif damage == "later format":
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))


DAMAGES = {
    "truncated tensors": r"tensors-00000-of-00001.safetensors has \d+ bytes instead of \d+",
    "missing tensors": r"tensors-00000-of-00001.safetensors cannot be read \(No such file",
    "truncated state": r"state.json has 5 bytes instead of \d+",
    "missing manifest": r"manifest.json cannot be read \(No such file",
    "empty manifest": r"manifest.json is not a checkpoint's manifest",
    "garbage manifest": r"manifest.json is not a checkpoint's manifest",
    "other JSON": r"manifest.json is not a checkpoint's manifest",
    "no hash": r"manifest.json is not a checkpoint's manifest",
    "not in the manifest": r"manifest.json does not name state.json",
    "later format": r"manifest.json is of format 2, and this version of fogzo reads 1",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_skipped_and_left_alone(run, caplog, damage):
    good = save_checkpoint(run, 1, state_of(1), keep=5)
    bad = save_checkpoint(run, 2, state_of(2), keep=5)
    garble(bad, damage)
    before = files(run)
    with pytest.raises(ValueError, match=DAMAGES[damage] + ".*: use an earlier checkpoint"):
        load_checkpoint(bad)
    with caplog.at_level(logging.WARNING):
        newest = newest_checkpoint(run)
    assert newest == good
    assert str(bad) in caplog.text
    assert same(load_checkpoint(newest), state_of(1))
    assert files(run) == before


def test_no_flipped_bit_goes_unnoticed(run):
    path = save_checkpoint(run, 1, state_of(1), keep=1)
    stream = random.Random(0)
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for _ in range(60):
            damaged = bytearray(original)
            damaged[stream.randrange(len(damaged))] ^= 1 << stream.randrange(8)
            file.write_bytes(damaged)
            try:
                assert same(load_checkpoint(path), state_of(1))  # a bit that means nothing
                assert file.name == "manifest.json"
            except ValueError as error:
                assert "use an earlier checkpoint" in str(error)
        file.write_bytes(original)


def test_missing_pieces_are_noticed(run, monkeypatch):
    monkeypatch.setattr("fogzo_lab.training.checkpoint.own_piece", lambda *_: None)
    path = save_checkpoint(run, 1, state_of(1), keep=1)
    with pytest.raises(ValueError, match=r"state.json model.weight has missing pieces"):
        load_checkpoint(path)


def test_a_folder_that_cannot_be_written_is_an_os_error(run):
    run.mkdir()
    (run / "checkpoints").write_text("a file")
    # --resume would be refused, as there is nothing to go on from.
    says = r"of step 1 could .*exists.*there is no earlier one.*the same command with --overwrite$"
    with pytest.raises(CheckpointError, match=says):
        save_checkpoint(run, 1, state_of(1), keep=1)


def full_disk_program(folder):
    """The file system refuses what is longer than 100 kB."""
    good = save_checkpoint(folder, 1, state_of(1), keep=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save_checkpoint(folder, 2, {"weight": torch.zeros(100, 1000)}, keep=1)
    except CheckpointError as error:
        text = str(error)
    assert "of step 2 could not be written: [Errno 27]" in text, text
    assert f"the newest good one is {good}: free space under {folder}" in text, text
    assert text.endswith("then run the same command with --resume"), text
    assert os.listdir(folder / "checkpoints") == ["step-000001"]
    assert same(load_checkpoint(good), state_of(1))


def killed_program(folder):
    """Children that save in a loop, each step twice, and are killed at any moment."""
    stream, seen = random.Random(), set()
    for _ in range(30):
        newest = newest_checkpoint(folder)
        step = load_checkpoint(newest)["step"] if newest else 1
        child = os.fork()
        if child == 0:
            while True:
                save_checkpoint(folder, step, state_of(step), keep=1)
                save_checkpoint(folder, step, state_of(step), keep=1)
                step += 1
        time.sleep(stream.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        newest = newest_checkpoint(folder)
        if newest is None:
            assert not seen, "a checkpoint was lost"
            continue
        found = load_checkpoint(newest)
        assert same(found, state_of(found["step"]))
        assert found["step"] >= max(seen, default=0)
        seen.add(found["step"])
    assert len(seen) > 1, "too slow a machine to tell"


def test_a_full_disk_keeps_the_earlier_checkpoint_and_says_what_to_do(tmp_path):
    finish(Python(__file__, "full_disk", tmp_path / "run"))


def test_a_process_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    finish(Python(__file__, "killed", tmp_path / "run"))


def draws():
    return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.randn(3).tolist()


def test_the_random_streams_go_on(run):
    random.gauss(0, 1), np.random.randn()  # half of a pair is left in both
    path = save_checkpoint(run, 1, {"rng": rng_state()}, keep=1)
    first = draws()
    assert draws() != first
    restore_rng(load_checkpoint(path)["rng"])
    assert draws() == first


def test_a_rank_without_a_stream_of_its_own_keeps_the_present_one():
    before = torch.get_rng_state()
    restore_rng({"ranks": []})
    assert torch.equal(torch.get_rng_state(), before)


if __name__ == "__main__":
    {"full_disk": full_disk_program, "killed": killed_program}[sys.argv[1]](Path(sys.argv[2]))
