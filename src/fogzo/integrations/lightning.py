"""Lightning's Trainer, in automatic and manual optimization.

L.Trainer(callbacks=[FogzoCallback(kappa=0.01)], accumulate_grad_batches=2).fit(module, loader)

The callback has an estimator record every `training_step`, and refines the gradients of an
optimizer step when they are complete and unscaled, before they are clipped.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import LBFGS, Optimizer

from fogzo.estimators import (
    FogzoEstimator,
    GradientEstimator,
    RefineStats,
    linear_noise_share,
)
from fogzo.integrations.options import check_options, check_weights
from fogzo.integrations.training_step import Recorder
from fogzo.layers import quantized_weights
from fogzo.layers.weights import WeightLike


class FogzoCallback(Callback):
    """Refine the gradients of every optimizer step that a Lightning Trainer takes.

    Accumulation, precision, clipping, loggers, checkpoints and resuming stay Lightning's. The log
    gains ``agreement``, ``kappa`` and ``fallbacks`` (steps so far that kept STE's gradient), and
    checkpoints the estimator's state. While a `training_step` runs again it logs nothing, takes no
    optimizer step, and leaves torchmetrics and the module's own numbers and containers as they
    were.

    In manual optimization call `self.manual_backward`, not ``loss.backward()``, and step what
    `self.optimizers()` gives, without ``use_pl_optimizer=False``.

    Args:
        estimator: A member of the family.
        weights: Lists the quantized weights of the module, for example
            `fogzo.integrations.torchao.quantized_weights`.
        kappa: Noise-to-signal power at the end of the run; the noise grows linearly until then,
            by `linear_noise_share`. Without it and ``start``, the estimator's own constant one. In
            manual optimization a batch counts as a step; where it is none, give
            ``noise_share=fogzo.linear_noise_share(total_steps=1000)`` instead.
        start: Fraction of the run that is plain STE before.
        **options: More options of the estimator.

    Attributes:
        estimator: Of the present run.
        stats: Statistics of its last step.

    Raises:
        ValueError: If a schedule is given twice, the estimator is no class or does not take the
            options; when fitting begins, if the module has no quantized weights, or is trained in
            a way that leaves nothing to refine.
    """

    def __init__(
        self,
        *,
        estimator: type[GradientEstimator] = FogzoEstimator,
        weights: Callable[[nn.Module], Iterable[WeightLike]] = quantized_weights,
        kappa: float | None = None,
        start: float = 0.0,
        **options: Any,
    ) -> None:
        own = ("estimator", "weights", "kappa", "start")
        check_options("FogzoCallback(", estimator, options, own, kappa, start)
        check_weights("FogzoCallback(", weights)
        self._cls, self._weights, self._options = estimator, weights, options
        self._kappa, self._start = kappa, start
        self.estimator: GradientEstimator | None = None
        self.stats: RefineStats | None = None
        self._fallbacks = 0
        self._loaded: dict[str, Any] | None = None
        self._recorder: Recorder
        self._is_refined = False
        self._patches = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the estimator, now that the module is where it trains."""
        weights = list(self._weights(pl_module))
        _check(trainer, pl_module)
        options = self._options
        if self._kappa is not None or self._start:
            total = trainer.estimated_stepping_batches
            if not 0 < total < math.inf:  # it is -1 where the loader does not know its length
                given = {"kappa": self._kappa} if self._kappa is not None else {}
                given |= {"start": self._start} if self._start else {}
                said = "".join(f", {name}={value}" for name, value in given.items())
                raise ValueError(
                    "the noise grows until the end of a run, and this one has none: "
                    "Trainer(max_steps=10_000), or give its length here, FogzoCallback("
                    f"noise_share=fogzo.linear_noise_share(total_steps=10_000{said})), or a "
                    "little noise from the first step on, FogzoCallback()"
                )
            schedule = linear_noise_share(
                total_steps=int(total), kappa=self._kappa, start=self._start
            )
            options = {**options, "noise_share": schedule}
        self.estimator = self._cls(weights, **options)
        optimizer = _check_optimizers(trainer, self.estimator)
        refine = partial(self._refine, trainer, pl_module)
        self._recorder = Recorder(trainer, pl_module, self.estimator, refine)
        self._patches.enter_context(self._recorder.installed())
        if isinstance(optimizer, Optimizer):
            hook = optimizer.register_step_post_hook(partial(self._check_refined, pl_module))
            self._patches.callback(hook.remove)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue where a checkpoint was taken."""
        assert self.estimator is not None
        if self._loaded is None:  # of a checkpoint without it, or none
            self.estimator.step = trainer.global_step
            self._fallbacks = self._fallbacks if trainer.global_step else 0
        else:
            self.estimator.load_state_dict(self._loaded["estimator"])
            self._fallbacks = self._loaded["fallbacks"]
        self._loaded = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Refine the gradients, and log what was measured."""
        if not self._refine(trainer, pl_module, optimizer):
            return
        self._is_refined = False
        if not trainer.barebones:
            assert self.stats is not None
            pl_module.log_dict(self._numbers(self.stats), on_step=True, on_epoch=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its methods back."""
        self._patches.close()
        self._loaded = None  # validation and tests load checkpoints, too, which no run continues

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The same."""
        self.teardown(trainer, pl_module, "")

    def state_dict(self) -> dict[str, Any]:
        """The estimator's step and seed, and how many steps fell back."""
        if self.estimator is None:
            return {}
        return {"estimator": self.estimator.state_dict(), "fallbacks": self._fallbacks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember a `state_dict` until the run begins."""
        self._loaded = state_dict or None

    def _refine(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> bool:
        """Refine the gradients of an optimizer's step, unless that is done or they are not ours.

        Returns:
            Whether they are refined.
        """
        estimator = self.estimator
        assert estimator is not None
        if self._recorder.skips_backward:
            return False  # the gradients are those of the last step
        trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
        params = [w.param for w in estimator.weights if id(w.param) in trained]
        if all(param.grad is None for param in params):
            return False  # another optimizer's step, or every micro-batch was skipped
        if not self._recorder.backwards:
            if self._is_refined:
                return True
            raise ValueError(
                "the gradients are of a loss that Lightning does not know of: in training_step "
                "call self.manual_backward(loss), not loss.backward()"
            )
        self.stats = estimator.refine_grads_()
        self._fallbacks += self.stats.fallback is not None
        self._recorder.backwards = 0
        self._is_refined = True
        return True

    def _check_refined(self, pl_module: LightningModule, *args: object) -> None:
        """Raise a `ValueError` if an optimizer's step went by Lightning, and so by the callback."""
        if pl_module.automatic_optimization or not self._recorder.backwards:
            return
        assert self.estimator is not None
        if any(weight.param.grad is not None for weight in self.estimator.weights):
            raise ValueError(
                "the optimizer took a step that Lightning knows nothing of, with gradients that "
                "were not refined: optimizer = self.optimizers(), not "
                "self.optimizers(use_pl_optimizer=False)"
            )

    def _numbers(self, stats: RefineStats) -> dict[str, float]:
        numbers: dict[str, float] = {"fallbacks": float(self._fallbacks)}
        if stats.agreement is not None:
            numbers["agreement"] = stats.agreement
        if stats.kappa is not None:
            numbers["kappa"] = stats.kappa
        return numbers


def _check(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise a `ValueError` if this way of training leaves nothing to refine."""
    if hasattr(pl_module.training_step, "refined_by_fogzo"):
        raise ValueError(
            "two callbacks refine the gradients of this module: "
            "Trainer(callbacks=[FogzoCallback()])"
        )
    # By name, as pytorch_lightning has classes of its own.
    strategies = {cls.__name__ for cls in type(trainer.strategy).__mro__}
    if strategies & {"FSDPStrategy", "DeepSpeedStrategy"}:
        raise ValueError(
            f"{type(trainer.strategy).__name__} keeps gradients in a form of its own, and they "
            'cannot be refined: Trainer(strategy="ddp"), or ModelParallelStrategy() with '
            "fully_shard in configure_model"
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise ValueError(
            "a training_step that takes batches from dataloader_iter itself cannot run again: "
            "def training_step(self, batch, batch_idx)"
        )


def _check_optimizers(trainer: Trainer, estimator: GradientEstimator) -> Any:
    """The optimizer whose steps are refined; None where all weights are frozen.

    Raises:
        ValueError: If there are several, none, or one that cannot be.
    """
    weights = {id(weight.param) for weight in estimator.weights if weight.param.requires_grad}
    holding = [
        optimizer
        for optimizer in trainer.optimizers
        if any(
            id(param) in weights for group in optimizer.param_groups for param in group["params"]
        )
    ]
    if weights and len(holding) != 1:
        raise ValueError(
            f"the quantized weights are trained by {len(holding)} optimizers, and an estimator "
            "refines the gradients of one step: give configure_optimizers one for all of them, or "
            "list those of one, FogzoCallback(weights=lambda module: "
            "fogzo.quantized_weights(module.generator))"
        )
    if any(isinstance(optimizer, LBFGS) for optimizer in holding):
        raise ValueError(
            "LBFGS compares losses along its own direction, in which refined gradients have no "
            "place: torch.optim.AdamW(self.parameters(), lr=1e-3)"
        )
    return next(iter(holding), None)
