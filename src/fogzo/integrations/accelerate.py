"""Loops of Hugging Face accelerate: refined in `accelerator.backward`, saved by `save_state`."""

from typing import Any

from torch import Tensor, nn

from fogzo.estimators import FogzoEstimator, GradientEstimator
from fogzo.integrations.options import check_class
from fogzo.layers import quantized_weights
from fogzo.probing.window import gradient_versions


def refine(
    accelerator: Any,
    model: nn.Module,
    *,
    estimator: type[GradientEstimator] = FogzoEstimator,
    **options: Any,
) -> GradientEstimator:
    """Refine a model's gradients at the end of every backward pass that ends an optimizer step.

    Compute the loss by ``estimator.record(compute_loss, batch)``; all else stays as it is. Where
    `accelerator.sync_gradients` says that a step is complete, `accelerator.backward` then refines
    the gradients of its micro-batches, before they are unscaled or clipped, and
    ``estimator.stats`` holds the statistics. Its state goes with `accelerator.save_state`.

    For several backward passes per step, of several losses or models, make the estimator
    yourself and call `refine_grads_` where the gradients are complete.

    Args:
        accelerator: An `accelerate.Accelerator`.
        model: The quantized model, after `accelerator.prepare`.
        estimator: A member of the family.
        **options: Its options, such as ``noise_share``.

    Returns:
        The estimator.

    Raises:
        ValueError: If the accelerator's backward is refined already, trains with DeepSpeed or
            Megatron-LM, which keep the gradients to themselves, or the estimator is no class.
    """
    check_class("refine(accelerator, model, ", estimator)
    distributed = str(accelerator.distributed_type).rpartition(".")[2]
    if distributed in ("DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"{distributed} keeps the gradients to itself, and they cannot be refined: train with "
            "DDP or FSDP2, accelerate launch --multi_gpu"
        )
    _forget_freed_models(accelerator)
    backward = accelerator.backward
    if hasattr(backward, "refined_by_fogzo"):
        raise ValueError(
            "this accelerator's backward refines gradients already. For a second model make its "
            "estimator yourself, fogzo.FogzoEstimator(fogzo.quantized_weights(model)), and call "
            "estimator.refine_grads_() if accelerator.sync_gradients"
        )
    weights = quantized_weights(accelerator.unwrap_model(model))
    made = estimator(weights, **options)
    accelerator.register_for_checkpointing(made)

    def backward_and_refine(loss: Tensor, **kwargs: Any) -> None:
        before = gradient_versions(made.weights)
        backward(loss, **kwargs)
        # Another model's leaves the gradients of this one alone.
        if accelerator.sync_gradients and gradient_versions(made.weights) != before:
            scaler = accelerator.scaler
            made.refine_grads_(grad_scale=1.0 if scaler is None else scaler.get_scale())

    wrapped: Any = backward_and_refine
    wrapped.refined_by_fogzo, wrapped.own = made, backward
    accelerator.backward = wrapped
    return made


def _forget_freed_models(accelerator: Any) -> None:
    """Take back what was refined of models that `accelerator.free_memory` has let go."""
    wrapped = accelerator.backward
    made: GradientEstimator | None = getattr(wrapped, "refined_by_fogzo", None)
    if made is None:
        return
    prepared = [accelerator.unwrap_model(model) for model in accelerator._models]
    if not any(weight.model is model for weight in made.weights for model in prepared):
        accelerator.backward = wrapped.own
        kept = [held for held in accelerator._custom_objects if held is not made]
        accelerator._custom_objects[:] = kept
