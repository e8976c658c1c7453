"""What a run is made of: frozen dataclasses, every field of which is a command-line option."""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from fogzo import quantizers
from fogzo.quantizers import Quantizer

EstimatorName = Literal[
    "ste", "fogzo", "fogzo-paired", "lambda", "placebo", "control-variate", "spsa"
]
ScheduleName = Literal["cosine", "linear", "onecycle", "wsd", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizerConfig:
    """How weights, or a layer's inputs, are quantized."""

    preset: Literal["none", "fixed", "lsq", "quest", "ternary", "sign", "abs_max"] = "none"
    """none stays in float."""
    bits: int | None = None
    """Bits of fixed, lsq, quest (by default 2) and abs_max (8)."""
    surrogate: str | None = None
    """Backward rule; by default the preset's own."""
    granularity: Literal["tensor", "channel", "token"] | int | None = None
    """What shares a step size: tensor, channel (of weights), token (of inputs) or a group size; by
    default the preset's own."""
    init: Literal["mse", "rms", "abs_mean", "lsq", "max"] | None = None
    """How fixed and lsq find their first step size; by default the preset's own."""

    def build(self) -> Quantizer | None:
        """The quantizer, or None for float.

        Raises:
            ValueError: If the options do not go together.
        """
        if self.preset == "none":
            return None
        options: dict[str, Any] = {
            "surrogate": self.surrogate,
            "granularity": self.granularity,
            "init": self.init,
            "bits": self.bits,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if self.preset in ("ternary", "sign"):
            if self.bits is not None:
                raise ValueError(
                    f"{self.preset} has levels of its own and takes no bits, got {self.bits}: leave "
                    "--quantizer.bits out, or use --quantizer.preset lsq"
                )
        elif self.preset != "abs_max":
            given.setdefault("bits", 2)
        if self.init is not None and self.preset not in ("fixed", "lsq"):
            raise ValueError(
                f"{self.preset} measures its step size at every forward and takes no init: leave "
                "--quantizer.init out, or use --quantizer.preset fixed"
            )
        return typing.cast(Quantizer, getattr(quantizers, self.preset)(**given))


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpConfig:
    """A multilayer perceptron with ReLU."""

    family: tyro.conf.Suppress[Literal["mlp"]] = "mlp"
    hidden: tuple[int, ...] = (32,)
    """Widths of the hidden layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNetConfig:
    """A residual network of transformers."""

    family: tyro.conf.Suppress[Literal["resnet"]] = "resnet"
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Output channels of the stages."""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of the stages."""
    bottleneck: bool = False
    """Blocks of three convolutions (ResNet-50) instead of two (ResNet-18)."""
    small_images: bool = False
    """Begin with a 3x3 convolution of stride 1 and no pooling, as is usual for 32x32 pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeitConfig:
    """A vision transformer as DeiT trains it, without the distillation token."""

    family: tyro.conf.Suppress[Literal["deit"]] = "deit"
    width: int = 192
    """Size of a token's vector."""
    depth: int = 12
    """Blocks."""
    heads: int = 3
    """Attention heads."""
    patch_size: int = 16
    """Pixels a side of a patch."""
    dropout: float = 0.0
    """Probability of dropping a hidden unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """A LLaMA-2 decoder with untied embeddings."""

    family: tyro.conf.Suppress[Literal["llama"]] = "llama"
    width: int = 128
    """Size of a token's vector; the SwiGLU layer is 8/3 as wide, rounded up to 256."""
    depth: int = 4
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    vocab_size: int | None = None
    """Rows of the embedding; by default the tokenizer's number of tokens."""


ModelConfig = MlpConfig | ResNetConfig | DeitConfig | LlamaConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """What happens to training images, on the device; nothing by default."""

    crop: Literal["none", "pad", "resized"] = "none"
    """pad: a random crop after padding by an eighth (small images); resized: a random part of 8% to
    100% of the area, resized."""
    flip: bool = False
    """Mirror every other image."""
    rand_augment: int = 0
    """Magnitude, up to 29, of RandAugment's two operations an image; 0 for none, 9 in DeiT."""
    mixup: float = 0.0
    """Alpha of mixup; 0 for none, 0.8 in DeiT."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 for none, 1 in DeiT. With mixup too, either is taken in turn by a coin."""
    label_smoothing: float = 0.0
    """Probability spread over all classes."""

    def __post_init__(self) -> None:
        if not 0 <= self.rand_augment < 30:
            raise ValueError(
                f"rand_augment must be from 0 to 29, got {self.rand_augment}: "
                "--data.augmentation.rand-augment 9"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be in [0, 1), got {self.label_smoothing}: "
                "--data.augmentation.label-smoothing 0.1"
            )
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} must be 0 or more, got {getattr(self, name)}: "
                    f"--data.augmentation.{name} 0.8"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagesConfig:
    """Which images."""

    kind: tyro.conf.Suppress[Literal["images"]] = "images"
    dataset: str = "digits"
    """digits (scikit-learn's, embedded), a preset (mnist, cifar10, imagenet-100, imagenet-1k), or
    a hub id or local folder that `datasets` reads."""
    validation_fraction: float = 0.15
    """Share of the training images held out to choose learning rates."""
    image_size: int | None = None
    """Pixels a side that the network sees; by default as the data set has them."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """What happens to training images."""
    workers: int = 0
    """Processes that decode images ahead of training, for data sets too large for memory."""

    def __post_init__(self) -> None:
        _check_fraction(self.validation_fraction)
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(
                f"image_size must be 1 or more, got {self.image_size}: --data.image-size 224"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """Which text."""

    kind: tyro.conf.Suppress[Literal["text"]] = "text"
    dataset: str = "pydoc"
    """pydoc (the prose of Python's own help topics, embedded), a local text file or folder of
    .txt files, or a hub id or local folder that `datasets` reads."""
    subset: str | None = None
    """Configuration of a hub data set, such as en of allenai/c4."""
    column: str = "text"
    """Where a data set of `datasets` keeps its text."""
    tokenizer: str = "bytes"
    """bytes (256 tokens), or a hub id or folder that transformers' AutoTokenizer reads."""
    context: int = 128
    """Tokens a block."""
    streaming: bool = False
    """Read a hub data set while training instead of downloading it first."""
    validation_fraction: float = 0.1
    """Share of the text before the test part that is held out to choose learning rates; the test
    part is the last tenth, or the data set's own validation or test split."""
    max_eval_blocks: int = 512
    """At most so many blocks are evaluated of a split."""

    def __post_init__(self) -> None:
        _check_fraction(self.validation_fraction)
        for name in ("context", "max_eval_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be 1 or more, got {getattr(self, name)}: "
                    f"--data.{name.replace('_', '-')} 128"
                )


DataConfig = ImagesConfig | TextConfig


_AT_LEAST_ONE = {
    "max_steps": 500,
    "batch_size": 128,
    "accumulation": 1,
    "log_every": 10,
    "num_samples": 1,
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
    kappa: float = 0.1
    """Noise-to-signal power at the end, which sets the noise share of fogzo and placebo."""
    noise_shape: Literal["isotropic", "tensor_rms"] = "isotropic"
    """isotropic is the paper's; tensor_rms gives each weight noise in proportion to its gradient,
    so that layers of small gradients do not wander under Adam."""
    start: float = 0.0
    """Fraction of steps that are plain STE before fogzo, lambda or placebo switches on."""

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
        return Path(value) if value is not None and Path in options else value
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


def _check_fraction(value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(
            f"validation_fraction must be in (0, 1), got {value}: --data.validation-fraction 0.15"
        )
