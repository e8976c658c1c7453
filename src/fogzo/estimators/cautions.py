"""What an estimator says of settings that are allowed and seldom meant."""

import logging
import warnings

from fogzo.schedules import kappa_from_noise_share, noise_share_from_kappa

logger = logging.getLogger(__name__)

_LOUD_KAPPA = 100


def mention_loud_noise(noise_share: float, num_weights: int, num_samples: int) -> None:
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


def warn_if_scaled(agreement: float | None, grad_scale: float) -> None:
    """A tiny first agreement is what a GradScaler's factor in the gradients looks like."""
    if grad_scale != 1 or not agreement or abs(agreement) > 2**-10:
        return
    warnings.warn(
        f"the loss's slope is {agreement:.1e} of what the gradient predicts. If the gradients "
        "are still multiplied by a GradScaler, call scaler.unscale_(optimizer) first or pass "
        "grad_scale=scaler.get_scale()",
        RuntimeWarning,
        stacklevel=5,
    )
