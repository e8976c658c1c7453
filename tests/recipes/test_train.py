import json
import math
from dataclasses import replace
from typing import get_args

import datasets
import numpy
import pytest
import torch

import fogzo
from fogzo.recipes import RECIPES, train
from fogzo.recipes.config import DataConfig, EstimatorName, QuantizerConfig
from fogzo.recipes.data import load_images
from fogzo.recipes.run_folder import read_metrics
from fogzo.recipes.train import DivergedError, build_model


@pytest.fixture
def config(tmp_path):
    return replace(RECIPES["digits-mlp"](), output_dir=tmp_path / "run", max_steps=30)


@pytest.mark.parametrize("estimator", get_args(EstimatorName))
def test_a_run_folder_holds_what_is_needed_to_read_and_repeat_the_run(config, estimator):
    config = replace(config, estimator=estimator)
    seen = []
    result = train(config, seen.append)
    folder = config.output_dir
    assert json.loads((folder / "config.json").read_text())["estimator"] == estimator
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 10, 20, 30]
    assert all({"step", "loss", "seconds"} <= set(m) for m in metrics)
    assert [m["step"] for m in seen] == list(range(1, 31))
    assert json.loads((folder / "result.json").read_text()) == result
    probes = {"ste": 0, "placebo": 0, "fogzo-paired": 4}.get(estimator, 2)
    assert result["extra_forwards"] == 30 * probes
    assert not list(folder.rglob("*.partial"))


def test_the_checkpoint_holds_the_network_that_was_evaluated(config):
    result = train(config)
    state = torch.load(config.output_dir / "checkpoints" / "step-000030.pt")
    data = load_images(config.data)
    model = build_model(config, data)
    model.load_state_dict(state["model"])
    with torch.no_grad():
        accuracy = (model(data.test.images).argmax(1) == data.test.labels).double().mean()
    assert float(accuracy) == result["test_accuracy"]
    assert state["estimator"] == {"step": 30, "seed": 0}


def test_the_same_config_gives_the_same_run_and_another_seed_another(config, tmp_path):
    first = train(config)
    again = train(replace(config, output_dir=tmp_path / "again"))
    other = train(replace(config, output_dir=tmp_path / "other", seed=1))
    assert first["train_loss"] == again["train_loss"] != other["train_loss"]


def test_ste_and_fogzo_start_from_the_same_weights_and_leave_the_global_stream_alone(config):
    state = torch.get_rng_state()
    data = load_images(config.data)
    a, b = build_model(config, data), build_model(replace(config, estimator="ste"), data)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_learns_digits_well_above_the_majority_class(config):
    result = train(replace(config, max_steps=150))
    assert result["test_accuracy"] > 0.7
    float_config = replace(config, max_steps=150, quantizer=QuantizerConfig(preset="none"))
    assert train(float_config)["test_accuracy"] > 0.88


def test_a_diverging_run_stops_with_its_metrics_on_disk(config):
    in_float = replace(config, quantizer=QuantizerConfig(preset="none"), optimizer="sgd")
    with pytest.raises(DivergedError, match="smaller --learning-rate"):
        train(replace(in_float, learning_rate=1e30))
    last = read_metrics(config.output_dir / "metrics.jsonl")[-1]
    assert last["loss"] is None  # JSON has no infinity


def test_plain_ste_steps_come_first_when_asked(config):
    result = train(replace(config, start=0.5))
    assert result["extra_forwards"] == 30


def test_weights_are_all_quantized_in_the_shallow_nets(config):
    model = build_model(RECIPES["digits-mlp"](), load_images(config.data))
    assert [w.name for w in fogzo.quantized_weights(model)] == ["0.weight", "2.weight"]


def test_digits_are_split_once_and_for_all(config):
    data = load_images(config.data)
    assert (len(data.train), len(data.validation), len(data.test)) == (1146, 202, 449)
    assert data.num_classes == 10
    assert math.isclose(float(data.train.images.std()), 1, rel_tol=0.05)


@pytest.fixture
def image_folder(tmp_path):
    """A data set as the hub lays it out: parquet files of PNG images and labels."""
    rng = numpy.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split, count in (("train", 40), ("test", 10)):
        images = [rng.integers(0, 255, (6, 6), dtype=numpy.uint8) for _ in range(count)]
        rows = {"image": images, "label": [i % 3 for i in range(count)]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "data"


def test_a_local_folder_of_parquet_files_trains(config, image_folder):
    data = DataConfig(dataset=str(image_folder))
    loaded = load_images(data)
    assert loaded.train.images.shape == (34, 36)
    assert loaded.num_classes == 3
    result = train(replace(config, data=data, max_steps=3, batch_size=8))
    assert math.isfinite(result["test_loss"])


def test_data_that_cannot_be_used_says_what_to_do(config, image_folder, tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        load_images(DataConfig(dataset=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="could not load"):
        load_images(DataConfig(dataset=str(tmp_path / "empty")))
    (image_folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="not test"):
        load_images(DataConfig(dataset=str(image_folder)))
    with pytest.raises(ValueError, match="--batch-size 1146"):
        train(replace(config, batch_size=5000))
