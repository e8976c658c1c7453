import json
import math
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from shrunk import shrunk
from torch import nn
from torch._inductor import config as inductor_config

import fogzo
from fogzo_lab.comparison import timing
from fogzo_lab.data.config import AugmentationConfig, ImagesConfig
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training import loop
from fogzo_lab.training.checkpoint import load_checkpoint, newest_checkpoint
from fogzo_lab.training.config import USED_BY, EstimatorName
from fogzo_lab.training.loop import DivergedError, train, training_step
from fogzo_lab.training.model_config import QuantizerConfig
from fogzo_lab.training.parallel import Ranks
from fogzo_lab.training.run_folder import read_metrics
from fogzo_lab.training.state import Training

FLOAT = QuantizerConfig(preset="none")
CPU = Ranks(torch.device("cpu"))


@pytest.fixture
def config(tmp_path):
    return replace(RECIPES["digits-mlp"](), output_dir=tmp_path / "run", max_steps=30)


def numbers(result):
    """A result without what the clock says."""
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.parametrize("estimator", get_args(EstimatorName))
def test_a_run_folder_holds_what_is_needed_to_read_and_repeat_the_run(config, estimator):
    config = replace(config, estimator=estimator)
    seen = []
    result = train(config, seen.append)
    folder = config.output_dir
    assert json.loads((folder / "config.json").read_text())["estimator"] == estimator
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 10, 20, 30]
    assert all({"step", "loss", "seconds", "learning_rate"} <= set(m) for m in metrics)
    assert [m["step"] for m in seen] == list(range(1, 31))
    assert json.loads((folder / "result.json").read_text()) == result
    probes = {"ste": 0, "placebo": 0}.get(estimator, 2)
    assert result["extra_forwards"] == 30 * probes
    assert not list(folder.rglob("*partial*"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_and_evaluates_on_shrunk_shapes(name, tmp_path):
    config = shrunk(RECIPES[name](), output_dir=tmp_path)
    result = train(config)
    assert math.isfinite(result["test_loss"])
    assert 0 <= result["test_accuracy"] <= 1
    assert result["extra_forwards"] == 4
    if config.model.family == "llama":
        assert result["test_perplexity"] == pytest.approx(math.exp(result["test_loss"]))


def test_seconds_hold_all_that_a_step_gave_to_the_device_and_nothing_else(config, monkeypatch):
    clock, queued = [0.0], [0.0]

    def synchronize(device):
        clock[0] += queued[0]
        queued[0] = 0.0

    def step(training, window):
        found = training_step(training, window)
        queued[0] += 2.0  # the optimizer's part, for which nothing has waited
        return found

    def something_else(metrics):
        queued[0] += 100.0

    for module in (loop, timing):
        monkeypatch.setattr(module, "synchronize", synchronize)
        monkeypatch.setattr(module, "training_step", step)
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    config = replace(config, max_steps=3)
    assert train(config, something_else)["seconds"] == 6
    assert timing.run_seconds({"fogzo": config}) == {"fogzo": 6}


DEEP = ("digits-resnet", "digits-deit", "pydoc-llama")
# Every two of family, quantizer and estimator meet, not every three.
PAIRS = [
    (DEEP[(i + j) % 3], preset, estimator)
    for i, preset in enumerate(("fixed", "lsq", "quest", "ternary", "sign"))
    for j, estimator in enumerate(get_args(EstimatorName))
]


@pytest.mark.parametrize(("name", "preset", "estimator"), PAIRS)
def test_every_quantizer_and_estimator_takes_a_step_on_every_family(name, preset, estimator):
    quantizer = QuantizerConfig(preset=preset)
    config = shrunk(RECIPES[name](), quantizer=quantizer, estimator=estimator, data=_plain(name))
    training = Training(config, CPU)
    loss, stats = training_step(training, training.next_window())
    assert math.isfinite(loss)
    assert stats is None or stats.fallback is None
    assert training.all_finite()


@pytest.mark.parametrize("activations", ["fixed", "lsq", "quest", "abs_max"])
@pytest.mark.parametrize("name", ["digits-mlp", "digits-resnet", "digits-deit", "pydoc-llama"])
def test_activations_are_quantized_in_every_family(name, activations, tmp_path):
    config = shrunk(
        RECIPES[name](),
        output_dir=tmp_path,
        quantizer=QuantizerConfig(preset="lsq"),
        activations=QuantizerConfig(preset=activations),
        checkpoint_every=0,
    )
    result = train(config)
    assert math.isfinite(result["test_loss"])
    plain = train(replace(config, activations=FLOAT, overwrite=True))
    assert plain["test_loss"] != result["test_loss"]


def _plain(name):
    return ImagesConfig() if name.startswith("digits") else RECIPES[name]().data


def test_the_checkpoint_holds_the_network_that_was_evaluated(config):
    result = train(config)
    path = newest_checkpoint(config.output_dir)
    assert path.name == "step-000030"
    state = load_checkpoint(path)
    training = Training(config, CPU, path)
    reached = {name: result[name] for name in result if "_" in name and name[0] == "t"}
    assert {"test_loss", "test_accuracy", "train_loss"} <= set(reached)
    assert reached.items() <= training.evaluate().items()
    assert state["estimator"] == {"step": 30, "seed": 0}


def test_the_same_config_gives_the_same_run_and_another_seed_another(config, tmp_path):
    first = train(config)
    again = train(replace(config, output_dir=tmp_path / "again"))
    other = train(replace(config, output_dir=tmp_path / "other", seed=1))
    assert numbers(first) == numbers(again) != numbers(other)


def test_a_run_gives_back_the_callers_random_stream(config):
    state = torch.get_rng_state()
    augmented = replace(config.data, augmentation=AugmentationConfig(crop="pad"))
    train(replace(config, data=augmented, max_steps=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_learns_digits_well_above_the_majority_class(config):
    result = train(replace(config, max_steps=150))
    assert result["test_accuracy"] > 0.7
    in_float = replace(config, max_steps=150, quantizer=FLOAT, overwrite=True)
    assert train(in_float)["test_accuracy"] > 0.88


def test_a_diverging_run_stops_with_its_metrics_and_a_good_checkpoint_on_disk(config):
    config = replace(config, quantizer=FLOAT, optimizer="sgd", checkpoint_every=1, max_steps=50)
    with pytest.raises(DivergedError, match="smaller --learning-rate"):
        train(replace(config, learning_rate=1e30))
    state = load_checkpoint(newest_checkpoint(config.output_dir))
    assert all(torch.isfinite(w).all() for w in state["model"].values())
    good = Training(replace(config, learning_rate=1e30), CPU, newest_checkpoint(config.output_dir))
    window = good.next_window()
    with torch.no_grad():
        assert math.isfinite(good.task.loss(good.model, window[0]))


def test_a_non_finite_loss_leaves_the_weights_alone(config):
    training = Training(config, CPU)
    before = [param.detach().clone() for param in training.model.parameters()]
    images, labels = training.next_window()[0]
    loss, stats = training_step(training, [(images * math.nan, labels)])
    assert math.isnan(loss)
    assert stats is None
    for param, kept in zip(training.model.parameters(), before, strict=True):
        assert torch.equal(param, kept)


def test_a_folder_with_a_run_is_not_replaced_unasked(config):
    train(config)
    before = (config.output_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"--resume .* --overwrite"):
        train(replace(config, seed=1))
    assert (config.output_dir / "metrics.jsonl").read_bytes() == before
    train(replace(config, seed=1, overwrite=True))
    assert (config.output_dir / "metrics.jsonl").read_bytes() != before


def test_plain_ste_steps_come_first_when_asked(config):
    result = train(replace(config, start=0.5))
    assert result["extra_forwards"] == 30


# Pixels that are always dark: now and then only their weights flip.
@pytest.mark.filterwarnings("ignore:the probes do not change the loss:RuntimeWarning")
@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({}, 2 * 30),
        ({"one_sided": True}, 30),
        ({"probe_every": 4}, 2 * 8),
        ({"probe_every": 4, "start": 0.5}, 2 * 4),
        ({"probe_fraction": 0.25}, 2 * 30 / 4),
        ({"probe_precision": "bf16"}, 2 * 30),
    ],
)
def test_cheaper_probes_cost_what_they_say_and_still_learn(config, options, forwards):
    result = train(replace(config, max_steps=30, learning_rate=1e-2, **options))
    assert result["extra_forwards"] == forwards
    assert result["train_loss"] < 1.5  # 2.3 where nothing is learned


def test_probes_see_the_asked_share_of_the_batch_in_the_asked_precision(config, monkeypatch):
    config = replace(config, batch_size=24, accumulation=2, probe_fraction=0.125)
    training = Training(replace(config, probe_precision="bf16"), CPU)
    seen, loss = [], training.task.loss

    def spy(model, batch):
        half = torch.is_autocast_enabled("cpu")
        seen.append((torch.is_grad_enabled(), len(batch[0]), len(batch[1]), half))
        return loss(model, batch)

    monkeypatch.setattr(training.task, "loss", spy)
    training_step(training, training.next_window())
    assert seen == [(True, 12, 12, False)] * 2 + [(False, 2, 2, True)] * 4
    assert training.extra_forwards == 2 * 4 / 24  # and not 2 * 0.125


@pytest.mark.parametrize("name", ["digits-mlp", "digits-resnet", "digits-deit", "pydoc-llama"])
def test_lean_probes_train_to_the_bit_as_copied_weights_do(name):
    results = []
    for evaluate in ("in_place", "lean"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            results.append(parameters_after(replace(shrunk(RECIPES[name]()), evaluate=evaluate)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_probes_that_do_not_go_together_are_refused(config):
    for options in ({"probe_fraction": 0.5}, {"probe_precision": "bf16"}):
        with pytest.raises(ValueError, match="leave --probe-fraction"):
            replace(config, one_sided=True, **options)
    for value in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"--probe-fraction 0\.125"):
            replace(config, probe_fraction=value)
    with pytest.raises(ValueError, match=r"0\.1 of a micro-batch of 3 .*--probe-fraction 0\.3334,"):
        replace(config, batch_size=6, accumulation=2, probe_fraction=0.1)
    replace(config, batch_size=6, accumulation=2, probe_fraction=0.3334)
    for estimator in ("spsa", "control-variate"):
        with pytest.raises(ValueError, match=f"{estimator} has no steps of STE.*--probe-every out"):
            replace(config, estimator=estimator, probe_every=4)
    with pytest.raises(ValueError, match="--probe-every 4"):
        replace(config, probe_every=0)


def test_weights_are_all_quantized_in_the_shallow_nets(config):
    training = Training(config, CPU)
    names = [w.name for w in fogzo.quantized_weights(training.model)]
    assert names == ["1.weight", "3.weight"]


def parameters_after(config, steps=3):
    training = Training(config, CPU)
    losses = [training_step(training, training.next_window())[0] for _ in range(steps)]
    return losses, [p.detach().clone() for p in training.model.parameters()]


def assert_same_training(first, second, rtol=1e-4, atol=1e-5):
    assert first[0] == pytest.approx(second[0], rel=rtol)
    for a, b in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["digits-mlp", "digits-deit", "pydoc-llama"])
def test_micro_batches_equal_one_batch(name):
    config = shrunk(RECIPES[name](), batch_size=12, optimizer="sgd", num_samples=2)
    config = replace(config, data=_plain(name))  # random crops would differ
    results = [parameters_after(replace(config, accumulation=k)) for k in (1, 3)]
    assert_same_training(*results)


OTHER_VALUES = {
    "num_samples": 2,
    "kappa": 0.5,
    "noise_shape": "isotropic",
    "agreement": "shrunk",
    "start": 0.5,
    "perturbation": "rademacher",
    "radius": 3.0,
    "one_sided": True,
    "probe_every": 2,
    "probe_fraction": 0.5,
    "probe_precision": "bf16",
    "probe_loss": "linear",
}


def test_an_option_changes_the_training_of_the_estimators_that_it_is_for():
    # Two change no training: how probes are evaluated, and a number that is logged.
    assert set(USED_BY) == {*OTHER_VALUES, "evaluate", "track_flips"}
    config = shrunk(RECIPES["digits-mlp"](), max_steps=6, agreement="measured")
    for estimator in get_args(EstimatorName):
        alone = replace(config, estimator=estimator)
        losses, parameters = parameters_after(alone)
        for option, value in OTHER_VALUES.items():
            if option in ("start", "probe_every") and estimator in ("spsa", "control-variate"):
                continue  # which are refused
            other = parameters_after(replace(alone, **{option: value}))
            same = other[0] == losses and all(map(torch.equal, other[1], parameters))
            assert same == (estimator not in USED_BY[option]), (estimator, option)


@pytest.mark.parametrize("name", ["digits-mlp", "digits-resnet"])  # what small networks gain from
def test_probes_evaluated_together_train_as_probes_one_by_one(name):
    config = shrunk(RECIPES[name](), optimizer="sgd", num_samples=3)
    config = replace(config, data=_plain(name))
    results = [parameters_after(replace(config, evaluate=e)) for e in ("in_place", "stacked")]
    assert_same_training(*results)


@pytest.mark.parametrize("name", ["digits-resnet", "digits-deit", "pydoc-llama"])
def test_gradient_checkpointing_changes_no_number(name):
    config = shrunk(RECIPES[name](), optimizer="sgd", accumulation=1)
    if name == "digits-deit":
        config = replace(config, model=replace(config.model, dropout=0.2))
    results = []
    for checkpointed in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            results.append(parameters_after(replace(config, gradient_checkpointing=checkpointed)))
    assert_same_training(*results)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["digits-mlp", "digits-resnet", "digits-deit", "pydoc-llama"])
def test_half_precision_stays_close_to_single(name, precision):
    config = shrunk(RECIPES[name](), optimizer="sgd", learning_rate=0.01)
    half, _ = parameters_after(replace(config, precision=precision), steps=4)
    single, _ = parameters_after(config, steps=4)
    assert half == pytest.approx(single, rel=0.05)


def test_a_gradient_that_overflows_in_fp16_skips_the_step_and_lowers_the_scale(config):
    training = Training(replace(config, precision="fp16"), CPU)
    training.scaler._init_scale = 2.0**60
    before = [param.detach().clone() for param in training.model.parameters()]
    loss, stats = training_step(training, training.next_window())
    assert math.isfinite(loss)
    assert "not finite" in stats.fallback
    assert training.scaler.get_scale() < 2.0**60
    for param, kept in zip(training.model.parameters(), before, strict=True):
        assert torch.equal(param, kept)


def test_clipping_comes_after_refining_and_bounds_the_whole_gradient(config):
    config = replace(config, optimizer="sgd", clip_norm=1e-3, learning_rate=1.0)
    training = Training(config, CPU)
    before = [param.detach().clone() for param in training.model.parameters()]
    training_step(training, training.next_window())
    moved = [p.detach() - b for p, b in zip(training.model.parameters(), before, strict=True)]
    length = torch.linalg.vector_norm(torch.cat([m.flatten() for m in moved]))
    rate = training.optimizer.param_groups[0]["lr"]
    assert float(length) == pytest.approx(1e-3 * rate, rel=1e-3)


def test_an_average_of_the_weights_is_what_is_evaluated_and_checkpointed(config):
    config = replace(config, ema_decay=0.9, quantizer=QuantizerConfig(preset="lsq"))
    averaged = train(config)
    last = train(replace(config, ema_decay=None, overwrite=True))
    assert averaged["test_loss"] != last["test_loss"]


def test_weights_of_a_float_run_can_be_where_training_begins(config, tmp_path):
    in_float = replace(config, quantizer=FLOAT, max_steps=100, output_dir=tmp_path / "float")
    train(in_float)
    tuned = Training(replace(config, initial_weights=in_float.output_dir), CPU)
    state = load_checkpoint(newest_checkpoint(in_float.output_dir))["model"]
    for name, weight in state.items():
        assert torch.equal(tuned.model.state_dict()[name], weight)
    for weight in fogzo.quantized_weights(tuned.model):
        expected = weight.param.abs().mean().reshape(weight.step_size().shape)
        torch.testing.assert_close(weight.step_size(), expected)
    with pytest.raises(ValueError, match="another network"):
        other = replace(config.model, hidden=(5,))
        Training(replace(config, initial_weights=in_float.output_dir, model=other), CPU)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        Training(replace(config, initial_weights=tmp_path / "nowhere"), CPU)


@pytest.mark.parametrize(
    ("changes", "keeps"),
    [
        ({}, True),
        ({"bits": 2}, True),  # its default
        ({"bits": 4}, False),
        ({"init": "max"}, False),
    ],
)
def test_step_sizes_of_another_quantizer_are_measured_anew(config, tmp_path, changes, keeps):
    lsq = QuantizerConfig(preset="lsq")
    before = replace(config, quantizer=lsq, output_dir=tmp_path / "before", checkpoint_every=0)
    train(before)
    quantizer = replace(lsq, **changes)
    after = replace(config, quantizer=quantizer, initial_weights=before.output_dir)
    model = Training(after, CPU).model
    found = [weight.step_size().clone() for weight in fogzo.quantized_weights(model)]
    fogzo.measure_step_sizes_(model)
    measured = [weight.step_size() for weight in fogzo.quantized_weights(model)]
    assert [torch.equal(*pair) for pair in zip(found, measured, strict=True)] == [not keeps] * 2


def test_step_sizes_come_along_from_a_checkpoint_named_within_its_folder(
    config, tmp_path, monkeypatch
):
    config = replace(config, quantizer=QuantizerConfig(preset="lsq"), max_steps=2)
    train(replace(config, output_dir=tmp_path / "before"))
    checkpoint = newest_checkpoint(tmp_path / "before")
    monkeypatch.chdir(checkpoint.parent)
    found = [
        Training(replace(config, initial_weights=path), CPU).model.state_dict()
        for path in (checkpoint, Path(checkpoint.name))
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("before", ["fixed", "lsq", "bbq"])
@pytest.mark.parametrize(
    "after",
    [
        QuantizerConfig(preset="none"),
        QuantizerConfig(preset="quest"),
        QuantizerConfig(preset="fixed", granularity="channel"),
    ],
    ids=lambda quantizer: quantizer.preset,
)
def test_weights_of_any_quantizer_can_be_where_training_begins(config, tmp_path, before, after):
    quantizer = QuantizerConfig(preset=before)
    first = replace(config, max_steps=2, estimator="ste", output_dir=tmp_path / "before")
    train(replace(first, quantizer=quantizer, activations=quantizer))
    begun = replace(first, quantizer=after, initial_weights=first.output_dir)
    state = Training(begun, CPU).model.state_dict()
    given = load_checkpoint(newest_checkpoint(first.output_dir))["model"]
    for name in ("1.weight", "3.weight", "1.bias"):
        assert torch.equal(state[name], given[name])


@pytest.mark.parametrize(("bits", "keeps"), [(2, True), (4, False)])
def test_learned_step_sizes_of_inputs_come_with_the_weights(config, tmp_path, bits, keeps):
    lsq = {"quantizer": QuantizerConfig(preset="lsq"), "activations": QuantizerConfig(preset="lsq")}
    before = replace(config, output_dir=tmp_path / "before", checkpoint_every=0, **lsq)
    train(before)
    trained = load_checkpoint(newest_checkpoint(before.output_dir))["model"]
    inputs = QuantizerConfig(preset="lsq", bits=bits)
    after = replace(config, initial_weights=before.output_dir, **lsq | {"activations": inputs})
    found = Training(after, CPU).model.state_dict()
    steps = [name for name in trained if name.endswith("input_step")]
    assert len(steps) == 2
    assert [torch.equal(found[name], trained[name]) for name in steps] == [keeps] * 2


def test_step_sizes_of_a_float_phase_are_measured_anew(config, tmp_path):
    lsq = {"quantizer": QuantizerConfig(preset="lsq"), "estimator": "ste"}
    phases = {"quantize_from": 0.5, "checkpoint_every": 14, "keep_checkpoints": 9}
    before = replace(config, output_dir=tmp_path / "before", **lsq, **phases)
    train(before)
    early = before.output_dir / "checkpoints" / "step-000014"
    model = Training(replace(config, initial_weights=early, **lsq), CPU).model
    for weight in fogzo.quantized_weights(model):
        found = weight.step_size().clone()
        fogzo.measure_step_sizes_(model)
        assert torch.equal(weight.step_size(), found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("name", "backend"), [("digits-mlp", "inductor"), ("digits-deit", "eager")]
)
def test_a_compiled_network_trains_as_an_eager_one(name, backend, monkeypatch):
    compiled = partialmethod(nn.Module.compile, backend=backend)
    monkeypatch.setattr(nn.Module, "compile", compiled)  # to generate its code takes half a minute
    config = shrunk(RECIPES[name](), optimizer="sgd", learning_rate=0.01, data=_plain(name))
    eager = parameters_after(config)
    torch._dynamo.reset()
    # Compiled here and not by a pool of processes, nor tried out for every vector unit before.
    with inductor_config.patch({"compile_threads": 1, "cpp.vec_isa_ok": True}):
        assert_same_training(parameters_after(replace(config, compile=True)), eager, rtol=1e-3)
