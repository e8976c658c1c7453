"""Every field of every config: no value that cannot mean anything, in types and in numbers."""

import dataclasses
import math
import typing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy
import pytest

from fogzo_lab.bench.config import BenchConfig
from fogzo_lab.cli.doctor import DoctorConfig
from fogzo_lab.cli.export import ExportConfig
from fogzo_lab.cli.parsing import parse
from fogzo_lab.comparison.compare import CompareConfig
from fogzo_lab.comparison.execution import ExecutionConfig
from fogzo_lab.data.config import AugmentationConfig, ImagesConfig, TextConfig
from fogzo_lab.options import Options, from_dict
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.evaluate import EvalConfig
from fogzo_lab.training.method_config import MethodConfig
from fogzo_lab.training.model_config import (
    DeitConfig,
    LlamaConfig,
    MlpConfig,
    QuantizerConfig,
    ResNetConfig,
)

DIGITS = RECIPES["digits-mlp"]()
CONFIGS = [
    DIGITS,
    CompareConfig(base=DIGITS),
    EvalConfig(run=Path("run")),
    ExportConfig(run=Path("run")),
    BenchConfig(),
    DoctorConfig(runs=(Path("run"),)),
    ExecutionConfig(executor="ray"),
    AugmentationConfig(),
    ImagesConfig(),
    TextConfig(),
    QuantizerConfig(preset="lsq"),
    MethodConfig(),
    MlpConfig(),
    ResNetConfig(),
    DeitConfig(),
    LlamaConfig(),
]
BAD = (0, -1, 0.5, 2.0, math.nan, math.inf, -math.inf, True, None, "", "nonsense", [], (), [0])
BAD += (object(), numpy.zeros(2), 2**70, 10**400)

ANY_COUNT_FROM_ZERO = {
    "seed": "the first seed there is",
    "rand_augment": "no augmentation",
    "inspect_every": "no inspections",
    "gpus_per_run": "on CPUs",
}
ANY_SIZE_FROM_ZERO = {
    "kappa": "no noise",
    "start": "no STE phase",
    "quantize_from": "no float phase",
    "warmup_fraction": "no warm-up",
    "final_fraction": "down to nothing",
    "weight_decay": "no decay",
    "dropout": "no dropout",
    "noise": "no noise",
    "mixup": "no mixup",
    "cutmix": "no cutmix",
    "label_smoothing": "no smoothing",
}
ANY_NAME = {
    "recipe": "a name for people",
    "dataset": "a hub id or path: looked for before training",
    "tokenizer": "a hub id or path: looked for before training",
    "subset": "known to the data set alone",
    "column": "known to the data set alone",
    "optimizer": "looked for in torch before training, as versions differ",
    "output_dir": "a new folder",
    "output": "a new folder",
    "initial_weights": "looked for before training",
    "run": "looked for before evaluation",
    "ray_address": "looked for before anything is written",
    "slurm_partition": "known to Slurm alone",
}
NONE_HAS_A_MEANING = {
    "initial_weights": "random ones",
    "probe_precision": "that of training",
    "clip_norm": "no clipping",
    "ema_decay": "no average",
    "image_size": "as the data set has them",
    "subset": "the only one",
    "bits": "the preset's",
    "surrogate": "the preset's",
    "granularity": "the preset's",
    "init": "the preset's",
    "levels": "the preset's",
    "scale_dtype": "that of the weights",
    "detach_scale": "the preset's",
    "learned": "the preset's",
    "block": "the preset's",
    "output": "in the run's folder",
    "variant": "the format's own",
    "vocab_size": "the tokenizer's",
    "learning_rates": "around the recipe's",
    "kappas": "the recipe's",
    "tuning_seeds": "all",
    "slurm_partition": "the cluster's own",
    "rounds": "the suite's",
    "seconds": "the suite's",
}
MAY_BE_EMPTY = {
    "hidden": "a linear network",
    "trackers": "metrics.jsonl alone",
    "only": "all sections",
}
FRACTIONS = {"validation_fraction", "probe_fraction", "warmup_fraction", "final_fraction", "start"}
FRACTIONS |= {"quantize_from", "ema_decay", "dropout", "label_smoothing"}
FLOATS = {"kappa", "radius", "learning_rate", "weight_decay", "clip_norm", "mixup", "noise"}
FLOATS |= {"cutmix", "seconds", "gpus_per_run"} | FRACTIONS


def why_meant(config, name, value):
    """Why a value of the list above is a good one for a field, or None."""
    if isinstance(config, MethodConfig):  # without a method it has no options
        return "the method's" if value is None and name != "name" else None
    if value is None:
        if (name, type(config)) == ("batch_size", EvalConfig):
            return "that of training's own evaluation"
        return NONE_HAS_A_MEANING.get(name)
    if isinstance(value, bool):
        return "a flag" if isinstance(getattr(config, name), bool) else None
    if isinstance(value, str):
        return ANY_NAME.get(name) if value else None
    if isinstance(value, list | tuple):
        empty_grid = name == "kappas" and list(value) == [0]
        return "kappa 0 is no noise" if empty_grid else None if value else MAY_BE_EMPTY.get(name)
    if isinstance(value, int) and value == -1:
        return "never" if name == "checkpoint_every" else None
    if isinstance(value, int) and value == 0:
        if (name, type(config)) == ("agreement", DoctorConfig):
            return "is not asked for"
        if (name, type(config)) == ("workers", ImagesConfig):
            return "decode in this process"
        if name == "checkpoint_every":
            return "at the end only"
        return ANY_COUNT_FROM_ZERO.get(name) or ANY_SIZE_FROM_ZERO.get(name)
    if isinstance(value, float) and value in (0.5, 2.0):
        return "in range" if name in (FLOATS if value < 1 else FLOATS - FRACTIONS) else None
    return None


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_field_refuses_what_cannot_be_meant_and_names_its_option(config):
    for field in dataclasses.fields(config):
        option = f"--{config.PREFIX}{field.name.replace('_', '-')} "
        named = (option, f"{field.name}=", ": runs/digits-mlp")
        for value in BAD:
            reason = why_meant(config, field.name, value)
            try:
                replace(config, **{field.name: value})
            except ValueError as error:
                assert reason is None, f"{field.name}={value!r} is {reason}, but: {error}"
                said = str(error)
                assert any(name in said for name in named), f"{field.name}={value!r}: {said}"
            else:
                assert reason is not None, f"{type(config).__name__}({field.name}={value!r})"


def test_there_is_no_config_beyond_those_tried():
    def kinds(cls):
        return {cls, *(found for sub in cls.__subclasses__() for found in kinds(sub))} - {Options}

    ours = {cls for cls in kinds(Options) if cls.__module__.startswith("fogzo")}
    assert {cls.__name__ for cls in ours} == {type(config).__name__ for config in CONFIGS}


def test_no_number_of_a_config_goes_without_a_rule():
    """A bare int or float takes -1 and 0; whoever adds one must say that it may."""
    for config in CONFIGS:
        hints = typing.get_type_hints(type(config), include_extras=True)
        for field in dataclasses.fields(config):
            bare = {int, float} & set(_leaves(hints[field.name]))
            assert not bare, f"{type(config).__name__}.{field.name} is a bare {bare}"


def _leaves(hint):
    if typing.get_origin(hint) is Annotated:
        kind, *marks = typing.get_args(hint)
        return [] if any(type(m).__name__ == "Rule" for m in marks) else _leaves(kind)
    inner = typing.get_args(hint)
    return [leaf for part in inner for leaf in _leaves(part)] if inner else [hint]


def test_a_nested_option_is_spelt_as_it_stands_on_the_command_line():
    for option in ("--quantizer.bits", "--activations.bits", "--data.augmentation.mixup"):
        with pytest.raises(ValueError, match=f": {option} "):
            parse(TrainConfig, [option, "-1"], "fogzo train", None, DIGITS)
    with pytest.raises(ValueError, match=r": --activations.bits None"):
        parse(
            TrainConfig,
            ["--activations.preset", "sign", "--activations.bits", "2"],
            "fogzo train",
            None,
            DIGITS,
        )
    with pytest.raises(ValueError, match=r": --max-steps 500"):
        arguments = ["--max-steps", "0"]
        parse(CompareConfig, arguments, "fogzo compare", None, CompareConfig(base=DIGITS))


@pytest.mark.parametrize("arguments", [["--output-dir="], ["--output-dir", ""], ["--seed", " "]])
def test_an_empty_value_is_refused(arguments):
    with pytest.raises(ValueError, match=r"--(output-dir|seed) has an empty value"):
        parse(TrainConfig, arguments, "fogzo train", None, DIGITS)


def test_what_means_the_same_is_converted():
    config = replace(
        DIGITS,
        seed=numpy.int64(3),
        learning_rate=numpy.float32(0.5),
        output_dir="runs/x",
        trackers=["wandb"],
        model=MlpConfig(hidden=[numpy.int32(4), 5]),
    )
    assert (config.seed, config.learning_rate, config.output_dir) == (3, 0.5, Path("runs/x"))
    assert type(config.seed) is int and type(config.learning_rate) is float
    assert config.model.hidden == (4, 5) and config.trackers == ("wandb",)


PATHS = ("output_dir", "initial_weights", "run", "runs", "output")


@pytest.mark.parametrize("name", [*PATHS, "dataset", "tokenizer"])
def test_a_path_that_begins_with_a_tilde_is_in_the_home_folder(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for config in CONFIGS:
        if hasattr(config, name):
            several = isinstance(getattr(config, name), tuple)
            changed = getattr(replace(config, **{name: ["~/x"] if several else "~/x"}), name)
            assert str(changed[0] if several else changed) == str(tmp_path / "x")
            with pytest.raises(
                ValueError, match=r"no user 'nobody-here' .*written \./~nobody-here/x"
            ):
                replace(config, **{name: ["~nobody-here/x"] if several else "~nobody-here/x"})


def test_no_field_holds_a_path_beyond_those_above():
    for config in CONFIGS:
        for name, hint in typing.get_type_hints(type(config)).items():
            assert "Path" not in str(hint) or name in PATHS, name


def test_a_message_is_cut_where_a_value_is_long():
    with pytest.raises(ValueError, match="max_steps must be") as error:
        replace(DIGITS, max_steps="9" * 5000)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "an object with named fields, got"),
        ("x", "an object with named fields, got 'x'"),
        (None, "an object with named fields, got None"),
        ({"kind": "images", "colour": 1}, "no field colour"),
        ({"image_size": "8"}, "image_size must be an integer or None, got '8'"),
        ({"augmentation": []}, "augmentation must be a AugmentationConfig, got"),
        ({"augmentation": {"mixup": -1}}, "mixup must be 0 or more, got -1"),
        ({"augmentation": {"colour": -1}}, "AugmentationConfig has no field colour"),
    ],
)
def test_json_of_another_structure_is_refused(values, says):
    with pytest.raises(ValueError, match=says):
        from_dict(ImagesConfig, values)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="needs the field recipe, model, data"):
        from_dict(TrainConfig, {})
