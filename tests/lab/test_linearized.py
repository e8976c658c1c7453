"""Runs whose probes need no forward pass."""

import json
from dataclasses import replace

import pytest
from shrunk import shrunk

from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.loop import train


def run(folder, recipe="digits-mlp", **changes):
    config = shrunk(RECIPES[recipe](), output_dir=folder, log_every=1, kappa=0.1, **changes)
    result = train(config)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return result, [json.loads(line)["agreement"] for line in lines]


@pytest.mark.parametrize("recipe", ["digits-mlp", "pydoc-llama"])
def test_it_predicts_the_agreement_of_runs_that_measure_it(recipe, tmp_path):
    # Two micro-batches per step, whose gradients add up.
    linear, predicted = run(tmp_path / "linear", recipe, probe_loss="linear")
    measured, agreement = run(tmp_path / "measured", recipe)
    assert (linear["extra_forwards"], measured["extra_forwards"]) == (0, 4)
    assert predicted[0] == pytest.approx(agreement[0], rel=0.5, abs=0.3)
    assert None not in predicted
    assert linear["train_loss"] == pytest.approx(measured["train_loss"], rel=0.05)


def test_a_float_phase_is_waited_for(tmp_path):
    _, agreement = run(tmp_path, probe_loss="linear", quantize_from=0.5, max_steps=4)
    assert agreement[:2] == [None, None]
    assert None not in agreement[2:]


@pytest.mark.parametrize(
    "changes",
    [
        {"one_sided": True},
        {"probe_fraction": 0.5},
        {"probe_precision": "bf16"},
        {"evaluate": "lean"},
        {"compile": True},
        {"parallel": "fsdp"},
    ],
)
def test_what_is_about_forward_passes_is_refused(changes):
    with pytest.raises(ValueError, match="or --probe-loss measured"):
        replace(RECIPES["digits-mlp"](), probe_loss="linear", **changes)
