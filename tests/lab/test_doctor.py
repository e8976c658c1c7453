"""fogzo doctor: sick runs are named, healthy ones are not, and records survive a resume."""

import json
import shutil
from dataclasses import replace

import pytest

from fogzo_lab.cli.main import main
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.examine import examine
from fogzo_lab.training.loop import DivergedError, train
from fogzo_lab.training.model_config import QuantizerConfig
from fogzo_lab.training.run_folder import read_inspections, read_metrics

LSQ = QuantizerConfig(preset="lsq", bits=2)
RUNS = {
    "healthy": {"quantizer": LSQ, "activations": LSQ, "estimator": "ste"},
    "quest": {"quantizer": QuantizerConfig(preset="quest"), "estimator": "ste"},
    "masked": {"estimator": "ste"},
    "too fast": {"quantizer": LSQ, "estimator": "ste", "learning_rate": 1.0},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp("runs") / name for name in RUNS}
    base = replace(RECIPES["digits-mlp"](), max_steps=100, inspect_every=25)
    for name, changes in RUNS.items():
        train(replace(base, output_dir=folders[name], **changes))
    return folders


@pytest.mark.parametrize("name", ["healthy", "quest"])
def test_a_healthy_run_has_no_finding(runs, name):
    assert examine(runs[name]).findings == []


@pytest.mark.parametrize(
    ("name", "kind", "says", "options"),
    [
        ("masked", "masked", "masked and frozen", "--quantizer.preset lsq"),
        ("too fast", "learning_rate", "too large", "--learning-rate"),
    ],
)
def test_the_first_finding_is_the_illness(runs, name, kind, says, options):
    first = examine(runs[name]).findings[0]
    assert first.kind == kind
    assert says in first.message
    assert options in first.options


def test_a_run_writes_its_inspections_and_their_means(runs):
    found = read_inspections(runs["healthy"])
    assert [inspection.step for inspection in found] == [25, 50, 75, 100]
    assert all(inspection.counted == 20 for inspection in found)
    assert all(layer.clipped is not None for layer in found[-1].layers)
    by_step = {m["step"]: m for m in read_metrics(runs["healthy"] / "metrics.jsonl")}
    for inspection in found:
        assert by_step[inspection.step]["masked"] == inspection.mean("masked")
        assert by_step[inspection.step]["flips"] == inspection.mean("flips")
    assert "masked" not in by_step[10]


def test_inspections_do_not_change_the_run(runs, tmp_path):
    config = replace(RECIPES["digits-mlp"](), max_steps=100, output_dir=tmp_path, **RUNS["healthy"])
    plain = train(config)
    watched = json.loads((runs["healthy"] / "result.json").read_text())
    assert {k: v for k, v in plain.items() if k != "seconds"}.items() <= watched.items()
    with pytest.raises(SystemExit):  # nobody watched it
        main(["doctor", str(tmp_path / "nowhere")])
    assert examine(tmp_path).inspection.mean("flips") is None


def test_a_resumed_run_has_the_same_inspections(runs, tmp_path):
    config = replace(
        RECIPES["digits-mlp"](),
        max_steps=100,
        inspect_every=25,
        checkpoint_every=50,
        output_dir=tmp_path,
        **RUNS["healthy"],
    )

    def stop(metrics):
        if metrics["step"] == 80:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    assert [i.step for i in read_inspections(tmp_path)] == [25, 50, 75]
    with (tmp_path / "inspections.jsonl").open("a") as file:
        file.write('{"layers": [')  # a kill in the middle of a line
    train(replace(config, resume=True))
    assert read_inspections(tmp_path) == read_inspections(runs["healthy"])
    train(replace(config, inspect_every=0, overwrite=True, max_steps=5))
    assert not (tmp_path / "inspections.jsonl").exists()


def test_a_damaged_record_is_named(runs, tmp_path):
    (tmp_path / "inspections.jsonl").write_text('{"layers": 3}\n')
    with pytest.raises(ValueError, match=r"inspections.jsonl, line 1: layers of Inspection is 3"):
        read_inspections(tmp_path)


def test_an_agreement_needs_a_checkpoint(runs, tmp_path):
    shutil.copytree(runs["healthy"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert examine(tmp_path / "run").step == 100
    with pytest.raises(ValueError, match=r"no checkpoint, on which.*: --agreement 0, or"):
        examine(tmp_path / "run", agreement=8)


def test_inspections_of_nothing_are_refused(capsys, tmp_path):
    options = ("--estimator", "ste", "--inspect-every", "2", "--output-dir", str(tmp_path / "run"))
    for changes in (("--quantizer.preset", "none"), ("--method.name", "parq")):
        with pytest.raises(SystemExit):
            main(["train", "digits-mlp", *options, *changes])
        assert "has none: --inspect-every 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_prints_layers_and_advice(runs, capsys):
    main(["doctor", str(runs["masked"])])
    said = capsys.readouterr().out
    assert "levels used" in said
    assert "[high] weights are masked and frozen" in said
    assert "--quantizer.surrogate identity_unmasked" in said
    assert "Changes were counted over 20 steps up to step 100" in said
    main(["doctor", str(runs["healthy"]), "--agreement", "2"])
    said = capsys.readouterr().out
    assert "agreement" in said
    assert "nothing is wrong with what was looked at" in said


def test_several_runs_are_a_table_and_json_holds_everything(runs, capsys):
    main(["doctor", str(runs["healthy"]), str(runs["too fast"])])
    said = capsys.readouterr().out
    assert "learning_rate" in said
    assert "too fast: [high] the learning rate is too large" in said
    main(["doctor", str(runs["masked"]), "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["findings"][0]["kind"] == "masked"
    assert [layer["name"] for layer in found["layers"]] == ["1", "3"]
    assert len(found["history"]) == 4


def test_the_report_shows_codes_over_training(tmp_path):
    main(
        [
            *("train", "digits-mlp", "--max-steps", "6", "--inspect-every", "2"),
            *("--output-dir", str(tmp_path / "run")),
        ]
    )
    html = (tmp_path / "run" / "report.html").read_text()
    assert "Flips of codes per step" in html
    assert "Masked, frozen, dead, used" in html


def test_a_diverged_run_and_one_in_float_are_told_apart(tmp_path, capsys):
    config = replace(RECIPES["digits-mlp"](), output_dir=tmp_path / "run", max_steps=50)
    sgd = {"optimizer": "sgd", "learning_rate": 1e30, "estimator": "ste"}
    with pytest.raises(DivergedError):
        train(replace(config, **sgd))
    first = examine(tmp_path / "run").findings[0]
    assert first.message.startswith("training diverged at step")
    in_float = replace(config, quantizer=QuantizerConfig(), max_steps=2, overwrite=True)
    train(in_float)
    with pytest.raises(SystemExit):
        main(["doctor", str(tmp_path / "run")])
    assert "was trained in float, and there are no codes to look at" in capsys.readouterr().err
