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


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizerConfig:
    """Which quantizer, and where."""

    preset: Literal["none", "fixed", "lsq", "quest", "ternary", "sign"] = "fixed"
    """none trains in float."""
    bits: int = 2
    """Bits of fixed, lsq and quest."""
    surrogate: str | None = None
    """Backward rule; by default the preset's own."""
    granularity: Literal["tensor", "channel"] | int | None = None
    """What shares a step size: tensor, channel or a group size; by default the preset's own."""
    init: Literal["mse", "rms", "abs_mean", "lsq", "max"] | None = None
    """How fixed and lsq find their first step size; by default the preset's own."""
    everything: bool = False
    """Quantize output heads and embeddings too."""

    def build(self) -> Quantizer | None:
        """The quantizer, or None for float training.

        Raises:
            ValueError: If the options do not go together.
        """
        if self.preset == "none":
            return None
        options: dict[str, Any] = {
            "surrogate": self.surrogate,
            "granularity": self.granularity,
            "init": self.init,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if self.preset in ("fixed", "lsq", "quest"):
            given["bits"] = self.bits
        if self.init is not None and self.preset not in ("fixed", "lsq"):
            raise ValueError(
                f"{self.preset} measures its step size at every forward and takes no init: leave "
                "--quantizer.init out, or use --quantizer.preset fixed"
            )
        return typing.cast(Quantizer, getattr(quantizers, self.preset)(**given))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images."""

    dataset: str = "digits"
    """digits (scikit-learn's, embedded), or a hub id or local folder that `datasets` reads."""
    validation_fraction: float = 0.15
    """Share of the training images held out to choose learning rates."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must be in (0, 1), got {self.validation_fraction}: "
                "--data.validation-fraction 0.15"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run. It is written to config.json, which is enough to repeat it."""

    recipe: tyro.conf.Suppress[str]
    """Name of the recipe this began as."""
    output_dir: Path = Path("runs")
    """Folder of the run: config.json, metrics.jsonl, checkpoints, report.html."""
    seed: int = 0
    """Seed of the initial weights, the data order and the directions."""
    max_steps: int = 500
    """Optimizer steps."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    estimator: EstimatorName = "fogzo"
    """Where the quantized weights' gradients come from."""
    num_samples: int = 1
    """n, directions probed a step."""
    kappa: float = 0.1
    """Noise-to-signal power at the end, which sets the noise share of fogzo and placebo."""
    start: float = 0.0
    """Fraction of steps that are plain STE before fogzo, lambda or placebo switches on."""
    batch_size: int = 128
    """Images a step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd has momentum 0.9."""
    weight_decay: float = 0.0
    """Decoupled for adamw."""
    warmup_fraction: float = 0.05
    """Linear warm-up before the cosine decay to zero."""
    hidden: tuple[int, ...] = (32,)
    """Widths of the hidden layers."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """How weights are quantized."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is learned."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; the first and the last are always written."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes one at the end, a negative number none."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "log_every", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be 1 or more, got {getattr(self, name)}: "
                    f"--{name.replace('_', '-')} {type(self).__dataclass_fields__[name].default}"
                )
        if not self.learning_rate > 0:
            raise ValueError(
                f"learning_rate must be positive, got {self.learning_rate}: --learning-rate 3e-3"
            )
        if self.start and self.estimator in ("spsa", "control-variate"):
            raise ValueError(
                f"{self.estimator} has no STE phase before it: leave --start out, or this row"
            )
        self.quantizer.build()


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
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value)
    if hint is Path:
        return Path(value)
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    assert not isinstance(hint, types.GenericAlias), f"no rule to restore {hint}"
    return value
