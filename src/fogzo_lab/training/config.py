"""The config of a run: a frozen dataclass, each field of which is a command-line option."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fogzo_lab.data.config import DataConfig
from fogzo_lab.options import (
    Example,
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    ProperShare,
    Rule,
    Share,
    ShareBelowOne,
    from_dict,
)
from fogzo_lab.system.devices import Device
from fogzo_lab.training.method_config import MethodConfig
from fogzo_lab.training.model_config import ModelConfig, QuantizerConfig, check_quantizers

__all__ = ["TrainConfig", "from_dict", "to_json"]

EstimatorName = Literal["ste", "fogzo", "lambda", "placebo", "control-variate", "spsa"]
ScheduleName = Literal["cosine", "linear", "onecycle", "wsd", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Perturbation = Literal["auto", "uniform", "triangular", "normal", "logistic", "rademacher"]
_PROBING: tuple[EstimatorName, ...] = ("fogzo", "lambda", "control-variate", "spsa")
_WITH_NOISE: tuple[EstimatorName, ...] = ("fogzo", "placebo", "control-variate", "spsa")
_BESIDE_STE: tuple[EstimatorName, ...] = ("fogzo", "lambda", "placebo")
USED_BY: dict[str, tuple[EstimatorName, ...]] = {
    "num_samples": _WITH_NOISE,
    "evaluate": _PROBING,
    "kappa": ("fogzo", "placebo"),
    "noise_shape": ("fogzo", "placebo", "control-variate"),
    "agreement": ("fogzo", "lambda"),
    "start": _BESIDE_STE,
    "perturbation": _WITH_NOISE,
    "radius": (*_WITH_NOISE, "lambda"),
    "one_sided": _PROBING,
    "probe_every": _BESIDE_STE,
    "probe_fraction": _PROBING,
    "probe_precision": _PROBING,
    "probe_loss": _PROBING,
    "track_flips": _PROBING,
}
"""The options of estimators, and which of these make anything of them."""
_Radius = Annotated[float, Rule(lambda radius: 0 < radius <= 1000, "in (0, 1000]")]
_CheckpointEvery = Annotated[int, Rule(lambda steps: steps >= -1, "-1 or more")]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Options):
    """One training run. It is written to config.json, which is enough to repeat it."""

    recipe: tyro.conf.Suppress[str]
    """Name of the recipe that the config comes from."""
    output_dir: Path = Path("runs")
    """Folder of the run: config.json, metrics.jsonl, checkpoints, report.html."""
    resume: bool = False
    """Resume from the newest intact checkpoint in the folder; start anew if there is no run."""
    overwrite: bool = False
    """Replace a run that is already in the folder."""
    initial_weights: Annotated[Path | None, Example("runs/float")] = None
    """Run folder, of a float run for instance, whose weights replace the random initial ones. Step
    sizes come with them from a run of the same quantizers; otherwise they are measured anew."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights, the data order and the directions."""
    max_steps: PositiveInt = 500
    """Optimizer steps."""
    batch_size: PositiveInt = 128
    """Images or blocks of text per step, over all ranks and micro-batches."""
    accumulation: PositiveInt = 1
    """Micro-batches per step on each rank (gradient accumulation)."""

    estimator: EstimatorName = "fogzo"
    """Estimator of the quantized weights' gradients."""
    num_samples: PositiveInt = 1
    """n, the number of directions probed per step."""
    evaluate: Literal["in_place", "stacked", "lean"] = "in_place"
    """How probes are evaluated, with the same result: stacked runs many in one forward pass, faster
    with many samples of a small network; lean perturbs one layer at a time, without a copy of all
    weights."""
    kappa: NonNegativeFloat = 1e-3
    """Noise-to-signal power at the end of training; sets the noise share of fogzo and placebo."""
    noise_shape: Literal["isotropic", "tensor_rms"] = "tensor_rms"
    """isotropic, as in the paper, or tensor_rms: noise in proportion to the gradient's RMS in each
    weight tensor, so that layers with small gradients do not wander under Adam."""
    agreement: Literal["shrunk", "measured"] = "shrunk"
    """Factor of the gradient in fogzo: the measured agreement, shrunk towards 1 according to its
    standard error, or exactly as measured, as in the paper."""
    start: ShareBelowOne = 0.0
    """Fraction of the steps with plain STE before fogzo, lambda or placebo starts."""
    perturbation: Perturbation = "auto"
    """Distribution of the noise; auto is the one that the surrogate follows from. Others get its
    radius."""
    radius: _Radius = 1.0
    """Radius of the perturbations, as a multiple of the surrogate's own."""
    one_sided: bool = False
    """Take differences from the step's own loss: half the forward passes, more variance."""
    probe_every: Annotated[PositiveInt, Example(4)] = 1
    """Probe every k-th step, with plain STE in between."""
    probe_fraction: Annotated[PositiveShare, Example(0.125)] = 1
    """Fraction of the batch that the probes are evaluated on."""
    probe_precision: Annotated[Precision | None, Example("bf16")] = None
    """Precision of the probes' forward passes; by default that of training."""
    probe_loss: Literal["measured", "linear"] = "measured"
    """The loss itself, or what backward's gradient at the rounded weights predicts of it, without
    a forward pass."""
    track_flips: bool = False
    """Log the fraction of integer codes that differ between two probes; costs one rounding per
    probe."""

    optimizer: str = "adamw"
    """adamw, sgd (momentum 0.9), muon, adafactor or the name of any class of torch.optim."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate."""
    schedule: ScheduleName = "cosine"
    """Learning rate after the warm-up."""
    warmup_fraction: Share = 0.05
    """Fraction of the steps in which the learning rate rises linearly."""
    final_fraction: Share = 0.0
    """Learning rate at the end as a fraction of the peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled for adamw and muon; norms, biases and learned step sizes never decay."""
    clip_norm: Annotated[PositiveFloat | None, Example(1.0)] = None
    """Maximum norm of the whole gradient, which is clipped after it is refined."""
    ema_decay: Annotated[ProperShare | None, Example(0.99)] = None
    """Evaluate an exponential moving average of the weights, with this decay per step."""

    model: tyro.conf.AvoidSubcommands[ModelConfig]
    """The network."""
    quantizer: QuantizerConfig = field(default_factory=lambda: QuantizerConfig(preset="fixed"))
    """How weights are quantized."""
    activations: QuantizerConfig = field(default_factory=QuantizerConfig)
    """How the inputs of quantized layers are quantized."""
    quantize_from: Share = 0.0
    """Fraction of the steps in float, before quantization begins; 1 quantizes after training."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """What acts on quantized weights beside the estimator."""
    quantize_first: bool = False
    """Quantize the first layer too: the stem, the patch projection or the embedding."""
    quantize_last: bool = False
    """Quantize the output head too."""
    data: tyro.conf.AvoidSubcommands[DataConfig]
    """The data set."""

    device: Device = "auto"
    """auto takes a GPU if there is one; or cpu, cuda, cuda:1, ..."""
    precision: Precision = "fp32"
    """bf16 and fp16 use autocast, fp16 with a gradient scaler."""
    compile: bool = False
    """Compile the network with torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How ranks share the work under torchrun or accelerate launch."""

    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl; the first and the last step are always written."""
    inspect_every: NonNegativeInt = 0
    """Steps between inspections of codes, masks and dead channels, for fogzo doctor; 0 makes none.
    """
    checkpoint_every: _CheckpointEvery = 100
    """Steps between checkpoints; 0 writes only one at the end, -1 none."""
    keep_checkpoints: PositiveInt = 2
    """Number of the newest checkpoints that stay on disk."""
    trackers: Annotated[tuple[Tracker, ...], Example(("tensorboard",))] = ()
    """Also log to these, through accelerate."""

    def check_together(self, prefix: str) -> None:
        """Raise a `ValueError` if options contradict each other."""
        if self.one_sided and (self.probe_fraction < 1 or self.probe_precision is not None):
            raise ValueError(
                "one-sided differences start from the step's own loss, of the whole batch in its "
                "own precision: leave --probe-fraction and --probe-precision out, or --one-sided"
            )
        micro_batch = max(1, self.batch_size // self.accumulation)
        if round(self.probe_fraction * micro_batch, 6) < 1:
            smallest = math.ceil(10_000 / micro_batch) / 10_000  # rounded up, so that it is enough
            raise ValueError(
                f"{self.probe_fraction:g} of a micro-batch of {micro_batch} is less than one "
                f"example to probe: --probe-fraction {smallest:g}, or a larger --batch-size"
            )
        if self.estimator in ("spsa", "control-variate"):
            self._check_alone()
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
        check_quantizers(self.quantizer, self.activations)
        self._check_linear()
        self._check_method()

    @property
    def has_codes(self) -> bool:
        """Whether layers are quantized, if only in the end; those of parq never are."""
        return self.quantizer.preset != "none" and self.method.name != "parq"

    def in_float_at(self, step: int) -> bool:
        """Whether the network still computes in float after so many steps."""
        return step < round(self.quantize_from * self.max_steps)

    def _check_alone(self) -> None:
        """Raise a `ValueError` if an estimator that never follows STE is to take turns with it."""
        asks_for_ste = {
            "--start": self.start,
            "--quantize-from": self.quantize_from,
            "--probe-every": self.probe_every > 1,
        }
        for option, given in asks_for_ste.items():
            if given:
                raise ValueError(
                    f"{self.estimator} has no steps of STE before or between its own: leave "
                    f"{option} out, or --estimator fogzo; of a comparison, leave this row out"
                )

    def _check_linear(self) -> None:
        """Raise a `ValueError` if the linearized loss cannot be had with the rest."""
        if self.probe_loss == "measured":
            return
        asks_of_forwards = {
            "--one-sided": self.one_sided,
            "--probe-fraction": self.probe_fraction < 1,
            "--probe-precision": self.probe_precision is not None,
            f"--evaluate {self.evaluate}": self.evaluate != "in_place",
        }
        for option, given in asks_of_forwards.items():
            if given:
                raise ValueError(
                    f"the linearized loss needs no forward passes, which {option} is about: leave "
                    f"{option} out, or --probe-loss measured"
                )
        if self.compile or self.parallel == "fsdp":
            option = "--compile" if self.compile else "--parallel fsdp"
            raise ValueError(
                f"the linearized loss needs eager layers and whole gradients: leave {option} out, "
                "or --probe-loss measured"
            )

    def _check_method(self) -> None:
        """Raise a `ValueError` if the method, or the float phase, cannot be had with the rest."""
        name, begin = self.method.name, self.quantize_from
        if self.quantizer.preset == "none" and (begin or name != "none"):
            option = f"--method.name {name}" if name != "none" else f"--quantize-from {begin:g}"
            raise ValueError(
                f"{option} is about quantized weights, and there are none: --quantizer.preset lsq"
            )
        if begin == 1 and self.estimator != "ste":
            raise ValueError(
                f"--quantize-from 1 trains in float to the end, where {self.estimator} has nothing "
                "to measure: --estimator ste, or --quantize-from 0.5"
            )
        if self.ema_decay is not None and begin and self.in_float_at(self.max_steps - 1):
            raise ValueError(
                "an average of weights begins anew where step sizes are measured, here after the "
                "last step, so there is nothing to average: --ema-decay None, or "
                "--quantize-from 0.5"
            )
        if name in ("cage", "dampening") and self.method.options["start"] < begin:
            raise ValueError(
                f"{name} would pull weights to the grid of a network that is in float: "
                f"{f'--method.start {begin:g}' if begin < 1 else '--method.name none'}, or "
                "--quantize-from 0"
            )
        if self.quantizer.preset == "bbq" and name in ("cage", "winq", "dampening"):
            raise ValueError(
                f"{name} pulls weights to the level that they round to, and bbq's are not among "
                "the weights: --quantizer.preset quest"
            )
        if begin and name in ("winq", "parq"):
            raise ValueError(f"{name} cannot wait for quantization to begin: --quantize-from 0")
        if name in ("cewt", "parq") and self.parallel == "fsdp":
            raise ValueError(
                f"{name} needs all of a weight, of which fsdp gives a rank a part: --parallel ddp"
            )
        if name == "winq" and self.method.options["resets"] > self.max_steps:
            resets = self.method.options["resets"]
            raise ValueError(
                f"winq resets once in a step at most, got {resets} resets in {self.max_steps} "
                f"steps: --method.resets {self.max_steps}, or --max-steps {resets}"
            )
        if name == "parq":
            self._check_parq()

    def _check_parq(self) -> None:
        if self.max_steps < 2:
            raise ValueError(
                "parq ends on its levels in a step after those that draw weights to them, which "
                f"takes 2 steps at least, got {self.max_steps}: --max-steps 2"
            )
        if self.estimator != "ste":
            raise ValueError(
                f"parq trains weights that no layer rounds, and {self.estimator} measures what "
                "rounding does: --estimator ste"
            )
        if self.activations.preset != "none":
            raise ValueError(
                "parq has no quantized layers and no quantized inputs: --activations.preset none"
            )
        if isinstance(self.quantizer.granularity, int):
            raise ValueError(
                "parq has a step per tensor or per channel here, got groups of "
                f"{self.quantizer.granularity}: --quantizer.granularity channel"
            )
        if self.ema_decay is not None:
            raise ValueError("an average of parq's weights is not on the grid: --ema-decay None")
        if self.precision == "fp16":
            raise ValueError("parq cannot skip a step, as fp16 may have to: --precision bf16")


def to_json(config: Any) -> str:
    """A config as JSON text, keys in the order of the fields."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"
