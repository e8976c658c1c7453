"""What a run is made of: frozen dataclasses, every field of which is a command-line option."""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from fogzo.recipes.data_config import DataConfig
from fogzo.recipes.model_config import ModelConfig, QuantizerConfig

EstimatorName = Literal[
    "ste", "fogzo", "fogzo-paired", "lambda", "placebo", "control-variate", "spsa"
]
ScheduleName = Literal["cosine", "linear", "onecycle", "wsd", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Perturbation = Literal["auto", "uniform", "triangular", "normal", "logistic", "rademacher"]


_AT_LEAST_ONE = {
    "max_steps": 500,
    "batch_size": 128,
    "accumulation": 1,
    "log_every": 10,
    "num_samples": 1,
    "probe_every": 4,
    "keep_checkpoints": 2,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run. It is written to config.json, which is enough to repeat it."""

    recipe: tyro.conf.Suppress[str]
    """Name of the recipe this began as."""
    output_dir: Path = Path("runs")
    """Folder of the run: config.json, metrics.jsonl, checkpoints, report.html."""
    resume: bool = False
    """Go on from the newest valid checkpoint in the folder; begin where there is none."""
    overwrite: bool = False
    """Replace a run that the folder holds already."""
    initial_weights: Path | None = None
    """Run folder whose weights to begin with, a float one for instance, instead of random ones."""
    seed: int = 0
    """Seed of the initial weights, the data order and the directions."""
    max_steps: int = 500
    """Optimizer steps."""
    batch_size: int = 128
    """Images or blocks of text a step, over all ranks and micro-batches."""
    accumulation: int = 1
    """Micro-batches that a rank's share of a batch is cut into."""

    estimator: EstimatorName = "fogzo"
    """Where the quantized weights' gradients come from."""
    num_samples: int = 1
    """n, directions probed a step."""
    probes_at_once: int | Literal["auto"] = 1
    """Directions whose forwards run together: faster for many samples of a small network."""
    kappa: float = 0.1
    """Noise-to-signal power at the end, which sets the noise share of fogzo and placebo."""
    noise_shape: Literal["isotropic", "tensor_rms"] = "isotropic"
    """isotropic is the paper's; tensor_rms gives each weight noise in proportion to its gradient,
    so that layers of small gradients do not wander under Adam."""
    agreement: Literal["shrunk", "measured"] = "shrunk"
    """What fogzo multiplies the gradient by: the measured agreement, drawn towards 1 by its
    standard error, or, as in the paper, as it was measured."""
    start: float = 0.0
    """Fraction of steps that are plain STE before fogzo, lambda or placebo switches on."""
    perturbation: Perturbation = "auto"
    """Law of the noise; auto is the one that the surrogate follows from. Others get its radius."""
    radius: float = 1.0
    """Radius of the perturbations, as a multiple of the surrogate's own."""
    one_sided: bool = False
    """Take differences from the step's own loss: half the forwards, more variance."""
    probe_every: int = 1
    """Steps from one probed step to the next, with plain STE between them."""
    probe_fraction: float = 1
    """Share of the batch that probes see."""
    probe_precision: Precision | None = None
    """Precision of the probes' forwards; by default that of training."""
    overhead: float | None = None
    """Probe only as often as costs this share of training time, measured in the first steps."""
    lean: bool = False
    """Move weights for the probes one layer at a time instead of keeping a copy of all."""
    track_flips: bool = False
    """Log the share of integer codes that differ between two probes; costs a rounding each."""

    optimizer: str = "adamw"
    """adamw, sgd (momentum 0.9), muon, adafactor or the name of any class of torch.optim."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: ScheduleName = "cosine"
    """Learning rate after the warm-up."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises linearly."""
    final_fraction: float = 0.0
    """Learning rate at the end over the peak."""
    weight_decay: float = 0.0
    """Decoupled for adamw and muon; norms, biases and learned step sizes never decay."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient, clipped after it is refined."""
    ema_decay: float | None = None
    """Evaluate an exponential moving average of the weights with this decay a step."""

    model: tyro.conf.AvoidSubcommands[ModelConfig]
    """The network."""
    quantizer: QuantizerConfig = field(default_factory=lambda: QuantizerConfig(preset="fixed"))
    """How weights are quantized."""
    activations: QuantizerConfig = field(default_factory=QuantizerConfig)
    """How the inputs of quantized layers are quantized."""
    quantize_first: bool = False
    """Quantize the first layer too: the stem, the patches' projection or the embedding."""
    quantize_last: bool = False
    """Quantize the output head too."""
    data: tyro.conf.AvoidSubcommands[DataConfig]
    """What is learned."""

    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda, mps, ..."""
    precision: Precision = "fp32"
    """bf16 and fp16 are autocast; fp16 with a gradient scaler."""
    compile: bool = False
    """Compile the network with torch.compile."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How ranks share the work, under torchrun or accelerate launch."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl; the first and the last are always written."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 writes one at the end only, a negative number none."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    trackers: tuple[Tracker, ...] = ()
    """Also log to these, through accelerate."""

    def __post_init__(self) -> None:
        for name, example in _AT_LEAST_ONE.items():
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be 1 or more, got {getattr(self, name)}: "
                    f"--{name.replace('_', '-')} {example}"
                )
        if not self.learning_rate > 0:
            raise ValueError(
                f"learning_rate must be positive, got {self.learning_rate}: --learning-rate 3e-3"
            )
        if not (self.kappa >= 0 and math.isfinite(self.kappa)):
            raise ValueError(f"kappa must be 0 or more and finite, got {self.kappa}: --kappa 0.1")
        if not (self.radius > 0 and math.isfinite(self.radius)):
            raise ValueError(f"radius must be positive and finite, got {self.radius}: --radius 1.0")
        if not 0 < self.probe_fraction <= 1:
            raise ValueError(
                f"probe_fraction must be in (0, 1], got {self.probe_fraction}: "
                "--probe-fraction 0.125"
            )
        if self.one_sided and (self.probe_fraction < 1 or self.probe_precision is not None):
            raise ValueError(
                "one-sided differences start from the step's own loss, of the whole batch in its "
                "own precision: leave --probe-fraction and --probe-precision out, or --one-sided"
            )
        for name in ("warmup_fraction", "final_fraction", "start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must be in [0, 1], got {getattr(self, name)}: "
                    f"--{name.replace('_', '-')} 0.1"
                )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1), got {self.ema_decay}: --ema-decay 0.99")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {self.clip_norm}: --clip-norm 1.0")
        if self.start and self.estimator in ("spsa", "control-variate"):
            raise ValueError(
                f"{self.estimator} has no STE phase before it: leave --start out, or this row"
            )
        if (self.model.family == "llama") != (self.data.kind == "text"):
            raise ValueError(
                f"a {self.model.family} cannot learn from {self.data.kind}: use a recipe whose "
                "model fits, such as digits-deit for images or pydoc-llama for text"
            )
        if self.schedule == "constant" and self.final_fraction:
            raise ValueError(
                f"a constant learning rate ends at its peak, got final_fraction "
                f"{self.final_fraction}: --final-fraction 0, or --schedule linear"
            )
        if self.activations.preset != "none" and self.quantizer.preset == "none":
            raise ValueError(
                "activations are quantized only where weights are: add --quantizer.preset lsq, or "
                "leave --activations.preset out"
            )
        self.quantizer.build()
        self.activations.build()


def to_json(config: Any) -> str:
    """A config as JSON text, keys in the order of the fields."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_dict(cls: type[Any], values: dict[str, Any]) -> Any:
    """A config from what `to_json` wrote.

    Raises:
        ValueError: If a key is not a field of the config.
    """
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no field {', '.join(sorted(unknown))}: it has {', '.join(hints)}"
        )
    return cls(**{name: _restore(hints[name], value) for name, value in values.items()})


def _restore(hint: Any, value: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [option for option in typing.get_args(hint) if option is not types.NoneType]
        if value is not None and any(map(dataclasses.is_dataclass, options)):
            return from_dict(_member(options, value), value)
        return value if value is None or len(options) > 1 else _restore(options[0], value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value)
    if hint is Path:
        return Path(value)
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    assert not isinstance(hint, types.GenericAlias), f"no rule to restore {hint}"
    return value


def _member(options: list[Any], values: dict[str, Any]) -> Any:
    """The dataclass of a union whose tag (its first field) the values carry."""
    for option in options:
        tag = dataclasses.fields(option)[0]
        if values.get(tag.name) == tag.default:
            return option
    raise ValueError(
        f"none of {', '.join(option.__name__ for option in options)} is tagged like "
        f"{json.dumps(values)[:80]}"
    )
