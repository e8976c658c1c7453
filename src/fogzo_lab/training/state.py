"""The parts of a run, put together from its config, and what a checkpoint holds of them."""

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from fogzo import (
    ControlVariateEstimator,
    FogzoEstimator,
    Inspection,
    LinearizedLoss,
    PlaceboEstimator,
    QuantizedWeight,
    SpsaEstimator,
    Watch,
    every,
    linear_noise_share,
    measure_step_sizes_,
    quantized_weights,
)
from fogzo.collectives import local
from fogzo.estimators import GradientEstimator, RefineStats
from fogzo.estimators.schedules import NoiseShare
from fogzo.layers.quantized_layer import STEP_NAMES
from fogzo.probing.rng import RngState
from fogzo.quantizers.smoothing import LAWS, with_radius
from fogzo_lab.data.config import AugmentationConfig, ImagesConfig
from fogzo_lab.system.devices import drawing_gpus
from fogzo_lab.system.json_files import checked
from fogzo_lab.training.checkpoint import (
    STRANGE,
    load_checkpoint,
    newest_checkpoint,
    on_all_ranks,
    restore_rng,
    rng_state,
)
from fogzo_lab.training.checkpoint_format import invalid, run_of, step_of
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.ema import Ema, EmaState
from fogzo_lab.training.learning_rates import learning_rate_factor
from fogzo_lab.training.methods import Methods
from fogzo_lab.training.models import build_model, calibrate, checkpoint_blocks_, logits
from fogzo_lab.training.optimizers import OptimizerState, build_optimizer, load_optimizer
from fogzo_lab.training.parallel import Ranks, parallelize, share_buffers
from fogzo_lab.training.run_folder import LogPosition, Metrics, read_config
from fogzo_lab.training.tasks import Batch, Task, load_task

_LOG = logging.getLogger(__name__)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _Weights(TypedDict):
    """The part of a checkpoint that is read to evaluate."""

    step: int
    model: dict[str, Tensor]
    ema: EmaState | None


class TrainingState(TypedDict):
    """The content of a checkpoint."""

    step: int
    seconds: float
    extra_forwards: float
    refined_steps: NotRequired[int]
    fallbacks: NotRequired[dict[str, int]]
    first_loss: NotRequired[float | None]
    diverged_steps: NotRequired[int]
    model: dict[str, Tensor]
    optimizer: OptimizerState
    estimator: dict[str, Any] | None
    methods: NotRequired[dict[str, Any]]
    scaler: dict[str, float]
    ema: EmaState | None
    windows: dict[str, Any]
    random_streams: dict[str, Any]
    ranks: NotRequired[int]
    log: NotRequired[LogPosition]


class Training:
    """All objects of a training run.

    Args:
        config: The run.
        ranks: This process among those of the run.
        checkpoint: Checkpoint to resume from, or None to start anew.

    Raises:
        DamagedCheckpoint: If the checkpoint is not of this training.

    Attributes:
        task: Data and loss.
        windows: The training batches of this rank.
        model: The network itself, which is evaluated.
        parallel: The same network for training: wrapped if several ranks share the work.
        estimator: None for plain backward.
        optimizer: Any optimizer of torch.
        linearized: What the estimator probes instead of the loss; None for the loss itself.
        methods: What acts on quantized weights beside the estimator, and when that begins.
        scaler: Does nothing unless the precision is fp16.
        ema: None unless asked for.
        step: Optimizer steps taken.
        seconds: Their duration.
        extra_forwards: Forward passes of the probes, in whole batches.
        refined_steps: Steps in which the estimator was asked to measure.
        fallbacks: Number of them that kept the gradient of backward, by reason.
        first_loss: The loss of the first step, once it is taken.
        learning_rate: Of the present step, where no method has another.
        diverged_steps: Number of consecutive steps, up to now, with a loss far beyond the first.
        flip_rate: Fraction of codes that differ between this step's first two probes, if tracked.
        inspection: Of this step, if one was due; the loop takes it.
        log_position: The state of the log when the checkpoint was written.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, checkpoint: Path | None = None) -> None:
        self.config, self.ranks = config, ranks
        self.task = load_task(config)
        self.windows = self.task.windows(config, ranks)
        self.model = build_model(config, self.task.shapes).to(ranks.device)
        if checkpoint is None:
            begins_from = config.initial_weights
            if begins_from is None or not _begin_from(begins_from, self.model, config):
                calibrate_activations(self.model, config, self.task, ranks.device)
        if config.gradient_checkpointing:
            checkpoint_blocks_(self.model)
        if config.compile:
            self.model.compile()
        # Learned step sizes have no gradient before quantization begins.
        self.parallel = parallelize(self.model, config.parallel, ranks, config.quantize_from > 0)
        self.estimator = build_estimator(config, self.model)
        linear = self.estimator is not None and config.probe_loss == "linear"
        self.linearized = LinearizedLoss(self.model) if linear else None
        self.optimizer = build_optimizer(config, self.model)
        self.methods = Methods(config, self.model, self.optimizer)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
        self.ema = Ema(self.model, config.ema_decay) if config.ema_decay else None
        self._learning_rate = learning_rate_factor(config)
        self.step, self.seconds, self.learning_rate = 0, 0.0, 0.0
        self.extra_forwards: float = 0
        self.refined_steps, self.fallbacks = 0, Counter[str]()
        self.first_loss: float | None = None
        self.diverged_steps = 0
        self.flip_rate: float | None = None
        self.inspection: Inspection | None = None
        every = config.inspect_every if config.has_codes else 0
        self._watch = Watch(self.model, every) if every else None
        self.log_position: LogPosition | None = None
        if checkpoint is not None:
            on_all_ranks(lambda: self._resume(checkpoint))
        self.model.train()

    def next_window(self) -> list[Batch]:
        """The coming step's micro-batches, on the device."""
        return [self.task.prepare(raw, self.ranks.device) for raw in next(self.windows)]

    def autocast(self, probing: bool = False) -> AbstractContextManager[Any]:
        """The context of a forward pass in the configured precision."""
        own = self.config.precision
        precision = (self.config.probe_precision or own) if probing else own
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, _DTYPES[precision])

    def set_learning_rate(self) -> None:
        """Set the learning rate of the coming step, which depends only on the step."""
        self.learning_rate = self.config.learning_rate * self._learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group.get("rate_factor", 1.0)

    def after_step(self) -> None:
        """What follows a step of the optimizer: the method's part, and the average."""
        if self.methods.after_step():
            calibrate_activations(self.model, self.config, self.task, self.ranks.device)
            if self.ema is not None:
                self.ema.restart()  # step sizes were measured anew
        if self.ema is not None:
            self.ema.update()

    def watch(self, loss: float) -> None:
        """Count consecutive losses above 1000 times the first one, and above 1000 nats.

        A uniform prediction costs a few nats and a confidently wrong one tens of nats, so that
        only a diverged network gets there.
        """
        if self.first_loss is None:
            self.first_loss = loss
        # The first loss may itself be infinite.
        sensible = math.isfinite(loss) and loss <= 1000 * max(self.first_loss, 1.0)
        self.diverged_steps = 0 if sensible else self.diverged_steps + 1

    def inspect(self, batch: Batch) -> None:
        """Count the flips of a step, and inspect the network if that is due.

        Args:
            batch: On which clipped inputs are counted.
        """
        if self._watch is not None:
            self._watch.load_state_dict({"step": self.step - 1})
            self.inspection = self._watch.update(lambda: self._forward(batch))

    def _forward(self, batch: Batch) -> Tensor:
        with self.autocast():
            return logits(self.model, batch[0])

    def evaluate(self) -> Metrics:
        """The numbers of each split, with the averaged weights if there is an average."""
        found: Metrics = {}
        with self.ema.applied() if self.ema else nullcontext():
            share_buffers(self.model, self.ranks)
            for split in self.task.splits:
                numbers = self.task.evaluate(self.model, split, self.ranks)
                found |= {f"{split}_{name}": value for name, value in numbers.items()}
        return found

    def all_finite(self) -> bool:
        """Whether every weight on every rank is a finite number."""
        params = [local(param.detach()) for param in self.model.parameters()]
        bad = torch.stack([(~param.isfinite()).sum().double() for param in params]).sum()
        return not self.ranks.sum(bad)

    def count(self, stats: RefineStats, share: float) -> None:
        """Count the forward passes, refinements and fallbacks of a step.

        Args:
            stats: Of the step.
            share: Of its examples, on which the probes were evaluated.
        """
        if self.linearized is None:
            self.extra_forwards += len(stats.probe_losses) * share
        if stats.probe_losses or stats.fallback is not None:
            self.refined_steps += 1
        if stats.fallback is not None:
            self.fallbacks[stats.fallback] += 1

    def refinements(self) -> Metrics:
        """For result.json: the number of refined steps, and of fallbacks by reason."""
        found: Metrics = {"refined_steps": self.refined_steps} if self.refined_steps else {}
        return found | ({"fallbacks": dict(self.fallbacks)} if self.fallbacks else {})

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to continue bit for bit."""
        share_buffers(self.model, self.ranks)
        return {
            "step": self.step,
            "seconds": self.seconds,
            "extra_forwards": self.extra_forwards,
            "refined_steps": self.refined_steps,
            "fallbacks": dict(self.fallbacks),
            "first_loss": self.first_loss,
            "diverged_steps": self.diverged_steps,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "estimator": self.estimator.state_dict() if self.estimator else None,
            "methods": self.methods.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "windows": self.windows.state_dict(),
            "random_streams": rng_state(),
            "ranks": self.ranks.count,
        }

    def _resume(self, checkpoint: Path) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        like = {
            "model": self.model.state_dict(),
            "optimizer": {"state": dict(enumerate(parameters))},
            "ema": self.ema.state_dict() if self.ema else None,
        }
        state = load_checkpoint(checkpoint, like)
        try:
            self._load(checked(TrainingState, state), checkpoint)
        except torch.OutOfMemoryError:
            raise
        except STRANGE as error:
            reason = " ".join(str(error).split())
            raise invalid(checkpoint, f"is of another training ({reason:.300})") from error

    def _load(self, state: TrainingState, checkpoint: Path) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.extra_forwards = state["extra_forwards"]
        self.refined_steps = state.get("refined_steps", 0)
        self.fallbacks.update(state.get("fallbacks", {}))
        self.first_loss, self.log_position = state.get("first_loss"), state.get("log")
        self.diverged_steps = state.get("diverged_steps", 0)
        named = step_of(checkpoint)
        if not 0 <= self.step <= self.config.max_steps or self.step != (named or self.step):
            raise ValueError(f"step is {self.step}")
        if state["windows"].get("step", self.step) != self.step:
            raise ValueError(f"windows.step is {state['windows']['step']}, unlike step")
        check_same_tensors(self.model.state_dict(), state["model"])
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        if (state["ema"] is None) != (self.ema is None):
            raise ValueError("one has an average of weights, and the other none")
        if (state["estimator"] is None) != (self.estimator is None):
            raise ValueError("one has an estimator, and the other none")
        if self.estimator is not None and state["estimator"] is not None:
            self.estimator.load_state_dict(state["estimator"])
            if (self.estimator.step, self.estimator.seed) != (self.step, self.config.seed):
                raise ValueError(f"estimator.step is {self.estimator.step}")
        self.methods.load_state_dict(state.get("methods", {}))
        if not 0 < state["scaler"].get("scale", 1.0) < math.inf:
            raise ValueError(f"scaler.scale is {state['scaler']['scale']}")
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        self.windows.load_state_dict(state["windows"])
        restore_rng(state["random_streams"])
        before, now = state.get("ranks", self.ranks.count), self.ranks.count
        if before != now and (differing := _drawn_by_rank(self.config)):
            _LOG.warning(
                "this run goes on with %d ranks and had %d: each draws its own %s, so it ends "
                "otherwise than it would have",
                now,
                before,
                differing,
            )


def _drawn_by_rank(config: TrainConfig) -> str:
    """What of a run's draws differs with the number of ranks, in words; empty if nothing does."""
    found = []
    if isinstance(config.data, ImagesConfig):
        smoothing = config.data.augmentation.label_smoothing
        if config.data.augmentation != AugmentationConfig(label_smoothing=smoothing):
            found.append("augmentation")
    if getattr(config.model, "dropout", 0.0):
        found.append("dropout")
    if config.probe_fraction < 1:
        found.append("part of the batch for probes")
    return " and ".join(found)


def build_estimator(config: TrainConfig, model: nn.Module) -> GradientEstimator | None:
    """The estimator by its name; None for plain backward."""
    weights = [_perturbed_as_asked(weight, config) for weight in quantized_weights(model)]
    if config.estimator == "ste" or not weights:
        return None
    options: dict[str, Any] = {
        "num_samples": config.num_samples,
        "evaluate": config.evaluate,
        "one_sided": config.one_sided,
        "noise_shape": config.noise_shape,
        "seed": config.seed,
    }
    if config.estimator == "spsa":
        options["noise_shape"] = "isotropic"  # there is no gradient to shape it by
        return SpsaEstimator(weights, **options)
    if config.estimator == "control-variate":
        return ControlVariateEstimator(weights, **options)
    schedule: NoiseShare = linear_noise_share(
        kappa=0.0 if config.estimator == "lambda" else config.kappa,
        total_steps=config.max_steps,
        start=max(config.start, config.quantize_from),
    )
    if config.probe_every > 1:
        schedule = every(config.probe_every, schedule)
    if config.estimator == "placebo":
        return PlaceboEstimator(weights, noise_share=schedule, **options)
    return FogzoEstimator(weights, noise_share=schedule, agreement=config.agreement, **options)


def _perturbed_as_asked(weight: QuantizedWeight, config: TrainConfig) -> QuantizedWeight:
    """The record with the config's noise law and radius; the backward rule stays as it is."""
    surrogate = weight.surrogate
    if config.perturbation == "auto" and config.radius == 1:
        return weight
    law = LAWS.get(config.perturbation, surrogate.perturbation)
    law = with_radius(law, config.radius * surrogate.radius)
    return replace(weight, surrogate=replace(surrogate, perturbation=law))


def find_weights(run: Path) -> Path:
    """The newest whole checkpoint of a run, or the checkpoint itself where one is given.

    Raises:
        ValueError: If there is none.
    """
    checkpoint = run if step_of(run) is not None else newest_checkpoint(run)
    if checkpoint is None or not (checkpoint / "manifest.json").is_file():
        raise ValueError(
            f"there is no whole checkpoint in {run}: give the --output-dir of a run that has one"
        )
    return checkpoint


def load_weights(model: nn.Module, run: Path, without: Collection[str] = ()) -> int:
    """Load the weights of another run, averaged if it averaged them; returns its step.

    Weights of a float run are quantized anew, as its checkpoint has no step sizes.

    Args:
        model: Takes the weights.
        run: A run, or one of its checkpoints.
        without: Names of layers' tensors that stay as they are, such as weight_step.

    Raises:
        ValueError: If there is no checkpoint, or one of another network.
    """
    checkpoint = find_weights(run)
    state = load_checkpoint(checkpoint, only=["step", "model", "ema"])
    try:
        found = checked(_Weights, state)
        weights = found["model"]
        if found["ema"] is not None:
            average = found["ema"]["average"]
            weights = {name: average.get(name, weight) for name, weight in weights.items()}
        weights = {
            name: weight
            for name, weight in weights.items()
            if name.rpartition(".")[2] not in without
        }
        check_same_tensors(model.state_dict(), weights, all_of_them=False)
        model.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        first = " ".join(str(error).split())
        raise ValueError(
            f"{checkpoint} is of another network ({first:.300}): use the recipe and the --model "
            f"options of {run}/config.json"
        ) from error
    return found["step"]


def _begin_from(run: Path, model: nn.Module, config: TrainConfig) -> bool:
    """Load initial weights, with their step sizes where those fit the quantizer.

    Returns:
        Whether the step sizes of inputs came with them.
    """
    checkpoint = find_weights(run)
    folder = run_of(checkpoint)
    # Weights that came without their config may be of any quantizer.
    other = read_config(folder) if (folder / "config.json").exists() else None
    same = inputs = False
    without: list[str] = []
    if other is not None:
        in_float = other.in_float_at(step_of(checkpoint) or 0)
        same = not in_float and other.quantizer.build() == config.quantizer.build()
        own = config.activations.build_for_inputs()
        inputs = same and other.activations.build_for_inputs() == own
        # Step sizes of another quantizer have other names and shapes.
        fits = {"weight": same, "input": inputs}
        without = [name for name in STEP_NAMES if not fits[name.partition("_")[0]]]
    load_weights(model, run, without)
    if not same and config.quantizer.preset != "none":
        measure_step_sizes_(model)
    return inputs


def check_same_tensors(
    own: dict[str, Tensor], given: dict[str, Tensor], all_of_them: bool = True
) -> None:
    """Raise a `ValueError` unless names, shapes and dtypes of two states agree."""
    if all_of_them and own.keys() != given.keys():
        differing = ", ".join(sorted(own.keys() ^ given.keys())[:5])
        raise ValueError(f"another network, which differs in {differing}")
    for name in own.keys() & given.keys():
        mine, other = own[name], given[name]
        if (mine.shape, mine.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"{name} is {other.dtype} of shape {tuple(other.shape)} there and "
                f"{mine.dtype} of shape {tuple(mine.shape)} here"
            )


def calibrate_activations(
    model: nn.Module, config: TrainConfig, task: Task, device: torch.device
) -> None:
    """Measure the step sizes of activations on the first batch, the same on every rank."""
    if config.activations.preset == "none" or config.quantizer.preset == "none":
        return
    raw = next(task.windows(config, Ranks(device)))[0]
    inputs, _ = task.prepare(raw, device, training=False)
    calibrate(model, inputs, config.seed)


@contextmanager
def own_random_streams(seed: int) -> Iterator[None]:
    """Seed torch's global random streams within the block, for dropout and augmentation.

    The streams of the caller are restored afterwards.
    """
    caller = RngState(drawing_gpus())
    torch.manual_seed(seed)  # noqa: TID251 -- given back
    try:
        yield
    finally:
        caller.restore()
