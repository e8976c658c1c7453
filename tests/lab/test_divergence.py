"""Runs that leave all sense: they end, say so in every file, and keep what is good."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from shrunk import shrunk

from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.checkpoint import load_checkpoint, newest_checkpoint
from fogzo_lab.training.loop import DivergedError, train
from fogzo_lab.training.model_config import QuantizerConfig
from fogzo_lab.training.parallel import Ranks
from fogzo_lab.training.run_folder import read_metrics, read_result
from fogzo_lab.training.state import Training
from fogzo_lab.training.tasks import ImageTask

FLOAT = QuantizerConfig(preset="none")


@pytest.fixture
def config(tmp_path):
    recipe = RECIPES["digits-mlp"]()
    return replace(recipe, output_dir=tmp_path / "run", max_steps=20, checkpoint_every=1)


@pytest.mark.filterwarnings("ignore:no weight rounds differently:RuntimeWarning")
@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("quantizer", [FLOAT, QuantizerConfig(preset="lsq")])
def test_a_learning_rate_of_a_million_is_told(config, steps, optimizer, quantizer):
    config = replace(config, learning_rate=1e6, max_steps=steps, optimizer=optimizer)
    config = replace(config, quantizer=quantizer, keep_checkpoints=9)
    with pytest.raises(DivergedError, match=r"at step .* loss is .*: try a smaller"):
        train(config)
    result = read_result(config.output_dir)
    assert result["diverged"] is True
    assert "test_loss" not in result
    last = read_metrics(config.output_dir / "metrics.jsonl")[-1]
    assert last["step"] == result["steps"] <= 5
    assert last["loss"] is None or last["loss"] > 1000
    # Weights that gave senseless losses are none to go on from.
    newest = newest_checkpoint(config.output_dir)
    assert load_checkpoint(newest)["step"] <= 1


def test_a_loss_that_is_not_finite_is_told_in_the_result(config):
    sgd = replace(config, optimizer="sgd", learning_rate=1e30, quantizer=FLOAT)
    with pytest.raises(DivergedError, match=r"nan|inf|loss"):
        train(sgd)
    assert json.loads((config.output_dir / "result.json").read_text())["diverged"] is True


def test_a_first_loss_that_is_infinite_is_told_at_once(config, monkeypatch):
    monkeypatch.setattr(ImageTask, "loss", lambda *_: torch.tensor(math.inf, requires_grad=True))
    with pytest.raises(DivergedError, match="at step 1 the training loss is inf:"):
        train(replace(config, estimator="ste"))


def test_an_evaluation_that_is_not_finite_is_told(config, monkeypatch):
    monkeypatch.setattr(Training, "evaluate", lambda _: {"train_loss": 0.1, "test_loss": math.nan})
    with pytest.raises(DivergedError, match="evaluation"):
        train(config)
    assert read_result(config.output_dir)["diverged"] is True
    assert load_checkpoint(newest_checkpoint(config.output_dir))["step"] == 19


def test_a_run_that_diverges_again_after_it_is_resumed_sets_its_checkpoint_aside_again(config):
    config = replace(config, learning_rate=1e6, quantizer=FLOAT, keep_checkpoints=9)
    for resume in (False, True, True):
        with pytest.raises(DivergedError):
            train(replace(config, resume=resume))
        found = sorted(path.name for path in (config.output_dir / "checkpoints").iterdir())
        assert found == [
            "step-000000",
            "step-000001.diverged",
            "step-000002.diverged",
            "step-000003.diverged",
        ]
        shutil.rmtree(config.output_dir / "checkpoints" / "step-000002.diverged")
        assert read_result(config.output_dir)["diverged"] is True


def test_a_run_that_is_resumed_in_the_middle_of_a_divergence_ends_where_it_would_have(config):
    config = replace(config, learning_rate=1e6, quantizer=FLOAT, keep_checkpoints=9)
    with pytest.raises(DivergedError):
        train(config)
    end, names = read_result(config.output_dir)["steps"], diverged(config)

    def stop(metrics):
        if metrics["step"] == end - 1:
            raise KeyboardInterrupt

    part = replace(config, output_dir=config.output_dir.with_name("part"), log_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(part, stop)
    with pytest.raises(DivergedError):
        train(replace(part, resume=True))
    assert (read_result(part.output_dir)["steps"], diverged(part)) == (end, names)


def diverged(config):
    return sorted(path.name for path in (config.output_dir / "checkpoints").glob("*.diverged"))


@pytest.mark.parametrize("first", [0.001, 2.3, 50.0])
def test_a_healthy_run_is_left_alone_whatever_its_spikes(config, first):
    training = Training(config, Ranks(torch.device("cpu")))
    for loss in (first, 1000 * max(first, 1.0), 999.0, 2 * first):
        training.watch(loss)
        assert training.diverged_steps == 0
    training.watch(1001 * max(first, 1.0))
    training.watch(math.nan)
    assert training.diverged_steps == 2
    training.watch(1.0)
    assert training.diverged_steps == 0


def test_the_first_loss_is_that_of_the_run_and_not_of_what_resumed_it(config):
    whole = train(replace(config, max_steps=4))
    assert load_checkpoint(newest_checkpoint(config.output_dir))["first_loss"] == pytest.approx(
        read_metrics(config.output_dir / "metrics.jsonl")[0]["loss"]
    )
    shutil.rmtree(config.output_dir / "checkpoints" / "step-000004")
    again = train(replace(config, max_steps=4, resume=True))
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}


@pytest.mark.parametrize("estimator", ["spsa", "control-variate"])
def test_statistics_that_an_estimator_does_not_have_are_null(config, tmp_path, estimator):
    config = shrunk(config, estimator=estimator, output_dir=tmp_path / "other", log_every=1)
    train(config)
    line = read_metrics(config.output_dir / "metrics.jsonl")[-1]
    assert {"kappa", "agreement"} <= line.keys()
