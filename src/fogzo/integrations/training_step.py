"""A `training_step` of Lightning, recorded, and run again without a trace.

Each runs again from the random state that it began from: the whole of it, or, in manual
optimization, as far as the backward pass in question.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, update_wrapper
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.optim import Optimizer

from fogzo.collectives import compute_device
from fogzo.estimators import GradientEstimator
from fogzo.integrations.counters import Counters, Replayed
from fogzo.probing.rng import RngState
from fogzo.probing.window import gradient_versions

_CAUSES = (
    "training_step reads something besides its arguments that has changed since: take the step "
    "from self.global_step, and keep what it counts itself in an attribute of the LightningModule, "
    "self.calls += 1, not in an object that the module holds; or it draws from a generator of its "
    "own"
)


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
        counters: The module's own numbers that it began from.
        backwards: How many backward passes it has come to.
        until: If it runs again, the one that it is run for.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: RngState
    counters: Counters
    backwards: int = 0
    until: int | None = None


class _InPlaceOf:
    """A callable in place of a module's method, whose copies and pickles have that method again."""

    refined_by_fogzo = True

    def __init__(self, module: nn.Module, name: str, call: Callable[..., Any]) -> None:
        update_wrapper(self, getattr(module, name))
        self._module, self._name, self._call = module, name, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, self._name)


class Recorder:
    """Stands in for methods of a module, and has an estimator record what they compute.

    Manual optimization clips before its optimizer's step begins, so `clip_gradients` refines first.

    Attributes:
        backwards: Recorded losses in the present gradients, since these were refined last.
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
        wrappers = {
            "training_step": self._step,
            "manual_backward": self._manual_backward,
            "clip_gradients": self._clip_gradients,
        }
        module = self._module
        with _attributes(module, **{n: _InPlaceOf(module, n, w) for n, w in wrappers.items()}):
            yield

    @property
    def skips_backward(self) -> bool:
        """Whether batches only run forward now: StochasticWeightAveraging's last epoch does so."""
        return bool(getattr(self._trainer.fit_loop, "_skip_backward", False))

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if self.skips_backward:
            return self._own_step(*args, **kwargs)
        counters = _counters(self._module)
        if self._module.automatic_optimization:
            try:
                replayed = self._replayed(self._run, counters)
                output = self._estimator.record(replayed, *args, **kwargs)
            except _Skipped:
                return None
            self.backwards += 1
            return output
        rng = RngState({compute_device(weight.param) for weight in self._estimator.weights})
        self._call = _Call(args, kwargs, rng, counters)
        return self._own_step(*args, **kwargs)

    def _replayed(self, call: Callable[..., Any], counters: Counters) -> Replayed:
        quietly = partial(_undisturbed, self._trainer, self._module)
        return Replayed(call, counters, quietly, _CAUSES)

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
            replayed = self._replayed(self._manual_loss(loss), call.counters)
            loss = self._estimator.record(replayed, *call.args, **call.kwargs)
            before = gradient_versions(self._estimator.weights)
            self._own_backward(loss, *args, **kwargs)
            # A critic's leaves the gradients of its generator alone.
            self.backwards += gradient_versions(self._estimator.weights) != before
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
    """Let a `training_step` run without a trace outside of its module."""
    muted = ("log", "log_dict", "print", "clip_gradients", "toggle_optimizer", "untoggle_optimizer")
    with ExitStack() as stack:
        stack.enter_context(_attributes(pl_module, **dict.fromkeys(muted, _nothing)))
        for optimizer in trainer.strategy._lightning_optimizers:
            stack.enter_context(_attributes(optimizer, step=_closure_alone, zero_grad=_nothing))
        for config in trainer.lr_scheduler_configs:
            stack.enter_context(_attributes(config.scheduler, step=_nothing))
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        yield


def _counters(pl_module: LightningModule) -> Counters:
    """The module's own numbers, tensors and containers, and its metrics' states.

    Parameters are put back by the estimator, and buffers too.
    """
    metrics = [module for module in pl_module.modules() if _is_metric(module)]
    modules: list[nn.Module] = [pl_module, *metrics]
    torchs = [vars(module).get(name) for module in modules for name in _OF_EVERY_MODULE]
    return Counters(modules, but_for=torchs)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _is_metric(module: nn.Module) -> bool:
    """Whether a module is one of torchmetrics, which Lightning brings along."""
    return any(cls.__module__.startswith("torchmetrics.") for cls in type(module).__mro__)


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


def _closure_alone(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
    """An optimizer's step without the step: its closure may hold a backward pass."""
    return None if closure is None else closure()
