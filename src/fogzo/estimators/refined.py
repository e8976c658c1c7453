"""Which weights a step refines: those with a gradient that no estimator has written yet."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fogzo.collectives import local
from fogzo.layers.weights import QuantizedWeight
from fogzo.wording import caveat

_MARK = "_fogzo_refined_version"


def weights_to_refine(
    weights: Sequence[QuantizedWeight], models: Sequence[nn.Module], needs_gradient: bool
) -> list[QuantizedWeight]:
    """The weights that are not frozen, and of those the ones that have a gradient if it is needed.

    Raises:
        ValueError: If there are none, a gradient was refined already, or a weight without one is
            not its model's any more.
    """
    trained = [weight for weight in weights if weight.param.requires_grad]
    if not trained:
        raise ValueError(
            "no quantized weight requires a gradient, they are all frozen: "
            "model.requires_grad_(True), or train without an estimator. Under adapters (LoRA) "
            "the base stays frozen, and their gradients are exact without one"
        )
    if not needs_gradient:
        return trained
    # A weight without gradient took no part in this step (an unused expert): leave it alone.
    used = [weight for weight in trained if weight.param.grad is not None]
    if len(used) < len(trained):
        _check_still_held(trained, models)
    if not used:
        raise ValueError(
            "no quantized weight has a gradient. Call it after backward and before zero_grad: "
            "loss.backward(); estimator.refine_grads_(closure); optimizer.step(). If you did, "
            "these weights belong to another model than the loss (a deep copy made after "
            "quantized_weights(model), say), or were sharded after it: call fully_shard first"
            + caveat("Order of setup")
        )
    for weight in used:
        grad: Any = weight.param.grad
        if getattr(grad, _MARK, None) == local(grad)._version:
            raise ValueError(
                f"the gradient of {weight.name!r} has been refined already, by this estimator or "
                "another, and no backward() has followed: call refine_grads_ once per step, "
                "loss.backward(); estimator.refine_grads_(closure); optimizer.step(); "
                f"optimizer.zero_grad(){caveat('Refining twice')}"
            )
    return used


def mark_refined(weights: Sequence[QuantizedWeight]) -> None:
    """Remember on each gradient that it was refined as it is now."""
    for weight in weights:
        grad: Any = weight.param.grad
        setattr(grad, _MARK, local(grad)._version)


def _check_still_held(weights: Sequence[QuantizedWeight], models: Sequence[nn.Module]) -> None:
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
                f"FogzoEstimator(fogzo.quantized_weights(model), ...){caveat('Order of setup')}"
            )
