"""Runs that are killed, and go on as if nothing had happened."""

import json
import random
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from shrunk import shrunk

from fogzo_lab.cli.main import main
from fogzo_lab.data.config import TextConfig
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.checkpoint import newest_checkpoint, save_checkpoint
from fogzo_lab.training.loop import train
from fogzo_lab.training.parallel import Ranks
from fogzo_lab.training.run_folder import read_metrics
from fogzo_lab.training.state import Training
from forked import Python

RUNS = {
    # Dropout, random crops, an average of the weights, accumulation and clipping.
    "deit": (
        *("digits-deit", "--model.depth", 1, "--model.width", 24, "--model.dropout", 0.1),
        *("--batch-size", 16, "--accumulation", 2, "--ema-decay", 0.9),
        *("--data.augmentation.mixup", 0.8, "--data.max-eval-images", 64),
    ),
    # Running statistics, quantized activations, fp16's gradient scaler.
    "resnet": (
        *("digits-resnet", "--model.widths", 8, 8, "--model.depths", 1, 1, "--batch-size", 16),
        *("--activations.preset", "lsq", "--activations.bits", 4, "--precision", "fp16"),
        *("--data.max-eval-images", 64),
    ),
    "llama": (
        *("pydoc-llama", "--model.depth", 1, "--model.width", 16, "--batch-size", 4),
        *("--optimizer", "muon", "--schedule", "wsd", "--quantizer.preset", "quest"),
        *("--data.max-eval-blocks", 16),
    ),
}
STEPS = 20


def command(name, folder, *more):
    arguments = ("train", *RUNS[name], "--max-steps", STEPS, "--log-every", 1)
    arguments += ("--checkpoint-every", 4, "--output-dir", folder, *more)
    return list(map(str, arguments))


def kill_in_the_middle(arguments, folder, steps):
    """Start a run in a process of its own and kill it once it has logged so many steps."""
    process = Python("-m", "fogzo_lab.cli.main", *arguments)
    deadline = time.monotonic() + 120
    log = folder / "metrics.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def without_clock(values):
    return {name: value for name, value in values.items() if name != "seconds"}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as those that are killed have
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_twice_and_resumed_gives_the_same_numbers_bit_for_bit(name, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(command(name, whole))
    kill_in_the_middle(command(name, killed), killed, random.randint(1, STEPS // 2))
    resume = command(name, killed, "--resume")
    kill_in_the_middle(resume, killed, random.randint(STEPS // 2 + 1, STEPS - 5))
    main(resume)
    expected, found = (read_metrics(folder / "metrics.jsonl") for folder in (whole, killed))
    assert [without_clock(m) for m in found] == [without_clock(m) for m in expected]
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, killed)]
    assert without_clock(results[0]) == without_clock(results[1])
    assert len(list((killed / "checkpoints").iterdir())) == 2


@pytest.fixture
def config(tmp_path):
    recipe = RECIPES["digits-mlp"]()
    return replace(recipe, output_dir=tmp_path / "run", max_steps=20, checkpoint_every=5)


def test_resuming_where_there_is_nothing_begins(config):
    assert train(replace(config, resume=True))["steps"] == 20


def test_resuming_a_finished_run_evaluates_it_again(config):
    first = train(config)
    again = train(replace(config, resume=True))
    assert again == first


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_resume_with_another_number_of_ranks_says_what_differs(config, fraction, caplog):
    config = replace(config, probe_fraction=fraction)
    state = Training(config, Ranks(torch.device("cpu"))).state_dict() | {"ranks": 2}
    save_checkpoint(config.output_dir, 0, state, keep=1)
    Training(config, Ranks(torch.device("cpu")), newest_checkpoint(config.output_dir))
    said = "with 1 ranks and had 2: each draws its own part of the batch for probes" in caplog.text
    assert said == (fraction < 1) and ("ranks" in caplog.text) == said


def test_resuming_another_config_says_what_differs(config):
    train(config)
    before = (config.output_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"learning-rate \(0.003 there, 0.01 here\)"):
        train(replace(config, resume=True, learning_rate=0.01))
    with pytest.raises(ValueError, match=r"model.hidden"):
        train(replace(config, resume=True, model=replace(config.model, hidden=(4,))))
    assert (config.output_dir / "metrics.jsonl").read_bytes() == before


def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(config, caplog):
    first = train(config)
    newest = config.output_dir / "checkpoints" / "step-000020"
    file = next(newest.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    again = train(replace(config, resume=True))
    assert "not whole" in caplog.text
    assert without_clock(again) == without_clock(first)


def test_a_line_cut_short_by_a_kill_is_dropped(config):
    train(config)
    path = config.output_dir / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 20, "lo')
    train(replace(config, resume=True))
    assert path.read_text() == whole


def test_a_stream_of_text_goes_on_at_the_block_where_it_stood(tmp_path):
    for shard in range(3):
        rows = [json.dumps({"text": f"{shard} {i} " * (i % 7 + 3)}) for i in range(300)]
        (tmp_path / f"train-{shard}.jsonl").write_text("\n".join(rows) + "\n")
    recipe = shrunk(RECIPES["pydoc-llama"](), accumulation=1)
    data = TextConfig(
        dataset=str(tmp_path), streaming=True, context=16, max_eval_blocks=4, column="text"
    )
    config = replace(recipe, data=data, max_steps=8, checkpoint_every=3, log_every=1)
    whole = train(replace(config, output_dir=tmp_path / "whole"))
    assert "train_loss" not in whole
    folder = tmp_path / "resumed"
    train(replace(config, output_dir=folder, keep_checkpoints=4))
    for step in (6, 8):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:06d}")
    again = train(replace(config, output_dir=folder, resume=True))
    assert without_clock(again) == without_clock(whole)
    first, second = (read_metrics(tmp_path / f / "metrics.jsonl") for f in ("whole", "resumed"))
    assert [without_clock(m) for m in first] == [without_clock(m) for m in second]
