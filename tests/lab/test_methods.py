"""Methods beside the estimator in runs: when they act, what they leave, and how they go on."""

import itertools
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from fogzo_lab.cli.export import ExportConfig, export_run
from fogzo_lab.comparison.compare import CompareConfig, compare
from fogzo_lab.comparison.rows import ROWS
from fogzo_lab.comparison.timing import phases_of, run_seconds
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.checkpoint import load_checkpoint, newest_checkpoint
from fogzo_lab.training.evaluate import EvalConfig, evaluate_run
from fogzo_lab.training.examine import examine
from fogzo_lab.training.loop import train
from fogzo_lab.training.method_config import PUBLISHED, MethodConfig
from fogzo_lab.training.model_config import QuantizerConfig
from fogzo_lab.training.parallel import Ranks
from fogzo_lab.training.parq import around
from fogzo_lab.training.run_folder import read_metrics
from fogzo_lab.training.state import Training

LSQ = QuantizerConfig(preset="lsq", bits=2)
FLOAT_FIRST = {"quantizer": LSQ, "activations": LSQ, "ema_decay": 0.9}
RUNS = {
    "cage": {"method": MethodConfig(name="cage", start=0.2)},
    "winq": {"method": MethodConfig(name="winq", resets=3)},
    "dampening": {"method": MethodConfig(name="dampening", start=0.2), "clip_norm": 1.0},
    "cewt": {"method": MethodConfig(name="cewt"), "quantizer": QuantizerConfig(preset="quest")},
    "parq": {"method": MethodConfig(name="parq"), "weight_decay": 0.01},
    "quantized after the checkpoint": FLOAT_FIRST | {"quantize_from": 0.7},
    "quantized before the checkpoint": FLOAT_FIRST | {"quantize_from": 0.3},
    "float, then FOGZO": {"quantize_from": 0.7, "estimator": "fogzo", "quantizer": LSQ},
}
STEPS = 6


@pytest.fixture(autouse=True)
def torchao_or_skip(request):
    """Skip what needs torchao where it is not installed."""
    if "parq" in request.node.name:
        pytest.importorskip("torchao")


def config(folder, **changes):
    usual = {"max_steps": STEPS, "log_every": 1, "checkpoint_every": 3, "estimator": "ste"}
    return replace(RECIPES["digits-mlp"](), output_dir=folder, **(usual | changes))


def trained(folder):
    state = load_checkpoint(newest_checkpoint(folder), only=["model", "optimizer", "ema"])
    # Not the optimizer's groups, whose options come from the config.
    return {"model": state["model"], "optimizer": state["optimizer"]["state"], "ema": state["ema"]}


def assert_same(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, list | tuple):
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert first == second


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_same_bit_for_bit(name, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    result = train(config(whole, **RUNS[name]))
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / f"step-{STEPS:06d}")
    again = train(config(half, resume=True, **RUNS[name]))
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    assert_same(trained(whole), trained(half))
    logs = [read_metrics(folder / "metrics.jsonl") for folder in (whole, half)]
    assert [{**a, "seconds": 0} for a in logs[0]] == [{**b, "seconds": 0} for b in logs[1]]


# What they do


def test_a_pull_of_no_strength_changes_nothing_and_one_of_some_strength_does(tmp_path):
    weights = {}
    for name, method in {
        "none": MethodConfig(),
        "cage off": MethodConfig(name="cage", strength=0.0),
        "winq off": MethodConfig(name="winq", keep=1.0),
        "dampening off": MethodConfig(name="dampening", strength=0.0),
        "cage": MethodConfig(name="cage", start=0.0),
        "winq": MethodConfig(name="winq"),
        "dampening": MethodConfig(name="dampening", start=0.0),
    }.items():
        train(config(tmp_path / name, checkpoint_every=0, method=method))
        weights[name] = trained(tmp_path / name)["model"]["1.weight"]
    plain = weights.pop("none")
    for name, found in weights.items():
        assert torch.equal(found, plain) == name.endswith(" off"), name


def test_metrics_say_how_far_a_method_is(tmp_path):
    logged = {}
    for name in ("cage", "parq", "quantized after the checkpoint"):
        train(config(tmp_path / name, checkpoint_every=-1, **RUNS[name]))
        logged[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    strengths = [line["pull_strength"] for line in logged["cage"]]
    assert strengths[0] == 0 and strengths[-1] == 10.0 and strengths == sorted(strengths)
    softness = [line["softness"] for line in logged["parq"]]
    assert 0.9 < softness[0] <= 1 and softness == sorted(softness, reverse=True)
    assert softness[-1] == 0
    quantized = [line["quantized"] for line in logged["quantized after the checkpoint"]]
    assert quantized == [0, 0, 0, 1, 1, 1]


def test_cewt_has_a_learning_rate_of_its_own_and_keeps_norms(tmp_path):
    options = {"method": MethodConfig(name="cewt", rate_factor=4.0), "learning_rate": 0.01}
    training = Training(
        config(tmp_path, weight_decay=0.1, warmup_fraction=0.0, **options),
        Ranks(torch.device("cpu")),
    )
    training.set_learning_rate()
    weights = {layer.weight for layer in training.model if hasattr(layer, "weight")}
    for group in training.optimizer.param_groups:
        constrained = weights & set(group["params"])
        assert constrained in (set(), set(group["params"]))
        assert group["lr"] == pytest.approx(0.04 if constrained else 0.01)
        assert group["weight_decay"] == 0 or not constrained
    assert training.learning_rate == pytest.approx(0.01)


def test_parq_ends_on_as_many_levels_as_it_has_and_is_evaluated_so(tmp_path):
    # It has no codes to inspect, as a row of a comparison where others have.
    result = train(config(tmp_path, method=MethodConfig(name="parq"), inspect_every=2))
    model = trained(tmp_path)["model"]
    assert all(len(model[name].unique()) <= 4 for name in ("1.weight", "3.weight"))
    assert evaluate_run(EvalConfig(run=tmp_path))["test_loss"] == result["test_loss"]
    with pytest.raises(ValueError, match="trained by PARQ, which has no quantized layers"):
        export_run(ExportConfig(run=tmp_path))
    with pytest.raises(ValueError, match="trained by PARQ, which has no quantized layers"):
        examine(tmp_path)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_parq_is_on_its_levels_in_the_end_of_a_few_steps_too(tmp_path, steps):
    train(config(tmp_path, method=MethodConfig(name="parq"), max_steps=steps))
    model = trained(tmp_path)["model"]
    assert all(len(model[name].unique()) <= 4 for name in ("1.weight", "3.weight"))
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["softness"] == 0


def test_parqs_annealing_ends_where_it_always_did_in_more_steps(tmp_path):
    for steps in (*range(5, 200), 1265, 2531):
        made = config(tmp_path, method=MethodConfig(name="parq"), max_steps=steps)
        weight = torch.nn.Parameter(torch.zeros(2))
        found = around(made, torch.optim.SGD([{"params": [weight], "quant_bits": 2}], lr=0.1))
        assert found.prox_map.anneal_end == round(0.9 * steps)


@pytest.mark.parametrize(
    ("steps", "resets"), [(19, 10), (39, 20), (25, 10), (11, 4), (10, 10), (100, 10), (1265, 10)]
)
def test_winq_resets_as_often_as_it_is_told(tmp_path, steps, resets):
    method = MethodConfig(name="winq", resets=resets)
    training = Training(
        config(tmp_path, method=method, max_steps=steps), Ranks(torch.device("cpu"))
    )
    pull = training.methods.acting
    found = [step for step in range(steps) if pull.strength(step)]
    assert len(found) == resets
    assert {pull.strength(step) for step in found} == {0.8}
    gaps = [b - a for a, b in itertools.pairwise([-1, *found])]
    assert max(gaps) - min(gaps) <= 1
    assert any(pull.strength(step) for step in range(steps, 2 * steps))  # as turns are timed there
    if steps >= resets**2:  # to the step what it was
        assert found == list(range(steps // resets - 1, steps, steps // resets))


def test_parq_without_torchao_names_the_package_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("fogzo_lab.training.parq.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torchao"):
        train(config(tmp_path / "run", method=MethodConfig(name="parq")))
    with pytest.raises(ValueError, match="pip install torchao"):
        compare(CompareConfig(base=config(tmp_path / "rows"), rows=("parq",), workers=1))
    assert not list(tmp_path.glob("rows/runs/*"))


# When quantization begins


@pytest.mark.parametrize("activations", [QuantizerConfig(), LSQ], ids=["W2", "W2A2"])
def test_from_the_start_it_is_quantized_training_and_from_the_end_quantization_after(
    tmp_path, activations
):
    quantizers = {"quantizer": LSQ, "activations": activations}
    none = {"quantizer": QuantizerConfig(), "activations": QuantizerConfig()}
    plain = train(config(tmp_path / "qat", **quantizers))
    started = train(config(tmp_path / "from 0", quantize_from=0.0, **quantizers))
    assert {**started, "seconds": 0} == {**plain, "seconds": 0}
    train(config(tmp_path / "float", **none))
    after = evaluate_run(EvalConfig(run=tmp_path / "float", **quantizers))
    ended = train(config(tmp_path / "from 1", quantize_from=1.0, **quantizers))
    for split, number in itertools.product(("train", "validation", "test"), ("loss", "accuracy")):
        assert ended[f"{split}_{number}"] == after[f"{split}_{number}"]


def test_a_run_that_is_in_float_yet_is_evaluated_so_and_not_exported(tmp_path):
    options = FLOAT_FIRST | {"quantize_from": 0.9, "ema_decay": None}
    train(config(tmp_path / "run", **options))
    early = tmp_path / "run" / "checkpoints" / "step-000003"
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:06d}")
    none = {"quantizer": QuantizerConfig(), "activations": QuantizerConfig()}
    train(config(tmp_path / "float", **none))
    shutil.rmtree(tmp_path / "float" / "checkpoints" / f"step-{STEPS:06d}")
    found = [evaluate_run(EvalConfig(run=tmp_path / name)) for name in ("run", "float")]
    assert found[0]["test_loss"] == found[1]["test_loss"]
    # The recipe's name and --resume would not do: its other options differ.
    says = "still in float at step 3, .*: go on, by the command that began it and --resume, or give"
    with pytest.raises(ValueError, match=says):
        export_run(ExportConfig(run=early))
    with pytest.raises(ValueError, match="still in float at step 3, before its quantization"):
        examine(tmp_path / "run")


# What a step takes


def test_a_runs_phases_are_timed_each_for_its_share():
    recipe = RECIPES["digits-mlp"]()
    shares = {
        name: [share for _, share in phases_of(ROWS[name].config(recipe, None))]
        for name in ("ste", "ste-then-fogzo", "ste-cage", "ste-cage-published")
    }
    assert shares == {
        "ste": [1.0],
        "ste-then-fogzo": [0.7, pytest.approx(0.3)],
        "ste-cage": [1.0],
        "ste-cage-published": [0.8, pytest.approx(0.2)],
    }
    (first, _), (second, _) = phases_of(ROWS["ste-cage-published"].config(recipe, None))
    assert (first.method.name, second.method.name) == ("none", "cage")
    assert second.method.options["start"] == 0.0
    (first, _), (second, _) = phases_of(ROWS["float-then-fogzo"].config(recipe, None))
    assert (first.quantize_from, first.estimator) == (1.0, "ste")
    assert (second.quantize_from, second.estimator, second.start) == (0.0, "fogzo", 0.0)


def test_the_float_phase_of_an_averaged_run_is_timed():
    recipe = replace(RECIPES["digits-mlp"](), ema_decay=0.9)
    (first, _), (second, _) = phases_of(ROWS["float-then-ste"].config(recipe, None))
    assert (first.quantize_from, first.ema_decay, second.ema_decay) == (1.0, 0.9, 0.9)
    averaged = ROWS["float-then-ste"].config(recipe, None)
    assert run_seconds({"float-then-ste": averaged}, rounds=3, steps=1)["float-then-ste"] > 0


# Rows


def test_a_float_phase_leaves_the_recipes_method_out():
    recipe = replace(RECIPES["digits-mlp"](), method=MethodConfig(name="winq"))
    methods = [
        ROWS[name].config(recipe, None).method.name
        for name in ("ste", "fogzo", "float-then-ste", "float-then-fogzo")
    ]
    assert methods == ["winq", "winq", "none", "none"]


def test_a_rows_own_parameter_is_its_authors_or_tuned(tmp_path):
    own = {name: row.parameter for name, row in ROWS.items() if row.parameter is not None}
    assert {name for name, parameter in own.items() if parameter.published is not None} == {
        "ste-cage", "ste-winq", "ste-dampening", "ste-cewt", "parq",
    }  # fmt: skip
    base = config(tmp_path)
    for name, parameter in own.items():
        kappas = (0.1, 1.0) if parameter.published is None else None
        tuned = CompareConfig(base=base, rows=(name,), kappas=kappas)
        authors = replace(tuned, tune_methods=False, kappas=None)
        if parameter.published is None:
            assert tuned.values(name) == (0.1, 1.0) and authors.values(name) == (base.kappa,)
        else:
            assert len(tuned.values(name)) == 3 and authors.values(name) == (parameter.published,)


def test_a_row_puts_its_own_parameter_where_it_belongs(tmp_path):
    base = config(tmp_path, max_steps=10)
    found = ROWS["ste-winq"].config(base, 0.5).method.options
    assert found == {"keep": 0.5, "resets": 10}
    assert ROWS["ste-cewt"].config(base, 2.5).method.options["rate_factor"] == 2.5
    assert ROWS["fogzo-bbq"].config(base, 0.3).kappa == 0.3
    assert ROWS["ste-bbq"].config(base, None).quantizer.build().companding is not None


@pytest.mark.parametrize("name", ["cage", "winq", "dampening", "cewt"])
def test_the_default_rows_go_with_every_method(tmp_path, name):
    base = replace(config(tmp_path), method=MethodConfig(name=name))
    for row in CompareConfig(base=base).rows:
        ROWS[row].config(base, None)


# What makes no sense


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": QuantizerConfig(), "quantize_from": 0.5}, "there are none: --quantizer"),
        ({"quantizer": QuantizerConfig(), "method": MethodConfig(name="cage")}, "there are none"),
        ({"quantize_from": 1.0, "estimator": "fogzo"}, "nothing to measure: --estimator ste"),
        ({"quantize_from": 0.5, "estimator": "spsa"}, "leave --quantize-from out"),
        (
            {"quantize_from": 0.9, "method": MethodConfig(name="cage")},
            "in float: --method.start 0.9",
        ),
        ({"quantize_from": 1.0, "method": MethodConfig(name="cage")}, ": --method.name none, or"),
        ({"quantize_from": 0.5, "method": MethodConfig(name="winq")}, "--quantize-from 0"),
        ({"parallel": "fsdp", "method": MethodConfig(name="cewt")}, "--parallel ddp"),
        ({"parallel": "fsdp", "method": MethodConfig(name="parq")}, "--parallel ddp"),
        ({"estimator": "fogzo", "method": MethodConfig(name="parq")}, "--estimator ste"),
        ({"activations": LSQ, "method": MethodConfig(name="parq")}, "--activations.preset none"),
        ({"ema_decay": 0.9, "method": MethodConfig(name="parq")}, "--ema-decay None"),
        ({"ema_decay": 0.9, "quantize_from": 1.0}, "nothing to average: --ema-decay None, or"),
        ({"precision": "fp16", "method": MethodConfig(name="parq")}, "--precision bf16"),
        ({"max_steps": 1, "method": MethodConfig(name="parq")}, "got 1: --max-steps 2$"),
        (
            {"max_steps": 3, "method": MethodConfig(name="winq")},
            "got 4 resets in 3 steps: --method.resets 3, or --max-steps 4$",
        ),
        (
            {"quantizer": replace(LSQ, granularity=4), "method": MethodConfig(name="parq")},
            "groups of 4: --quantizer.granularity channel",
        ),
    ],
)
def test_what_makes_no_sense_together_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_an_option_of_another_method_is_refused_and_its_own_are_taken():
    for method, options in PUBLISHED.items():
        assert MethodConfig(name=method, **options).options == MethodConfig(name=method).options
    with pytest.raises(
        ValueError, match=r"cage has no keep: --method.keep None, or --method.name winq"
    ):
        MethodConfig(name="cage", keep=0.5)


def test_muon_cannot_be_parqs(tmp_path):
    with pytest.raises(ValueError, match="muon is two: --optimizer adamw"):
        train(config(tmp_path, optimizer="muon", method=MethodConfig(name="parq")))


@pytest.mark.parametrize("name", ["cage", "winq", "dampening"])
def test_probes_under_a_pull_are_warned_of(tmp_path, caplog, name):
    options = {"estimator": "fogzo", "checkpoint_every": -1, "max_steps": 4}
    train(config(tmp_path, method=MethodConfig(name=name), **options))
    assert "a pull to the grid" in caplog.text and "--estimator ste" in caplog.text
