"""Measuring: the loss on both sides of every direction."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fogzo.collectives import full, is_sharded, num_ranks
from fogzo.layers.weights import QuantizedWeight
from fogzo.probing import lean, stacked
from fogzo.probing.audit import Audit
from fogzo.probing.directions import Direction, Directions
from fogzo.probing.flips import flip_rate
from fogzo.probing.lender import Closure, Lender, as_loss
from fogzo.wording import caveat, listed

Evaluate = Literal["in_place", "stacked", "lean"]

NOT_FINITE = "a probe loss is not finite"
NO_FLIP = "no weight rounds differently between the probes"
NO_EFFECT = "the probes do not change the loss"

_SAME_NORM = 1e-3  # relative; GPUs of two kinds sum the same gradients to other last digits


@dataclass(frozen=True)
class Measurement:
    """The losses of one step, averaged over ranks.

    Attributes:
        losses: In the order ``L1+, L1-, L2+, ...``, one-sided ``L1+, L2+, ...``.
        slopes: Half the loss's change from one side of each direction to the other.
        base: The loss at the weights themselves, one-sided only.
        second_differences: How far the mean of both sides lies above the loss between them, one per
            direction; none where that is not known, and one-sided.
        loss_error: Rounding error of one loss, in the loss's units.
        dtype: In which the closure computes it.
        failure: Why the losses tell no slopes, if they do not.
    """

    losses: Sequence[float] = ()
    slopes: Sequence[float] = ()
    base: float | None = None
    second_differences: Sequence[float] = ()
    loss_error: float = 0.0
    dtype: torch.dtype = torch.float32
    failure: str | None = None


def check_evaluate(evaluate: object, weights: Sequence[QuantizedWeight], lender: Lender) -> None:
    """Raise a `ValueError` unless probes of these weights can be evaluated so."""
    if evaluate not in get_args(Evaluate):
        raise ValueError(
            f"evaluate must be one of {', '.join(get_args(Evaluate))}, got {evaluate!r:.80}: "
            'evaluate="in_place"'
        )
    if evaluate == "in_place":
        return
    for weight in weights:
        if is_sharded(weight.param):
            raise ValueError(
                f"{weight.name!r} is sharded, and FSDP gathers it before evaluate={evaluate!r} "
                'could move it: evaluate="in_place" copies one shard only'
            )
        if not lender.holds(weight.param):
            raise ValueError(
                f"evaluate={evaluate!r} moves {weight.name!r} in the module that holds it, and no "
                'known model does: give the estimator model=model, or use evaluate="in_place"'
            )


def measure(
    lender: Lender,
    directions: Directions,
    plan: Sequence[Direction],
    closure: Closure,
    *,
    evaluate: Evaluate,
    expected_loss: Tensor | float | None,
    one_sided: bool,
    audit: Audit,
    alike: str | None = None,
) -> Measurement:
    """The losses at ``w + eps v`` and ``w - eps v`` for every direction of a plan.

    Args:
        lender: Lends the weights.
        directions: Of this step.
        plan: One direction or more.
        closure: Recomputes the loss.
        evaluate: How; the losses are the same.
        expected_loss: What the closure must return at the unperturbed weights.
        one_sided: Evaluate ``w + eps v`` only; differences start from the expected loss.
        audit: Decides when to check that the closure returns the expected loss.
        alike: What the directions follow from, besides the weights, as a message names it: it and
            the gradients must be the same on all ranks, which is checked when the closure is.

    Raises:
        ValueError: If the closure fails a check, or ranks would write different gradients.
    """
    losses_of = {"in_place": in_place, "stacked": stacked.losses, "lean": lean.losses}[evaluate]
    known = [] if expected_loss is None else [as_loss(expected_loss, "expected_loss must be")]
    with lender.lend(directions.weights, copy=evaluate != "lean"):
        audited = bool(known) and audit.due
        if audited:
            audit.check(lender, closure, known[0])
        losses = losses_of(lender, directions, plan, closure, not one_sided)
        if alike is not None and audit.due and num_ranks() > 1:
            _check_ranks(lender, directions, alike)  # DDP's group is known by now
        values = lender.mean_over_ranks([*losses, *(loss.to(losses[0]) for loss in known)])
        values, expected = values[: len(losses)], values[len(losses) :]
        base, second_differences = None, []
        if one_sided:
            base, slopes = expected[0], [loss - expected[0] for loss in values]
        else:
            pairs = list(zip(values[::2], values[1::2], strict=True))
            slopes = [(plus - minus) / 2 for plus, minus in pairs]
            second_differences = [(p + m) / 2 - loss for p, m in pairs for loss in expected]
        dtype = _loss_dtype(losses[0], values, directions.weights)
        error = torch.finfo(dtype).eps * max(map(abs, values))
        measured = Measurement(values, slopes, base, second_differences, error, dtype)
        if not all(map(math.isfinite, slopes)):
            return replace(measured, failure=NOT_FINITE)
        if not all(map(math.isfinite, expected)):
            return measured
        if expected and not (one_sided or audited):
            reach = directions.norm + max(map(abs, slopes))
            if audit.suspects(math.fsum(values) / len(values), expected[0], reach):
                lender.reset_()
                audit.check(lender, closure, known[0])
        if any(slopes):
            return measured
        lender.reset_()
        if evaluate != "lean" and not audit.steps:  # lean probes know what they have moved
            _check_dependence(lender, directions, closure, losses[0], measured.loss_error)
        lender.reshard()  # codes are to be those of the shards as they are
        flips = flip_rate(directions, plan[0], one_sided)
        return replace(measured, failure=NO_FLIP if flips == 0 else NO_EFFECT)


def in_place(
    lender: Lender,
    directions: Directions,
    plan: Sequence[Direction],
    closure: Closure,
    two_sided: bool,
) -> list[Tensor]:
    """Losses at the weights themselves, moved one direction after another."""
    losses: list[Tensor] = []
    for direction in plan:
        if losses:
            lender.reset_()
        for index, part in enumerate(directions.parts):
            directions.move_(part.param, index, direction)
        losses.append(lender.evaluate(closure))
        if two_sided:
            lender.mirror_()
            losses.append(lender.evaluate(closure))
    return losses


def _loss_dtype(
    loss: Tensor, values: Sequence[float], weights: Sequence[QuantizedWeight]
) -> torch.dtype:
    """The coarsest precision that these losses show."""
    dtype = loss.dtype if loss.is_floating_point() else torch.float32
    if dtype == torch.float64 and all(w.param.dtype != torch.float64 for w in weights):
        dtype = torch.float32  # .item() and .double() make nothing finer
    # bfloat16 keeps eight bits: these were computed in it and converted afterwards.
    if len(set(values)) > 1 and all((256 * math.frexp(v)[0]).is_integer() for v in values):
        return torch.bfloat16
    return dtype


def _check_ranks(lender: Lender, directions: Directions, alike: str) -> None:
    """Raise a `ValueError`, on all ranks together, unless their directions and gradients agree."""
    names = [weight.name for weight in directions.weights]
    mine, norm = float(zlib.crc32(f"{alike} {names}".encode())), directions.norm
    mean, mean_norm = lender.mean_over_ranks(list(torch.tensor([mine, norm], dtype=torch.float64)))
    if lender.on_any_rank(mean != mine):
        raise ValueError(
            "the ranks would perturb the weights differently, and train apart: this one has "
            f"{alike} and the weights {listed(names)}, and another one has others. Give all ranks "
            "the same options, seed=0, the weights in the same order, and, to resume, the same "
            "state: estimator.load_state_dict(checkpoint['estimator'])" + caveat("DDP")
        )
    if lender.on_any_rank(abs(norm - mean_norm) > _SAME_NORM * mean_norm):
        raise ValueError(
            "the gradients differ between ranks, whose losses are averaged: their norm, in steps, "
            f"is {norm:.4g} here, {mean_norm:.4g} on average. Compute the loss by the module that "
            "DDP returned, ddp = DistributedDataParallel(model); ddp(x) and not model(x) or "
            "ddp.module(x), or average them before. A model that a rank trains by itself needs DDP "
            "and a group of its own, process_group=torch.distributed.new_group([rank])"
            + caveat("DDP")
        )


def _check_dependence(
    lender: Lender, directions: Directions, closure: Closure, loss: Tensor, loss_error: float
) -> None:
    """Every probe gave the same loss: see whether the closure uses these weights at all.

    That can be told only where the gradient says that a larger move would change the loss. It
    does not behind a layer that starts at zero, an adapter's say, or a tiny gate.
    """
    if not directions.guided:
        return
    predicted, same = 0.0, True
    for sign in (-1, 1):  # of two ways out of the range of levels one leads into it
        for part in directions.parts:
            step = full(part.weight.step_size())  # which all ranks gather together
            if part.grad is None or not part.param.numel():
                continue  # a rank may hold no row of a small weight
            size = float(part.param.abs().max() + step.max())
            predicted += size * float(part.grad.abs().sum()) / directions.grad_scale
            part.param.add_(part.grad.sign().to(part.param.dtype), alpha=sign * size)
        same = torch.equal(lender.evaluate(closure).to(loss), loss) and same
        lender.reset_()
    told = torch.tensor(float(same and predicted > 1e3 * loss_error))
    # On all ranks or on none, or one would wait for the others.
    if lender.mean_over_ranks([told]) == [1.0]:
        raise ValueError(
            "the closure's loss does not depend on the quantized weights: it evaluates another "
            "model, or a cached output. List the weights of the model in the closure: "
            "fogzo.quantized_weights(model). A loss whose value stays the same while its gradient "
            "does not, such as exp(x - x.detach()), cannot be measured"
            + caveat("Stopped gradients")
        )
