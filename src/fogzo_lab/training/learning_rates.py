"""Learning rates over a run: a warm-up to the peak, then one of five ways down."""

import math
from collections.abc import Callable

from fogzo_lab.training.config import TrainConfig

ONECYCLE_START = 0.01
"""Initial learning rate of onecycle as a fraction of the peak."""

WSD_DECAY = 0.2
"""Fraction of the steps in which wsd (warm-up, stable, decay) decays."""


def learning_rate_factor(config: TrainConfig) -> Callable[[int], float]:
    """The learning rate at a step, counted from 0, as a fraction of the peak.

    The warm-up is linear and takes ``warmup_fraction`` of the steps, at least one.
    After it come

    - cosine: half a cosine,
    - linear: a straight line,
    - wsd: the peak until the last fifth of the run, then a straight line,
    - constant: the peak.

    All reach ``final_fraction`` when ``max_steps`` are done. onecycle is torch's OneCycleLR: half a
    cosine from a hundredth of the peak up to it, half a cosine down to ``final_fraction``, which is
    the learning rate of the last step.

    Args:
        config: Its ``schedule``, ``max_steps``, ``warmup_fraction`` and ``final_fraction`` matter.

    Returns:
        A pure function of the step, for LambdaLR or for a parameter group.

    Example:
        >>> from dataclasses import replace
        >>> from fogzo_lab.training.config import TrainConfig
        >>> from fogzo_lab.data.config import ImagesConfig
        >>> from fogzo_lab.training.model_config import MlpConfig
        >>> config = TrainConfig(recipe="any", model=MlpConfig(), data=ImagesConfig(), max_steps=10)
        >>> factor = learning_rate_factor(replace(config, schedule="linear", warmup_fraction=0.2))
        >>> [factor(step) for step in range(11)]
        [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]
        >>> factor = learning_rate_factor(replace(config, schedule="wsd", final_fraction=0.5))
        >>> [factor(step) for step in range(11)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5]
    """
    total, end = config.max_steps, config.final_fraction
    warmup = max(1, round(config.warmup_fraction * total))
    decay = max(1, min(round(WSD_DECAY * total), total - warmup))

    def height(step: int) -> float:
        """From 1 after the warm-up to 0 at the end."""
        match config.schedule:
            case "cosine":
                return _half_cosine((step - warmup) / max(1, total - warmup))
            case "linear":
                return 1 - min(1.0, (step - warmup) / max(1, total - warmup))
            case "onecycle":
                return _half_cosine((step + 1 - warmup) / max(1, total - warmup))
            case "wsd":
                return max(0.0, min(1.0, (total - step) / decay))
            case "constant":
                return 1.0

    def factor(step: int) -> float:
        if step >= warmup:
            return end + (1 - end) * height(step)
        if config.schedule == "onecycle":
            left = _half_cosine(step / (warmup - 1)) if warmup > 1 else 0.0
            return 1 - (1 - ONECYCLE_START) * left
        return (step + 1) / warmup

    return factor


def _half_cosine(done: float) -> float:
    """From 1 to 0, flat at both ends."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
