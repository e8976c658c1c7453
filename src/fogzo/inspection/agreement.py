"""The agreement of each layer: does its gradient predict how the quantized loss changes?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fogzo.estimators.fallbacks import looks_scaled, nothing_measured, nothing_to_follow
from fogzo.estimators.family import FogzoEstimator
from fogzo.estimators.refined import weights_to_refine
from fogzo.estimators.schedules import noise_share_from_kappa
from fogzo.layers.weights import QuantizedWeight
from fogzo.probing.audit import Audit, rounding
from fogzo.probing.directions import Directions, mix_seed
from fogzo.probing.lender import Closure, Lender
from fogzo.probing.measure import measure
from fogzo.wording import caveat

_SEED = 0
# Of a loss computed twice: far above rounding, far below what another batch makes of it.
_SAME = 1e-4


@torch.no_grad()
def agreements(
    weights: Sequence[QuantizedWeight], closure: Closure, num_samples: int
) -> dict[str, tuple[float, float]]:
    """Agreement and standard error of each weight by name, where anything was measured.

    Each weight is moved alone, along its gradient and ``num_samples`` times as much noise (in
    power), so that the samples do not all cross the same thresholds: ``2 num_samples`` forward
    passes per layer, and two more.

    Args:
        weights: All of a model, with gradients.
        closure: Recomputes the loss that backward differentiated.
        num_samples: Directions per layer.

    Raises:
        ValueError: If there are no gradients, they have been refined or scaled, or the closure is
            not the loss, or another one each time.
    """
    if all(weight.param.grad is None for weight in weights):
        raise ValueError(
            "the agreement compares the loss with gradients, and there are none. Call it between "
            "backward and zero_grad: loss.backward(); fogzo.inspect(model, closure=lambda: "
            "loss_fn(model(x), y))"
        )
    lender = Lender(weights)
    used = weights_to_refine(weights, lender.models, needs_gradient=True)
    between = _loss_at_the_weights(lender, closure)
    audit = Audit(checked=True)  # the closure has just returned this loss twice
    found: dict[str, tuple[float, float]] = {}
    for index, weight in enumerate(used):
        share = noise_share_from_kappa(1.0, weight.param.numel(), num_samples)
        estimator = FogzoEstimator([weight], num_samples=num_samples, agreement="measured")
        directions = Directions([weight], mix_seed(_SEED, index))
        if nothing_to_follow(directions):
            continue
        plan = estimator.plan(share, directions)
        measured = measure(
            lender,
            directions,
            plan,
            closure,
            evaluate="in_place",
            expected_loss=between,
            one_sided=False,
            audit=audit,
        )
        if nothing_measured(directions, measured):
            continue
        refined = estimator.combine(share, directions, plan, measured)
        assert refined.agreement is not None and refined.agreement_error is not None
        found[weight.name] = (refined.agreement, refined.agreement_error)
    # Of one layer by chance, if its agreement is not known well.
    known = len(found) > 1 or all(error < 0.3 for _, error in found.values())
    if found and known and all(looks_scaled(agreement) for agreement, _ in found.values()):
        raise ValueError(
            "the gradients predict a thousand times more than the loss changes by, in every layer. "
            "If a GradScaler has multiplied them: scaler.unscale_(optimizer); "
            "fogzo.inspect(model, closure=...)" + caveat("GradScaler")
        )
    return found


def _loss_at_the_weights(lender: Lender, closure: Closure) -> Tensor:
    """The loss that probes lie about, which tells how much quantized inputs make them scatter.

    Raises:
        ValueError: On all ranks together, if the closure returns another one the second time.
    """
    with lender.lend(()):
        first, second = lender.evaluate(closure), lender.evaluate(closure)
        another = abs(float(first) - float(second)) > rounding(first, second, _SAME)
        another = lender.on_any_rank(another)
    if another:
        raise ValueError(
            f"the closure returned {float(first):.8g} and then {float(second):.8g} for the same "
            "weights, here or on another rank, so its changes say nothing of them. It must compute "
            "one loss, of the batch that backward saw: fogzo.inspect(model, closure=lambda: "
            "loss_fn(model(x), y)), with x and y made outside of it" + caveat("Same batch")
        )
    return first
