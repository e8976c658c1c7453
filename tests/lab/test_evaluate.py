import json
from dataclasses import replace

import pytest
from shrunk import shrunk

from fogzo_lab.cli.main import main
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training import evaluate
from fogzo_lab.training.evaluate import EvalConfig, evaluate_run
from fogzo_lab.training.loop import train
from fogzo_lab.training.model_config import QuantizerConfig

FLOAT = QuantizerConfig(preset="none")


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.5}], ids=["last", "average"])
@pytest.mark.parametrize("name", ["digits-mlp", "digits-resnet", "pydoc-llama"])
def test_a_run_is_evaluated_to_the_numbers_it_ended_with(name, changes, tmp_path):
    config = shrunk(
        RECIPES[name](),
        output_dir=tmp_path,
        checkpoint_every=0,
        activations=QuantizerConfig(preset="lsq", bits=4),
        **changes,
    )
    result = train(config)
    found = evaluate_run(EvalConfig(run=tmp_path))
    assert (found.pop("run"), found.pop("step")) == (str(tmp_path), 2)
    assert found == {name: value for name, value in result.items() if name in found}
    assert "test_loss" in found


def test_inputs_are_measured_in_the_network_that_is_evaluated(tmp_path, monkeypatch):
    config = shrunk(RECIPES["digits-resnet"](), output_dir=tmp_path, quantizer=FLOAT)
    train(replace(config, checkpoint_every=0))
    modes = []
    own = evaluate.calibrate_activations
    monkeypatch.setattr(
        evaluate,
        "calibrate_activations",
        lambda model, *rest: modes.append(model.training) or own(model, *rest),
    )
    lsq = QuantizerConfig(preset="lsq")
    assert evaluate_run(EvalConfig(run=tmp_path, quantizer=lsq, activations=lsq))["test_loss"] > 0
    assert modes == [False]


def test_a_float_run_is_quantized_after_training(tmp_path):
    config = replace(RECIPES["digits-mlp"](), output_dir=tmp_path, quantizer=FLOAT, max_steps=300)
    in_float = train(config)["test_accuracy"]
    accuracies = [
        evaluate_run(
            EvalConfig(run=tmp_path, quantizer=QuantizerConfig(preset="fixed", bits=bits))
        )["test_accuracy"]
        for bits in (8, 4, 1)
    ]
    assert accuracies[0] == pytest.approx(in_float, abs=0.01)
    assert accuracies[0] >= accuracies[1] > accuracies[2]
    both = EvalConfig(
        run=tmp_path,
        quantizer=QuantizerConfig(preset="fixed", bits=8),
        activations=QuantizerConfig(preset="abs_max", bits=8),
    )
    assert evaluate_run(both)["test_accuracy"] == pytest.approx(in_float, abs=0.02)


def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    config = shrunk(RECIPES["pydoc-llama"](), output_dir=tmp_path, checkpoint_every=0)
    result = train(config)
    main(["eval", str(tmp_path)])
    assert f"{result['test_perplexity']:.4f}" in capsys.readouterr().out
    main(["eval", str(tmp_path), "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["test_loss"] == result["test_loss"]
    assert numbers["step"] == 2


def test_what_cannot_be_evaluated_says_why(tmp_path):
    config = shrunk(RECIPES["digits-mlp"](), output_dir=tmp_path)  # writes no checkpoint
    train(config)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        evaluate_run(EvalConfig(run=tmp_path))
    train(replace(config, checkpoint_every=0, overwrite=True))
    with pytest.raises(ValueError, match="quantized already"):
        evaluate_run(EvalConfig(run=tmp_path, quantizer=QuantizerConfig(preset="lsq")))
