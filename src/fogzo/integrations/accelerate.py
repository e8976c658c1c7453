"""Loops of Hugging Face accelerate: refined in `accelerator.backward`, saved by `save_state`."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fogzo.estimators import FogzoEstimator, GradientEstimator
from fogzo.integrations.options import check_options, check_weights
from fogzo.layers import quantized_weights
from fogzo.layers.weights import WeightLike
from fogzo.probing.window import gradient_versions


def refine(
    accelerator: Any,
    model: nn.Module,
    *,
    estimator: type[GradientEstimator] = FogzoEstimator,
    weights: Callable[[nn.Module], Iterable[WeightLike]] = quantized_weights,
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
        weights: Lists the quantized weights of the model, for example
            `fogzo.integrations.torchao.quantized_weights`.
        **options: Its options, such as ``noise_share``: an accelerator does not know how long a run
            is, so there is no ``kappa`` and ``start`` here, but
            ``noise_share=fogzo.linear_noise_share(total_steps=1000, kappa=0.01, start=0.5)``.

    Returns:
        The estimator.

    Raises:
        ValueError: If the accelerator's backward is refined already, trains with DeepSpeed or
            Megatron-LM, which keep the gradients to themselves, if the two come in the other order,
            or the estimator is no class or does not take the options.
    """
    if not (hasattr(accelerator, "sync_gradients") and isinstance(model, nn.Module)):
        raise ValueError(
            "expected an accelerate.Accelerator and then a model, got "
            f"{type(accelerator).__name__} and {type(model).__name__}: refine(accelerator, model)"
        )
    _check_schedule(options)
    check_options("refine(accelerator, model, ", estimator, options, ("estimator", "weights"))
    check_weights("refine(accelerator, model, ", weights)
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
    made = estimator(weights(accelerator.unwrap_model(model)), **options)
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


def _check_schedule(options: dict[str, Any]) -> None:
    """Raise a `ValueError` if noise is to grow until the end of a run, unknown here."""
    given = [f"{name}={options[name]!r:.80}" for name in ("kappa", "start") if name in options]
    if given:
        raise ValueError(
            f"an accelerator does not know how long a run is, of which {' and '.join(given)} "
            "speak: refine(accelerator, model, noise_share=fogzo.linear_noise_share("
            f"total_steps=10_000, {', '.join(given)})), with the optimizer steps of the run"
        )


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
