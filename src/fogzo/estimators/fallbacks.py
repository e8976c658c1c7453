"""Reasons for a step to keep its first-order gradient, and an estimator's warnings."""

import logging
import math
from collections.abc import Sequence

import torch

from fogzo.estimators.schedules import kappa_from_noise_share, noise_share_from_kappa
from fogzo.layers.weights import QuantizedWeight
from fogzo.probing.directions import Directions
from fogzo.probing.measure import NO_EFFECT, NO_FLIP, NOT_FINITE, Measurement
from fogzo.wording import caveat, listed

logger = logging.getLogger(__name__)

_LOUD_KAPPA = 100
# Differences of fewer units in the last place than this may be the rounding of the loss.
_RESOLVED = 4
# A GradScaler begins with 2^16 and seldom falls below the inverse of this.
_SCALED = 2**-10

ZERO_GRADIENT = "the first-order gradient is zero"
BROKEN_GRADIENT = "the first-order gradient is not finite"
NO_STEP_SIZE = "the step size of every weight that has a gradient is zero"
_RESOLVES = "resolves"


def nothing_to_follow(directions: Directions) -> str | None:
    """Why there is no first-order gradient to follow, before anything is measured."""
    if not directions.guided or 0 < directions.norm < math.inf:
        return None
    if directions.norm != 0:
        return BROKEN_GRADIENT
    return NO_STEP_SIZE if directions.has_gradient() else ZERO_GRADIENT


def nothing_measured(directions: Directions, measured: Measurement) -> str | None:
    """Why the losses say nothing of the gradient."""
    is_coarse = measured.dtype.itemsize < 4
    if measured.failure is not None and not (is_coarse and measured.failure == NO_EFFECT):
        return measured.failure
    gap = 2 * max(map(abs, measured.slopes))
    predicted = 2 * directions.norm if directions.guided else math.inf
    if gap <= _RESOLVED * measured.loss_error or predicted <= measured.loss_error:
        return f"the probes change the loss by less than {_name(measured.dtype)} {_RESOLVES}"
    return None


def looks_scaled(agreement: float) -> bool:
    """Whether the gradient predicts so much more than was measured that a GradScaler is in it."""
    return 0 < abs(agreement) <= _SCALED


def warn_if_noise_dominates(noise_share: float, num_weights: int, num_samples: int) -> None:
    """A share that suits a small network drowns the gradient of a large one."""
    kappa = kappa_from_noise_share(noise_share, num_weights, num_samples)
    if kappa > _LOUD_KAPPA:
        logger.warning(
            "noise_share=%g on %d weights means %.0f times more noise than signal (kappa); "
            "kappa=1 is noise_share=%.2g",
            noise_share,
            num_weights,
            kappa,
            noise_share_from_kappa(1.0, num_weights, num_samples),
        )


def in_16_bits(weights: Sequence[QuantizedWeight]) -> tuple[str, str] | None:
    """The warning that latent weights in half precision call for, as (kind, text)."""
    names = [weight.name for weight in weights if weight.param.dtype.itemsize < 4]
    if not names:
        return None
    text = (
        f"the latent weights {listed(names)} are kept in 16 bits, where most of a probe, and of "
        "an update, rounds away: keep them in float32, model.float() or "
        "from_pretrained(name, dtype=torch.float32), and compute in 16 bits, under torch.autocast, "
        'with bf16=True in transformers or precision="bf16-mixed" in Lightning'
        + caveat("Precision of the weights")
    )
    return "16 bits", text


def changed_since_backward() -> tuple[str, str]:
    """The warning that gradients of recorded losses call for which are not theirs any more."""
    text = (
        "something has changed the gradients since backward() by more than one common factor "
        "(clipped layer by layer or by value, decayed, given noise), so the measured slope is "
        "compared with the gradient of another loss, and the step undoes such a clipping: do it "
        "afterwards, loss.backward(); estimator.refine_grads_(); clip_grad_value_(...)"
    )
    return "changed", text + caveat("Clipping")


def caution(
    fallback: str | None,
    measured: Measurement,
    agreement: float | None,
    error: float | None,
    grad_scale: float,
    first: bool,
) -> tuple[str, str] | None:
    """The warning that a step calls for, given once per run, as (kind, text).

    Args:
        fallback: Why the gradient was kept, if it was.
        measured: The step's losses.
        agreement: As measured, if it was.
        error: Its standard error.
        grad_scale: As the user gave it.
        first: Whether it is the first step that was measured.
    """
    is_coarse = bool(measured.losses) and measured.dtype.itemsize < 4
    if fallback is not None:
        text = _advice(fallback)
        kind = "half" if fallback.endswith(_RESOLVES) and is_coarse else fallback
        return (kind, text) if text else None
    if is_coarse:
        text = (
            f"the closure's loss has the precision of {_name(measured.dtype)}, too coarse for the "
            "small differences that are measured: compute it in float32, "
            f"cross_entropy(logits.float(), y), and return it so{caveat('Precision of the loss')}"
        )
        return "half", text
    if agreement is None or error is None:
        return None
    text = _doubt(agreement, error, grad_scale, first)
    return ("agreement", text) if text else None


def _advice(fallback: str) -> str | None:
    """The warning for a reason to fall back; None where another part of the loop warns."""
    remedy = {
        NO_FLIP: (
            "Weights that lie on their levels (a dequantized checkpoint, a pull to the grid) have "
            "nothing to measure until they move"
        ),
        NO_EFFECT: (
            "Does the closure evaluate the model whose weights these are? Behind an adapter or a "
            "gate that starts at zero it may"
        ),
        NO_STEP_SIZE: (
            "Layers of zeros have no step size: give the quantizer one, "
            "fogzo.fixed(2, step_size=0.05), or leave them out with filter_fn"
        ),
        NOT_FINITE: "Look for an overflow in the closure, or lower the learning rate",
    }.get(fallback)
    if fallback.endswith(_RESOLVES):
        remedy = (
            "Compute the loss in float32, cross_entropy(logits.float(), y), and return it so; if "
            "it is, these weights hardly matter to the loss yet"
        )
    if remedy is None:
        return None
    return (
        f"{fallback}: this step keeps its first-order gradient. {remedy}. Said once; see "
        f"stats.fallback for later steps{caveat('Nothing to measure')}"
    )


def _name(dtype: torch.dtype) -> str:
    """A dtype as users write it, without its module."""
    return str(dtype).removeprefix("torch.")


def _doubt(agreement: float, error: float, grad_scale: float, first: bool) -> str | None:
    """The probable mistake behind an agreement that rounding does not explain.

    Args:
        agreement: As measured.
        error: Its standard error.
        grad_scale: As the user gave it.
        first: Whether it is the run's first.
    """
    if grad_scale == 1 and looks_scaled(agreement) and (first or error < 0.1):
        return (
            f"the loss's slope is {agreement:.1e} of what the gradient predicts. If the gradients "
            "are still multiplied by a GradScaler, call scaler.unscale_(optimizer) first or pass "
            f"grad_scale=scaler.get_scale(){caveat('GradScaler')}"
        )
    if abs(agreement) > 8 * (1 + error):
        return (
            f"the loss's slope is {agreement:.3g} times what the gradient predicts, with a "
            f"standard error of {error:.2g}. Usual causes: dropout that the probes draw anew "
            "(`with estimator.record_rng(): loss = ...` around the first forward pass), a closure "
            "over another batch, a sum against a mean, all of which expected_loss=loss checks, and "
            f"gradients clipped before{caveat('An agreement far from 1')}"
        )
    return None
