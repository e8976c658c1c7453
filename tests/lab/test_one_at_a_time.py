"""One training in a folder at a time, and what a signal makes of it: real processes."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_tools import files

from fogzo_lab.data.config import ImagesConfig
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system.folder_lock import locked
from fogzo_lab.training.checkpoint import newest_checkpoint
from fogzo_lab.training.evaluate import EvalConfig, evaluate_run
from fogzo_lab.training.loop import train
from fogzo_lab.training.run_folder import read_metrics
from forked import Python

STEPS = 300
OPTIONS = ("--max-steps", STEPS, "--log-every", 1, "--checkpoint-every", 150, "--device", "cpu")


def config(folder, **changes):
    recipe = replace(RECIPES["digits-mlp"](), output_dir=folder, max_steps=STEPS, log_every=1)
    return replace(recipe, checkpoint_every=150, device="cpu", **changes)


def start(folder, *more):
    """A training in a process group of its own."""
    arguments = ("train", "digits-mlp", "--output-dir", folder, *OPTIONS, *more)
    return Python("-m", "fogzo_lab.cli.main", *arguments, new_session=True)


def wait_for(folder, step, process):
    deadline = time.monotonic() + 100
    while len(read_metrics(folder / "metrics.jsonl")) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def same_runs(folder, other):
    logs = [read_metrics(path / "metrics.jsonl") for path in (folder, other)]
    clocks = [[{**line, "seconds": 0} for line in log] for log in logs]
    return clocks[0] == clocks[1]


def test_a_training_keeps_others_out_and_sigterm_ends_it_where_it_can_go_on(tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    # A scheduler signals whole groups, loaders among them.
    data = ImagesConfig(workers=1)
    expected = train(config(whole, data=data))
    assert not multiprocessing.active_children()  # with one that ignores signals none would exit
    process = start(folder, "--data.workers", 1)
    wait_for(folder, 10, process)
    for changes in ({}, {"resume": True}, {"overwrite": True}):
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"another process is at work in .*--output-dir"):
            train(config(folder, data=data, **changes))
        assert time.monotonic() - began < 5
    assert evaluate_run(EvalConfig(run=folder))["step"] >= 0  # reading disturbs nobody
    os.killpg(process.pid, signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143, told
    reached = int(newest_checkpoint(folder).name.removeprefix("step-"))
    assert told.strip().splitlines() == [
        f"fogzo: ended by SIGTERM; --resume goes on from the checkpoint of step {reached}"
    ]
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == reached
    result = train(config(folder, data=data, resume=True))
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}
    assert same_runs(folder, whole)


def test_ctrl_c_ends_with_a_checkpoint(tmp_path):
    process = start(tmp_path)
    wait_for(tmp_path, 5, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    reached = int(newest_checkpoint(tmp_path).name.removeprefix("step-"))
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == reached
    assert told == f"fogzo: interrupted; --resume goes on from the checkpoint of step {reached}\n"


def test_a_lock_of_the_dead_keeps_nobody_out(tmp_path):
    tmp_path = tmp_path / "my runs"
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.write(tell, b"!")
            time.sleep(100)
    os.read(ready, 1)
    says = r"another process is at work in .*--output-dir '.*my runs-2'$"
    with pytest.raises(ValueError, match=says), locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_locked_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    says = r"new cannot be .* \(No locks.*--output-dir runs/new"
    with pytest.raises(ValueError, match=says), locked(tmp_path / "new"):
        pass
    (tmp_path / "file").write_text("")
    says = r"file cannot be made.* \(File exists\)"
    with pytest.raises(ValueError, match=says), locked(tmp_path / "file"):
        pass


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    program = (
        "import signal, time; from fogzo_lab.system import signals\n"
        "with signals.held_back() as waiting:\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert process.stdout.readline() == "ready\n"
    for _ in range(3):  # those of a launcher, which come at the same moment
        process.send_signal(signal.SIGINT)
    time.sleep(0.8)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in told


def test_a_run_without_checkpoints_ends_too_and_says_that_it_has_none(tmp_path):
    def at_step_three(metrics):
        if metrics["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as told:
        train(replace(config(tmp_path), checkpoint_every=-1), at_step_three)
    assert told.value.__notes__ == ["there is no checkpoint to go on from"]
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("every", [0, 2, 3, 150])
def test_the_step_of_the_signal_is_done_and_saved_once(tmp_path, every):
    def at_step_three(metrics):
        if metrics["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as told:
        train(replace(config(tmp_path), checkpoint_every=every, max_steps=9), at_step_three)
    assert newest_checkpoint(tmp_path).name == "step-000004"
    assert told.value.__notes__ == ["--resume goes on from the checkpoint of step 4"]
    assert train(replace(config(tmp_path), max_steps=9, resume=True))["steps"] == 9


def test_a_folder_that_a_refused_run_made_is_gone_again(tmp_path):
    folder = tmp_path / "a" / "b"
    with pytest.raises(ValueError, match="refused"), locked(folder):
        assert (folder / ".lock").exists()
        raise ValueError("refused")
    assert not (tmp_path / "a").exists()
    folder.mkdir(parents=True)
    (folder / "mine").write_text("")
    with pytest.raises(ValueError, match="refused"), locked(folder):
        raise ValueError("refused")
    assert files(tmp_path) == ["a/b/mine"]
    with pytest.raises(ValueError, match="cannot be shared"):
        train(config(tmp_path / "c", batch_size=15, accumulation=2))
    assert not (tmp_path / "c").exists()
