"""The method of a run beside its estimator, at the places of the loop where it acts."""

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fogzo.methods import (
    Cewt,
    GridPenalty,
    GridPull,
    Switch,
    cage,
    cewt,
    dampening,
    quantize_from,
    winq,
)
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.parq import Annealing
from fogzo_lab.training.run_folder import Metrics

_LOG = logging.getLogger(__name__)


class Methods:
    """When quantization begins, and what acts on quantized weights before and after a step.

    Args:
        config: Of the run.
        model: Quantized and, with FSDP, sharded.
        optimizer: Of its parameters.

    Attributes:
        switch: Ends the float phase; None for a run that is quantized throughout.
        acting: What acts on weights or gradients; None for nothing.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, optimizer: Optimizer) -> None:
        self.switch: Switch | None = None
        if config.quantize_from:
            self.switch = start_in_float(config, model)
        self.acting = _build(config, model, optimizer)

    def before_step(self) -> None:
        """Add to gradients that are unscaled and refined, but not clipped yet."""
        if isinstance(self.acting, GridPenalty):
            self.acting.add_grads_()

    def after_step(self) -> bool:
        """Pull weights, and count the step; whether quantization begins now."""
        if isinstance(self.acting, GridPull):
            self.acting.pull_()
        if self.switch is None or self.switch.is_quantized:
            return False
        self.switch.advance_()
        return self.switch.is_quantized

    def metrics(self) -> Metrics:
        """How strong the last pull was, and whether layers are quantized already."""
        found: Metrics = {}
        if isinstance(self.acting, GridPull | GridPenalty):
            found["pull_strength"] = self.acting.strength(max(0, self.acting.step - 1))
        if isinstance(self.acting, Annealing):
            found["softness"] = self.acting.softness
        if self.switch is not None:
            found["quantized"] = int(self.switch.is_quantized)
        return found

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "switch": None if self.switch is None else self.switch.state_dict(),
            "acting": None if self.acting is None else self.acting.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: If it is of other methods.
        """
        for name, own in (("switch", self.switch), ("acting", self.acting)):
            given = state.get(name)
            if (given is None) != (own is None):
                raise ValueError(f"methods.{name} is {given!r:.80}")
            if own is not None and given is not None:
                own.load_state_dict(given)


def warn_of_little_to_measure(config: TrainConfig) -> None:
    """Say so if probes are to measure weights that a pull holds on the grid."""
    pulls = config.method.name in ("cage", "winq", "dampening")
    if pulls and config.estimator not in ("ste", "placebo"):
        _LOG.warning(
            "%s measures how the loss changes when weights round differently, and %s is a pull to "
            "the grid, where they do not: on the toy of docs/methods.md the two are no better than "
            "the pull alone. --estimator ste, or --method.name none",
            config.estimator,
            config.method.name,
        )


def start_in_float(config: TrainConfig, model: nn.Module, step: int = 0) -> Switch:
    """Let the network of a run compute in float as it did, or will, at that step."""
    switch = quantize_from(model, config.quantize_from, total_steps=config.max_steps)
    switch.load_state_dict({"step": step})
    return switch


@dataclass(frozen=True)
class _Spread:
    """``strength`` in ``resets`` steps, evenly spread over ``total_steps``, and so on after them.

    >>> [step for step in range(7) if _Spread(0.8, 4, 7)(step)]
    [1, 3, 5, 6]
    """

    strength: float
    resets: int
    total_steps: int

    def __call__(self, step: int) -> float:
        """The strength at a step."""
        before, after = (count * self.resets // self.total_steps for count in (step, step + 1))
        return self.strength if after > before else 0.0


def _resets(model: nn.Module, steps: int, *, resets: int, keep: float) -> GridPull:
    """WinQ, as often as asked in a run."""
    every = steps // resets
    if steps // every == resets:
        return winq(model, every=every, keep=keep)
    # Such a period fits more often into a short run: 19 times into 19 steps, for 10.
    return GridPull(model, _Spread(1 - keep, resets, steps))


def _build(
    config: TrainConfig, model: nn.Module, optimizer: Optimizer
) -> GridPull | GridPenalty | Cewt | Annealing | None:
    options, steps = config.method.options, config.max_steps
    match config.method.name:
        case "cage":
            return cage(model, optimizer, total_steps=steps, **options)
        case "winq":
            return _resets(model, steps, **options)
        case "dampening":
            return dampening(model, total_steps=steps, **options)
        case "cewt":
            return cewt(model, optimizer, project=options["project"])
        case "parq":
            return Annealing(optimizer)
        case "none":
            return None
