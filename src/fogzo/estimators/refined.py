"""Which gradients are refined already, and which weights their model still has."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fogzo.collectives import local
from fogzo.layers.weights import QuantizedWeight

_MARK = "_fogzo_refined_version"


def mark_refined(weights: Sequence[QuantizedWeight]) -> None:
    """Remember on each gradient that it was refined as it is now."""
    for weight in weights:
        grad: Any = weight.param.grad
        setattr(grad, _MARK, local(grad)._version)


def check_not_refined(weights: Sequence[QuantizedWeight]) -> None:
    """Raise a `ValueError` if gradients are still those that an estimator wrote."""
    for weight in weights:
        grad: Any = weight.param.grad
        if getattr(grad, _MARK, None) == local(grad)._version:
            raise ValueError(
                f"the gradient of {weight.name!r} has been refined already, by this estimator or "
                "another, and no backward() has followed: call refine_grads_ once per step, "
                "loss.backward(); estimator.refine_grads_(closure); optimizer.step(); "
                "optimizer.zero_grad()"
            )


def check_still_held(weights: Sequence[QuantizedWeight], models: Sequence[nn.Module]) -> None:
    """Raise a `ValueError` if a weight without gradient is not its model's any more."""
    if not models:
        return
    held = {id(param) for model in models for param in model.parameters()}
    for weight in weights:
        if weight.model is not None and id(weight.param) not in held:
            raise ValueError(
                f"{weight.name!r} is no parameter of its model any more, so it would never be "
                "refined: something replaced it (fully_shard, resize, a parametrization) after "
                "the estimator was made. Call fully_shard first and resize first, then make it: "
                "FogzoEstimator(fogzo.quantized_weights(model), ...)"
            )
