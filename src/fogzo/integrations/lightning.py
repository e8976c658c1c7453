"""Lightning's Trainer, in automatic and manual optimization.

L.Trainer(callbacks=[FogzoCallback(kappa=0.01)], accumulate_grad_batches=2).fit(module, loader)

The callback records every `training_step` with the random state it began from. When the gradients
of an optimizer step are complete and unscaled, before clipping, the steps run again for the probes:
the whole of them, or, in manual optimization, as far as the backward pass in question.
"""

import copy
import inspect
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from fogzo.collectives import compute_device
from fogzo.estimators import (
    FogzoEstimator,
    GradientEstimator,
    RefineStats,
    linear_noise_share,
)
from fogzo.layers import quantized_weights
from fogzo.layers.weights import WeightLike
from fogzo.probing.rng import RngState
from fogzo.wording import listed


class FogzoCallback(Callback):
    """Refine the gradients of every optimizer step that a Lightning Trainer takes.

    Accumulation, precision, clipping, loggers, checkpoints and resuming stay Lightning's. The log
    gains ``agreement``, ``kappa`` and ``fallbacks`` (steps so far that kept STE's gradient), and
    checkpoints the estimator's state. While a `training_step` runs again it logs nothing, takes no
    optimizer step, and leaves torchmetrics and the module's own numbers and containers as they
    were.

    In manual optimization call `self.manual_backward`, not ``loss.backward()``.

    Args:
        estimator: A member of the family.
        weights: Lists the quantized weights of the module, for example
            `fogzo.integrations.torchao.quantized_weights`.
        kappa: Noise-to-signal power at the end of the run; the noise grows linearly until then,
            by `linear_noise_share`. By default the estimator's own constant one. In manual
            optimization a batch counts as a step; where it is none, give
            ``noise_share=fogzo.linear_noise_share(total_steps=1000)`` instead.
        start: Fraction of the run that is plain STE before.
        **options: More options of the estimator.

    Attributes:
        estimator: Of the present run.
        stats: Statistics of its last step.

    Raises:
        ValueError: If a schedule is given twice; when fitting begins, if the module has no
            quantized weights, or is trained in a way that leaves nothing to refine.
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
        if "noise_share" in options and (kappa is not None or start):
            raise ValueError(
                "give either kappa and start or a noise_share of your own: "
                "FogzoCallback(kappa=0.01)"
            )
        self._cls, self._weights, self._options = estimator, weights, options
        self._kappa, self._start = kappa, start
        self.estimator: GradientEstimator | None = None
        self.stats: RefineStats | None = None
        self._fallbacks = 0
        self._loaded: dict[str, int] | None = None
        self._recorder: _Recorder
        self._is_refined = False
        self._patches = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the estimator, now that the module is where it trains."""
        weights = list(self._weights(pl_module))
        _check(trainer, pl_module)
        options = self._options
        if self._kappa is not None or self._start:
            total = trainer.estimated_stepping_batches
            if not math.isfinite(total):
                raise ValueError(
                    "the noise grows until the end of a run, and this one has none: "
                    "Trainer(max_steps=10_000), or FogzoCallback(noise_share=1e-4)"
                )
            schedule = linear_noise_share(
                total_steps=int(total), kappa=self._kappa, start=self._start
            )
            options = {**options, "noise_share": schedule}
        self.estimator = self._cls(weights, **options)
        _check_optimizers(trainer, self.estimator)
        _warn_of_half_precision(self.estimator)
        refine = partial(self._refine, trainer, pl_module)
        self._recorder = _Recorder(trainer, pl_module, self.estimator, refine)
        self._patches.enter_context(self._recorder.installed())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue where a checkpoint was taken."""
        assert self.estimator is not None
        if self._loaded is None:  # of a checkpoint without it, or none
            self.estimator.step = trainer.global_step
        else:
            self.estimator.load_state_dict(self._loaded)
        self._loaded = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Refine the gradients, and log what was measured."""
        if self._refine(trainer, pl_module, optimizer) and not trainer.barebones:
            assert self.stats is not None
            pl_module.log_dict(self._numbers(self.stats), on_step=True, on_epoch=False)
        self._is_refined = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its methods back."""
        self._patches.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The same."""
        self._patches.close()

    def state_dict(self) -> dict[str, Any]:
        """The estimator's step and seed, and how many steps fell back."""
        if self.estimator is None:
            return {}
        return {"estimator": self.estimator.state_dict(), "fallbacks": self._fallbacks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember a `state_dict` until the run begins."""
        if state_dict:
            self._loaded, self._fallbacks = state_dict["estimator"], state_dict["fallbacks"]

    def _refine(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> bool:
        """Refine the gradients of an optimizer's step, unless that is done or they are not ours.

        Returns:
            Whether they are refined.
        """
        estimator = self.estimator
        assert estimator is not None
        trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
        params = [w.param for w in estimator.weights if id(w.param) in trained]
        if self._is_refined or all(param.grad is None for param in params):
            return self._is_refined
        if not self._recorder.backwards:
            raise ValueError(
                "the gradients are of a loss that Lightning does not know of: in training_step "
                "call self.manual_backward(loss), not loss.backward()"
            )
        with _undisturbed(trainer, pl_module):
            self.stats = estimator.refine_grads_()
        self._fallbacks += self.stats.fallback is not None
        self._recorder.backwards = 0
        self._is_refined = True
        return True

    def _numbers(self, stats: RefineStats) -> dict[str, float]:
        numbers: dict[str, float] = {"fallbacks": float(self._fallbacks)}
        if stats.agreement is not None:
            numbers["agreement"] = stats.agreement
        if stats.kappa is not None:
            numbers["kappa"] = stats.kappa
        return numbers


class _Skipped(BaseException):
    """A `training_step` returned None, which tells Lightning to skip the micro-batch."""


class _Reached(BaseException):
    """A `training_step` that runs again has come to the backward pass that it is run for."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


@dataclass
class _Call:
    """A call of a `training_step` in manual optimization.

    Attributes:
        args: Its arguments.
        kwargs: Its keyword arguments.
        rng: The random streams that it began from.
        backwards: How many backward passes it has come to.
        until: If it runs again, the one that it is run for.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: RngState
    backwards: int = 0
    until: int | None = None


class _Recorder:
    """Stands in for methods of a module, and has an estimator record what they compute.

    Manual optimization clips before its optimizer's step begins, so `clip_gradients` refines first.

    Attributes:
        backwards: Recorded losses since the last refined step.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        estimator: GradientEstimator,
        refine: Callable[[Optimizer], bool],
    ) -> None:
        self._trainer, self._module, self._estimator = trainer, pl_module, estimator
        self._refine = refine
        self._own_step, self._own_backward = pl_module.training_step, pl_module.manual_backward
        self._own_clip = pl_module.clip_gradients
        self._call: _Call | None = None
        self.backwards = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put wrappers around the methods while the context lasts."""
        step: Any = wraps(self._own_step)(lambda *args, **kwargs: self._step(*args, **kwargs))
        step.refined_by_fogzo = self
        with _attributes(
            self._module,
            training_step=step,
            manual_backward=self._manual_backward,
            clip_gradients=self._clip_gradients,
        ):
            yield

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if self._module.automatic_optimization:
            try:
                output = self._estimator.record(self._run, *args, **kwargs)
            except _Skipped:
                return None
            self.backwards += 1
            return output
        rng = RngState({compute_device(weight.param) for weight in self._estimator.weights})
        self._call = _Call(args, kwargs, rng)
        return self._own_step(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own step, in the precision that Lightning calls it in."""
        with self._trainer.precision_plugin.train_step_context():
            output = self._own_step(*args, **kwargs)
        if output is None and self._module.automatic_optimization:
            raise _Skipped
        return output

    def _manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        call = self._call
        assert call is not None
        call.backwards += 1
        if call.until is None:
            self.backwards += 1
            loss = self._estimator.record(self._manual_loss(loss), *call.args, **call.kwargs)
            self._own_backward(loss, *args, **kwargs)
        elif call.backwards == call.until:
            raise _Reached(loss)

    def _clip_gradients(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if not self._module.automatic_optimization:
            self._refine(optimizer)
        self._own_clip(optimizer, *args, **kwargs)

    def _manual_loss(self, loss: Tensor) -> Callable[..., Tensor]:
        """A function that returns this loss, and computes it again whenever it is called again."""
        call, first = self._call, [loss]
        assert call is not None
        number = call.backwards

        def compute_loss(*args: Any, **kwargs: Any) -> Tensor:
            if first:
                return first.pop()
            outer, self._call = self._call, replace(call, backwards=0, until=number)
            call.rng.restore()
            try:
                self._run(*args, **kwargs)
            except _Reached as reached:
                return reached.loss
            finally:
                self._call = outer
            raise ValueError(
                f"training_step came to its manual_backward number {number} when it ran and not "
                "when it ran again for a probe: which losses it computes must depend on its "
                "arguments only"
            )

        return compute_loss


@contextmanager
def _undisturbed(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Let a `training_step` run without a trace."""
    muted = ("log", "log_dict", "print", "clip_gradients", "toggle_optimizer", "untoggle_optimizer")
    with ExitStack() as stack:
        stack.enter_context(_state_put_back(pl_module))
        stack.enter_context(_attributes(pl_module, **dict.fromkeys(muted, _nothing)))
        for optimizer in trainer.strategy._lightning_optimizers:
            stack.enter_context(_attributes(optimizer, step=_nothing, zero_grad=_nothing))
        for config in trainer.lr_scheduler_configs:
            stack.enter_context(_attributes(config.scheduler, step=_nothing))
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        yield


@contextmanager
def _state_put_back(pl_module: LightningModule) -> Iterator[None]:
    """Lend copies of the module's own numbers, tensors and containers, and of its metrics' states.

    Parameters are put back by the estimator, and buffers too.
    """
    metrics = [module for module in pl_module.modules() if _is_metric(module)]
    modules: list[nn.Module] = [pl_module, *metrics]
    own = [dict(vars(module)) for module in modules]
    for module, attributes in zip(modules, own, strict=True):
        for name, value in attributes.items():
            if name not in _OF_EVERY_MODULE:
                vars(module)[name] = _lent(value)
    try:
        yield
    finally:
        for module, attributes in zip(modules, own, strict=True):
            vars(module).clear()
            vars(module).update(attributes)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _is_metric(module: nn.Module) -> bool:
    """Whether a module is one of torchmetrics, which Lightning brings along."""
    return any(cls.__module__.startswith("torchmetrics.") for cls in type(module).__mro__)


def _lent(value: Any) -> Any:
    """A copy of a tensor, or of a plain container and what is in it; anything else itself."""
    if type(value) is Tensor:
        return value.detach().clone()
    if type(value) is dict:
        return {key: _lent(item) for key, item in value.items()}
    if type(value) in (list, set, tuple):
        return type(value)(map(_lent, value))
    return copy.copy(value) if type(value) is deque else value


@contextmanager
def _attributes(owner: object, **values: Any) -> Iterator[None]:
    """Give an object attributes of its own while the context lasts."""
    held = vars(owner)
    own = {name: held[name] for name in values if name in held}
    held.update(values)
    try:
        yield
    finally:
        for name in values:
            held.pop(name, None)
        held.update(own)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _check(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise a `ValueError` if this way of training leaves nothing to refine."""
    if hasattr(pl_module.training_step, "refined_by_fogzo"):
        raise ValueError(
            "two callbacks refine the gradients of this module: "
            "Trainer(callbacks=[FogzoCallback()])"
        )
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
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


def _check_optimizers(trainer: Trainer, estimator: GradientEstimator) -> None:
    """Raise a `ValueError` unless the gradients of one optimizer's steps are refined."""
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


def _warn_of_half_precision(estimator: GradientEstimator) -> None:
    half = [w.name for w in estimator.weights if w.param.dtype.itemsize < 4]
    if half:
        warnings.warn(
            f"the latent weights of {listed(half)} are kept in 16 bits, where most of a probe, and "
            'of an update, rounds away: Trainer(precision="bf16-mixed")',
            RuntimeWarning,
            stacklevel=2,
        )
