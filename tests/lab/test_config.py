import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fogzo
from fogzo_lab.cli.commands import _parse
from fogzo_lab.comparison.compare import CompareConfig
from fogzo_lab.data.config import AugmentationConfig, ImagesConfig, TextConfig
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.config import TrainConfig, from_dict, to_json
from fogzo_lab.training.model_config import (
    DeitConfig,
    LlamaConfig,
    MlpConfig,
    QuantizerConfig,
    ResNetConfig,
    check_quantizers,
)
from fogzo_lab.training.run_folder import read_config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_the_json_of_its_run_folder(name):
    config = replace(
        RECIPES[name](), output_dir=Path("elsewhere"), initial_weights=Path("float"), ema_decay=0.9
    )
    assert from_dict(TrainConfig, json.loads(to_json(config))) == config
    comparison = CompareConfig(base=config, learning_rates=(0.1, 0.2))
    assert from_dict(CompareConfig, json.loads(to_json(comparison))) == comparison


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_and_carries_its_own_name(name):
    assert RECIPES[name].__doc__
    assert RECIPES[name]().recipe == name


def test_a_config_of_another_version_is_refused():
    with pytest.raises(ValueError, match="no field colour"):
        from_dict(QuantizerConfig, {"colour": "blue"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "--max-steps 500"),
        ({"learning_rate": -1.0}, "--learning-rate"),
        ({"num_samples": 0}, "--num-samples"),
        ({"estimator": "spsa", "start": 0.5}, "leave --start out, or --estimator fogzo"),
        ({"estimator": "control-variate", "start": 0.5}, "--start"),
        ({"accumulation": 0}, "--accumulation 1"),
        ({"ema_decay": 1.0}, "--ema-decay 0.99"),
        ({"clip_norm": 0.0}, "--clip-norm 1.0"),
        ({"warmup_fraction": 1.5}, "--warmup-fraction 0.05"),
        ({"schedule": "constant", "final_fraction": 0.1}, "--schedule linear"),
        ({"data": TextConfig()}, "mlp cannot learn from text"),
        (
            {
                "quantizer": QuantizerConfig(preset="none"),
                "activations": QuantizerConfig(preset="lsq"),
            },
            "--quantizer.preset lsq",
        ),
        (
            {"quantizer": QuantizerConfig(preset="lsq", granularity="token")},
            "no tokens.*--quantizer.granularity channel",
        ),
        (
            {"activations": QuantizerConfig(preset="lsq", granularity="token")},
            "--activations.granularity tensor, or --activations.preset abs_max",
        ),
    ],
)
def test_options_that_cannot_work_name_the_option(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPES["digits-mlp"](), **changes)


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (ImagesConfig, {"validation_fraction": 1.0}, "--data.validation-fraction 0.15"),
        (ImagesConfig, {"image_size": 0}, "--data.image-size 224"),
        (TextConfig, {"context": 0}, "--data.context 128"),
        (QuantizerConfig, {"preset": "lsq", "bits": 9}, "from 1 to 8, got 9: --quantizer.bits 2"),
        (QuantizerConfig, {"preset": "quest", "init": "mse"}, "--quantizer.init None"),
        (QuantizerConfig, {"preset": "ternary", "bits": 2}, "--quantizer.bits None"),
        (QuantizerConfig, {"preset": "sign", "levels": "half"}, "--quantizer.levels None"),
        (
            QuantizerConfig,
            {"bits": 4},
            "without a preset: --quantizer.preset fixed --quantizer.bits 4",
        ),
        (QuantizerConfig, {"block": 8}, "--quantizer.preset quest --quantizer.block 8"),
        (QuantizerConfig, {"stochastic": True}, "fixed --quantizer.stochastic$"),
        (QuantizerConfig, {"levels": "whole"}, "--quantizer.levels"),
        (QuantizerConfig, {"scale_dtype": "float8"}, "--quantizer.scale-dtype"),
        (QuantizerConfig, {"surrogate": "identiy"}, "--quantizer.surrogate identity"),
        (QuantizerConfig, {"granularity": 0}, "--quantizer.granularity channel"),
        (MlpConfig, {"hidden": (8, -5)}, "got -5: --model.hidden 32"),
        (ResNetConfig, {"widths": (8,)}, "as many widths as depths, got 1 and 4"),
        (ResNetConfig, {"widths": (), "depths": ()}, "one stage or more"),
        (ResNetConfig, {"widths": (2,), "depths": (1,), "bottleneck": True}, "a quarter"),
        (DeitConfig, {"heads": 5}, "5 heads cannot share a width of 192: --model.heads 1, or"),
        (DeitConfig, {"width": 64}, "--model.heads 1, or --model.width 63"),
        (LlamaConfig, {"heads": 128}, "128 heads .*in pairs: --model.heads 64, or .*width 256"),
        (LlamaConfig, {"width": 5, "heads": 1}, "in pairs: --model.width 4"),
        (AugmentationConfig, {"rand_augment": 30}, "--data.augmentation.rand-augment 9"),
        (AugmentationConfig, {"mixup": -1.0}, "--data.augmentation.mixup 0.8"),
        (AugmentationConfig, {"label_smoothing": 1.0}, "--data.augmentation.label-smoothing 0.1"),
    ],
)
def test_nested_options_that_cannot_work_name_the_option(cls, changes, message):
    with pytest.raises(ValueError, match=message):
        cls(**changes)


def test_a_model_of_no_known_family_is_refused():
    values = json.loads(to_json(RECIPES["digits-mlp"]()))
    values["model"]["family"] = "rnn"
    with pytest.raises(ValueError, match="none of MlpConfig"):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize("preset", ["fixed", "lsq", "quest", "ternary", "sign"])
def test_every_preset_can_be_asked_for(preset):
    assert QuantizerConfig(preset=preset).build() is not None
    assert QuantizerConfig(preset=preset, granularity="channel").build().granularity == "channel"
    assert QuantizerConfig(preset="none").build() is None


def test_another_preset_begins_from_its_own_defaults_and_keeps_what_is_given():
    def parsed(*arguments):
        return _parse("train", ["digits-mlp", *arguments], RECIPES)

    recipe = RECIPES["digits-mlp"]().quantizer
    assert parsed("--quantizer.preset", "fixed", "--quantizer.bits", "4").quantizer == replace(
        recipe, bits=4
    )
    quest = parsed("--quantizer.preset=quest", "--quantizer.granularity", "channel").quantizer
    assert quest == QuantizerConfig(preset="quest", bits=2, granularity="channel")
    given = ("--quantizer.surrogate", "identity")
    quest = parsed("--quantizer.preset", "quest", *given).quantizer
    assert quest == QuantizerConfig(preset="quest", bits=2, surrogate="identity")
    assert parsed("--quantizer.preset", "none").quantizer == QuantizerConfig()
    assert parsed("--quantizer.preset", "sign").quantizer == QuantizerConfig(preset="sign")
    with pytest.raises(ValueError, match=r"--quantizer.preset fixed --quantizer.bits 4"):
        parsed("--quantizer.preset", "none", "--quantizer.bits", "4")


def test_a_float_run_of_an_earlier_version_has_no_quantizer(tmp_path):
    values = json.loads(to_json(RECIPES["digits-mlp"]()))
    values["quantizer"]["preset"] = "none"
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path).quantizer == QuantizerConfig()


def test_levels_and_the_dtype_of_steps_are_those_of_the_file_to_come():
    config = QuantizerConfig(preset="lsq", levels="integer", scale_dtype="float16")
    assert config.build() == fogzo.lsq(2, levels="integer", scale_dtype=torch.float16)
    config = QuantizerConfig(preset="ternary", scale_dtype="bfloat16")
    assert config.build() == fogzo.ternary(scale_dtype=torch.bfloat16)


def test_a_step_size_that_is_kept_masks_inputs_and_not_weights():
    by_default = QuantizerConfig(preset="fixed")
    assert by_default.build() == fogzo.fixed(2, surrogate="identity_unmasked") == fogzo.fixed(2)
    assert by_default.build_for_inputs() == fogzo.fixed(2, surrogate="identity")
    unmasked = replace(by_default, surrogate="identity_unmasked")
    assert unmasked.build_for_inputs() == fogzo.fixed(2)


def test_unsigned_levels_are_for_inputs():
    unsigned = QuantizerConfig(preset="lsq", levels="unsigned")
    check_quantizers(QuantizerConfig(preset="lsq"), unsigned)
    with pytest.raises(ValueError, match=r"--quantizer\.levels integer"):
        check_quantizers(unsigned, QuantizerConfig())


def test_the_slope_of_a_drawn_level_comes_with_drawn_levels():
    from fogzo_lab.comparison.rows import ROWS

    recipe = RECIPES["digits-mlp"]()
    quantizers = {
        name: ROWS[name].change(recipe).quantizer.build()
        for name in ("ste-drawn", "ste-drawn-adjacent")
    }
    assert all(quantizer.stochastic for quantizer in quantizers.values())
    assert [quantizer.surrogate.name for quantizer in quantizers.values()] == [
        "identity_unmasked",
        "adjacent",
    ]
    with pytest.raises(
        ValueError, match=r"level that was drawn: --quantizer.stochastic, or --quan"
    ):
        QuantizerConfig(preset="lsq", surrogate="adjacent").check_together("quantizer.")
