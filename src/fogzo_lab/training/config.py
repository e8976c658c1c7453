"""What a run is made of: frozen dataclasses, every field of which is a command-line option."""

import dataclasses
import json
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
from fogzo_lab.training.model_config import ModelConfig, QuantizerConfig, check_quantizers

__all__ = ["TrainConfig", "from_dict", "to_json"]

EstimatorName = Literal["ste", "fogzo", "lambda", "placebo", "control-variate", "spsa"]
ScheduleName = Literal["cosine", "linear", "onecycle", "wsd", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Perturbation = Literal["auto", "uniform", "triangular", "normal", "logistic", "rademacher"]
_Radius = Annotated[float, Rule(lambda radius: 0 < radius <= 1000, "in (0, 1000]")]
_CheckpointEvery = Annotated[int, Rule(lambda steps: steps >= -1, "-1 or more")]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Options):
    """One training run. It is written to config.json, which is enough to repeat it."""

    recipe: tyro.conf.Suppress[str]
    """Name of the recipe this began as."""
    output_dir: Path = Path("runs")
    """Folder of the run: config.json, metrics.jsonl, checkpoints, report.html."""
    resume: bool = False
    """Go on from the newest whole checkpoint in the folder; begin where there is no run."""
    overwrite: bool = False
    """Replace a run that the folder holds already."""
    initial_weights: Annotated[Path | None, Example("runs/float")] = None
    """Run folder whose weights to begin with, a float one for instance, instead of random ones."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights, the data order and the directions."""
    max_steps: PositiveInt = 500
    """Optimizer steps."""
    batch_size: PositiveInt = 128
    """Images or blocks of text a step, over all ranks and micro-batches."""
    accumulation: PositiveInt = 1
    """Micro-batches that a rank's share of a batch is cut into."""

    estimator: EstimatorName = "fogzo"
    """Where the quantized weights' gradients come from."""
    num_samples: PositiveInt = 1
    """n, directions probed a step."""
    evaluate: Literal["in_place", "stacked", "lean"] = "in_place"
    """How probes are evaluated, with the same result: stacked takes many in one forward pass, which
    is faster for many samples of a small network; lean copies one layer's weights at a time."""
    kappa: NonNegativeFloat = 1e-3
    """Noise-to-signal power at the end, which sets the noise share of fogzo and placebo."""
    noise_shape: Literal["isotropic", "tensor_rms"] = "tensor_rms"
    """isotropic is the paper's; tensor_rms gives each weight noise in proportion to its gradient,
    so that layers of small gradients do not wander under Adam."""
    agreement: Literal["shrunk", "measured"] = "shrunk"
    """What fogzo multiplies the gradient by: the measured agreement, drawn towards 1 by its
    standard error, or, as in the paper, as it was measured."""
    start: ShareBelowOne = 0.0
    """Fraction of steps that are plain STE before fogzo, lambda or placebo switches on."""
    perturbation: Perturbation = "auto"
    """Law of the noise; auto is the one that the surrogate follows from. Others get its radius."""
    radius: _Radius = 1.0
    """Radius of the perturbations, as a multiple of the surrogate's own."""
    one_sided: bool = False
    """Take differences from the step's own loss: half the forwards, more variance."""
    probe_every: Annotated[PositiveInt, Example(4)] = 1
    """Steps from one probed step to the next, with plain STE between them."""
    probe_fraction: Annotated[PositiveShare, Example(0.125)] = 1
    """Share of the batch that probes see."""
    probe_precision: Annotated[Precision | None, Example("bf16")] = None
    """Precision of the probes' forwards; by default that of training."""
    track_flips: bool = False
    """Log the share of integer codes that differ between two probes; costs a rounding each."""

    optimizer: str = "adamw"
    """adamw, sgd (momentum 0.9), muon, adafactor or the name of any class of torch.optim."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate."""
    schedule: ScheduleName = "cosine"
    """Learning rate after the warm-up."""
    warmup_fraction: Share = 0.05
    """Share of the steps in which the learning rate rises linearly."""
    final_fraction: Share = 0.0
    """Learning rate at the end over the peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled for adamw and muon; norms, biases and learned step sizes never decay."""
    clip_norm: Annotated[PositiveFloat | None, Example(1.0)] = None
    """Largest norm of the whole gradient, clipped after it is refined."""
    ema_decay: Annotated[ProperShare | None, Example(0.99)] = None
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

    device: Device = "auto"
    """auto takes a GPU where there is one; or cpu, cuda, mps, ..."""
    precision: Precision = "fp32"
    """bf16 and fp16 are autocast; fp16 with a gradient scaler."""
    compile: bool = False
    """Compile the network with torch.compile."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How ranks share the work, under torchrun or accelerate launch."""

    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl; the first and the last are always written."""
    checkpoint_every: _CheckpointEvery = 100
    """Steps between checkpoints; 0 writes one at the end only, -1 none."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""
    trackers: Annotated[tuple[Tracker, ...], Example(("tensorboard",))] = ()
    """Also log to these, through accelerate."""

    def check_together(self, prefix: str) -> None:
        """Raise a `ValueError` where options, each of which can be meant, do not go together."""
        if self.one_sided and (self.probe_fraction < 1 or self.probe_precision is not None):
            raise ValueError(
                "one-sided differences start from the step's own loss, of the whole batch in its "
                "own precision: leave --probe-fraction and --probe-precision out, or --one-sided"
            )
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
        check_quantizers(self.quantizer, self.activations)


def to_json(config: Any) -> str:
    """A config as JSON text, keys in the order of the fields."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"
