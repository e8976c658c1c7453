"""The Trainer of Hugging Face transformers, and trl's and anybody's that inherit from it.

`refine` puts a wrapper around six methods of one trainer object. Its `compute_loss` is recorded;
at the end of the `training_step` that completes an optimizer step, before clipping, the gradients
are refined. The rest is what a run needs besides: logs, checkpoints and weight decay.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fogzo.estimators import (
    FogzoEstimator,
    GradientEstimator,
    RefineStats,
    linear_noise_share,
)
from fogzo.integrations.counters import Counters, Replayed
from fogzo.integrations.options import check_options, check_weights
from fogzo.layers import QuantizedLayer, quantized_weights
from fogzo.layers.weights import WeightLike
from fogzo.wording import caveat, listed

STATE_FILE = "fogzo_estimator.pt"
_CAUSES = (
    "compute_loss reads something besides its arguments that has changed since: take the step from "
    "self.state.global_step, keep what it counts itself in an attribute of the trainer "
    "(self.calls += 1, not in an object that the trainer holds), or advance it in the on_step_end "
    "of a TrainerCallback; or it draws from a generator of its own"
)


def refine(
    trainer: Any,
    *,
    estimator: type[GradientEstimator] = FogzoEstimator,
    weights: Callable[[nn.Module], Iterable[WeightLike]] = quantized_weights,
    kappa: float | None = None,
    start: float = 0.0,
    **options: Any,
) -> "TrainerRefinement":
    """Refine the gradients of every optimizer step that a trainer takes.

    Accumulation, precision, clipping, callbacks, loggers, checkpoints and resuming stay the
    trainer's. Its log gains ``agreement`` (mean since the last log), ``kappa`` and ``fallbacks``
    (steps since then that kept STE's gradient); its checkpoints gain the estimator's state; learned
    step sizes of fogzo's layers do not decay. What `compute_loss` counts in the trainer, it counts
    once.

    Args:
        trainer: A `transformers.Trainer`, or a subclass's, that trains a quantized model and
            has not begun to train.
        estimator: A member of the family.
        weights: Lists the quantized weights of the model, for example
            `fogzo.integrations.torchao.quantized_weights`.
        kappa: Noise-to-signal power at the end of the run; the noise grows linearly until then,
            by `linear_noise_share`. Without it and ``start``, the estimator's own constant one.
        start: Fraction of the run that is plain STE before.
        **options: More options of the estimator. ``seed`` is the trainer's by default.

    Returns:
        A handle with ``estimator`` (None until training begins) and ``stats`` of the last step.

    Raises:
        ValueError: If the trainer is refined already, trains with DeepSpeed or sharding that
            keeps the gradients to itself, its model has no quantized weights, or the estimator is
            no class or does not take the options.
    """
    if hasattr(trainer.compute_loss, "refined_by_fogzo"):
        raise ValueError(
            "this trainer's gradients are refined already: call "
            "fogzo.integrations.transformers.refine(trainer) once"
        )
    if trainer.is_deepspeed_enabled or trainer.args.n_gpu > 1:
        raise ValueError(
            "gradients cannot be refined under DeepSpeed or torch's DataParallel: train with DDP, "
            "torchrun --nproc-per-node=2 train.py, or on one GPU, CUDA_VISIBLE_DEVICES=0"
        )
    own = ("estimator", "weights", "kappa", "start")
    check_options("refine(trainer, ", estimator, options, own, kappa, start)
    check_weights("refine(trainer, ", weights)
    if not list(weights(trainer.model)):
        raise ValueError(
            "the trainer's model is not quantized: "
            "Trainer(model=fogzo.quantize_(model, fogzo.lsq(bits=2)), args=args, ...), or, where "
            "another library rounds its weights, "
            "refine(trainer, weights=fogzo.integrations.torchao.quantized_weights)"
        )
    return TrainerRefinement(trainer, estimator, weights, kappa, start, options)


class TrainerRefinement:
    """What `refine` puts into a trainer.

    Attributes:
        estimator: Of the present run.
        stats: Statistics of its last step.
    """

    def __init__(
        self,
        trainer: Any,
        cls: type[GradientEstimator],
        weights: Callable[[nn.Module], Iterable[WeightLike]],
        kappa: float | None,
        start: float,
        options: dict[str, Any],
    ) -> None:
        from transformers import TrainerCallback

        self._trainer, self._cls, self._options = trainer, cls, options
        self._weights = weights
        self._kappa, self._start = kappa, start
        self.estimator: GradientEstimator | None = None
        self.stats: RefineStats | None = None
        self._unlogged: list[RefineStats] = []
        self._loaded: dict[str, float] | None = None
        self._in_step = self._is_muted = False
        wrappers: dict[str, Callable[..., Any]] = {
            "compute_loss": self._compute_loss,
            "training_step": self._training_step,
            "log": self._log,
            "get_decay_parameter_names": self._get_decay_parameter_names,
            "_save_optimizer_and_scheduler": self._save,
            "_load_optimizer_and_scheduler": self._load,
        }
        for name, wrapper in wrappers.items():
            own = getattr(trainer, name)
            wrapped: Any = wraps(own)(partial(wrapper, own))
            wrapped.refined_by_fogzo = self
            setattr(trainer, name, wrapped)

        begin = self._begin

        class Begin(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                begin()

        trainer.add_callback(Begin())

    def _begin(self) -> None:
        """Make the estimator of a run, now that its model is prepared and its length known."""
        trainer = self._trainer
        options = {"seed": trainer.args.seed, **self._options}
        if self._kappa is not None or self._start:
            options["noise_share"] = linear_noise_share(
                total_steps=trainer.state.max_steps, kappa=self._kappa, start=self._start
            )
        self.estimator = self._cls(self._weights(trainer.model), **options)
        if self._loaded is not None:
            self.estimator.load_state_dict(self._loaded)
        else:  # of a checkpoint without it, or none
            self.estimator.step = trainer.state.global_step
        self._loaded, self._unlogged = None, []
        _warn_of_decaying_steps(trainer)

    def _compute_loss(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._in_step or self.estimator is None:
            return own(*args, **kwargs)
        trainer = self._trainer
        # A compute_loss may count tokens in the trainer (trl's do), and runs again.
        counters = Counters([trainer], but_for=(trainer.train_dataset, trainer.eval_dataset))
        replayed = Replayed(own, counters, self._muted, _CAUSES)
        return self.estimator.record(replayed, *args, **kwargs)

    @contextmanager
    def _muted(self) -> Iterator[None]:
        """Have the trainer log nothing: what a probe would log is of perturbed weights."""
        self._is_muted = True
        try:
            yield
        finally:
            self._is_muted = False

    def _training_step(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._in_step = True
        try:
            loss = own(*args, **kwargs)
        finally:
            self._in_step = False
        accelerator = self._trainer.accelerator
        if accelerator.sync_gradients and self.estimator is not None:
            scaler = accelerator.scaler
            self.stats = self.estimator.refine_grads_(
                grad_scale=1.0 if scaler is None else scaler.get_scale()
            )
            self._unlogged.append(self.stats)
        return loss

    def _log(
        self, own: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any
    ) -> Any:
        if self._is_muted:
            return None
        if "loss" in logs and self._unlogged and not self._in_step:  # there, a compute_loss's own
            logs = {**logs, **_summary(self._unlogged)}
            self._unlogged = []
        return own(logs, *args, **kwargs)

    def _get_decay_parameter_names(self, own: Callable[..., Any], model: nn.Module) -> list[str]:
        steps = _learned_steps(model)
        return [name for name in own(model) if name not in steps]

    def _save(self, own: Callable[..., Any], output_dir: str) -> None:
        own(output_dir)
        if self._trainer.args.should_save and self.estimator is not None:
            torch.save(self.estimator.state_dict(), Path(output_dir, STATE_FILE))

    def _load(self, own: Callable[..., Any], checkpoint: str | None) -> None:
        own(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint, STATE_FILE)).is_file():
            self._loaded = torch.load(path, weights_only=True)


def _summary(steps: list[RefineStats]) -> dict[str, float]:
    """The numbers of a trainer's log, over the steps since the last one."""
    agreements = [stats.agreement for stats in steps if stats.agreement is not None]
    logs: dict[str, float] = {"fallbacks": sum(stats.fallback is not None for stats in steps)}
    if agreements:
        logs["agreement"] = sum(agreements) / len(agreements)
    if steps[-1].kappa is not None:
        logs["kappa"] = steps[-1].kappa
    return logs


def _learned_steps(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learned step sizes of a model by name."""
    return {
        f"{prefix}.{name}" if prefix else name: param
        for prefix, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
        for name, param in module.named_parameters(recurse=False)
        if name.endswith("_step")
    }


def _warn_of_decaying_steps(trainer: Any) -> None:
    steps = {id(param): name for name, param in _learned_steps(trainer.model).items()}
    decaying = [
        steps[id(param)]
        for group in trainer.optimizer.param_groups
        if group.get("weight_decay")
        for param in group["params"]
        if id(param) in steps
    ]
    if decaying:
        warnings.warn(
            f"the optimizer that the trainer was given decays the learned step sizes "
            f"{listed(decaying)}: make it of fogzo.parameter_groups(model, weight_decay=0.01), or "
            f"let the trainer make the optimizer{caveat('Weight decay')}",
            RuntimeWarning,
            stacklevel=2,
        )
