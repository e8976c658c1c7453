"""Measuring: the loss along every probe, one by one or many at once."""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fogzo.collectives import (
    compute_device,
    full,
    local,
    mean_over_ranks,
    shard_like,
    sum_over_shards,
)
from fogzo.layers.weights import QuantizedWeight
from fogzo.probing.audit import Audit
from fogzo.probing.directions import Directions, Probe
from fogzo.probing.lean import moved_in_forwards
from fogzo.probing.loan import Closure, Probes, as_loss
from fogzo.probing.stacked import AtOnce, chunk_size, evaluate_stacked


class Measurement(NamedTuple):
    """What was measured, averaged over ranks.

    Attributes:
        losses: In the order ``L1+, L1-, L2+, ...``, one-sided ``L1+, L2+, ...``.
        base: The loss at the weights themselves, one-sided only.
        flip_rate: Share of codes that differ between the first two of these losses.
        loss_error: Rounding error of one loss, in the loss's units.
        dtype: In which the closure computes it.
        unchanged: Why all losses are the same, if they are.
    """

    losses: list[float]
    base: float | None = None
    flip_rate: float | None = None
    loss_error: float = 0.0
    dtype: torch.dtype = torch.float32
    unchanged: str | None = None

    @property
    def is_finite(self) -> bool:
        """Whether every loss is."""
        return all(map(math.isfinite, (*self.losses, self.base or 0.0)))

    @property
    def slopes(self) -> list[float]:
        """Half the loss's change from one side of each probe to the other."""
        if self.base is not None:
            return [loss - self.base for loss in self.losses]
        pairs = zip(self.losses[::2], self.losses[1::2], strict=True)
        return [(plus - minus) / 2 for plus, minus in pairs]


NO_FLIP = "no weight rounds differently between the probes"
NO_EFFECT = "the probes do not change the loss"


def measure(
    probes: Probes,
    directions: Directions,
    plan: Sequence[Probe],
    closure: Closure,
    *,
    at_once: AtOnce = 1,
    lean: bool = False,
    track_flips: bool = False,
    expected_loss: Tensor | float | None = None,
    one_sided: bool = False,
    audit: Audit,
) -> Measurement:
    """The losses at ``w + v`` and ``w - v`` for every probe of a plan.

    Args:
        probes: Lends the weights.
        directions: Of this step.
        plan: One probe or more.
        closure: Recomputes the loss.
        at_once: How many probes are evaluated together.
        lean: Move weights one layer at a time instead of copying all.
        track_flips: Count the codes that differ between the first two losses.
        expected_loss: What the closure must return at the unperturbed weights.
        one_sided: Evaluate ``w + v`` only; differences start from the expected loss.
        audit: Whether it does is asked by this.

    Raises:
        ValueError: If the closure fails a check.
    """
    weights, two_sided = directions.weights, not one_sided
    with probes.loan(weights, copy=not lean):
        audited = expected_loss is not None and audit.due
        if audited:
            audit.check(probes, closure, cast(Tensor, expected_loss), weights)
        size = chunk_size(at_once, weights)
        if lean:
            losses = _layer_by_layer(probes, directions, plan, closure, two_sided)
        elif size == 1:
            losses = _one_by_one(probes, directions, plan, closure, two_sided)
        else:
            losses = _together(probes, directions, plan, closure, two_sided, size)
        flip_rate = None
        if track_flips:
            probes.reset_()
            probes.reshard()  # codes are to be those of the shards as they are then
            flip_rate = _flip_rate(directions, plan[0], two_sided)
        known = [] if expected_loss is None else [as_loss(expected_loss, _EXPECTED).to(losses[0])]
        # The step's one wait for the device.
        means = mean_over_ranks([*losses, *known], compute_device(weights[0].param))
        count = len(losses)
        means, expected = means[:count], means[count:]
        dtype = _loss_dtype(losses[0], means, weights)
        loss_error = torch.finfo(dtype).eps * max(map(abs, means))
        measured = Measurement(
            means, expected[0] if one_sided else None, flip_rate, loss_error, dtype
        )
        if not (measured.is_finite and all(map(math.isfinite, expected))):
            return measured
        if two_sided and expected and not audited:
            reach = float(directions.norm) + max(map(abs, measured.slopes))
            if audit.suspects(math.fsum(means) / count, expected[0], reach):
                probes.reset_()
                audit.check(probes, closure, cast(Tensor, expected_loss), weights)
        if any(measured.slopes):
            return measured
        probes.reset_()
        if not lean and not audit.passed:  # lean probes know what they have moved
            _check_dependence(probes, directions, closure, losses[0], loss_error)
        return measured._replace(unchanged=_why_unchanged(probes, directions, plan[0], two_sided))


_EXPECTED = "expected_loss must be"


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


def _why_unchanged(probes: Probes, directions: Directions, probe: Probe, two_sided: bool) -> str:
    """Every probe gave the same loss: see whether it was because no code changed."""
    if any(weight.codes is None for weight in directions.weights):
        return NO_EFFECT
    probes.reshard()
    return NO_EFFECT if _flip_rate(directions, probe, two_sided) else NO_FLIP


def _one_by_one(
    probes: Probes,
    directions: Directions,
    plan: Sequence[Probe],
    closure: Closure,
    two_sided: bool,
) -> list[Tensor]:
    """Losses at the weights themselves, moved in place."""
    losses: list[Tensor] = []
    for probe in plan:
        if losses:
            probes.reset_()
        directions.add_offsets_(probe)
        losses.append(probes.evaluate(closure))
        if two_sided:
            probes.mirror_()
            losses.append(probes.evaluate(closure))
    return losses


def _layer_by_layer(
    probes: Probes,
    directions: Directions,
    plan: Sequence[Probe],
    closure: Closure,
    two_sided: bool,
) -> list[Tensor]:
    """The same losses, the weights moved while their layers compute."""
    losses: list[Tensor] = []
    for probe in plan:
        for mirrored in (False, True) if two_sided else (False,):
            with moved_in_forwards(probes.models, directions, probe, mirrored):
                losses.append(probes.evaluate(closure))
    return losses


def _together(
    probes: Probes,
    directions: Directions,
    plan: Sequence[Probe],
    closure: Closure,
    two_sided: bool,
    size: int,
) -> list[Tensor]:
    """The same losses at moved copies of the weights, ``size`` probes at a time."""
    weights = directions.weights
    losses: list[Tensor] = []
    for start in range(0, len(plan), size):
        stacks = directions.stacks(plan[start : start + size])
        sides = [evaluate_stacked(probes, closure, weights, stacks)]
        if two_sided:
            for weight, stack in zip(weights, stacks, strict=True):
                stack.lerp_(weight.param, 2.0)  # as Probes.mirror_ does
            sides.append(evaluate_stacked(probes, closure, weights, stacks))
        losses += torch.stack(sides, 1).flatten().unbind()
    return losses


def _check_dependence(
    probes: Probes, directions: Directions, closure: Closure, loss: Tensor, loss_error: float
) -> None:
    """Every probe gave the same loss: see whether the closure uses these weights at all.

    That can be told only where the gradient says that a larger move would change the loss. It
    does not behind a layer that starts at zero, an adapter's say, or a tiny gate.
    """
    if not directions.guided:
        return
    predicted, same = 0.0, True
    for sign in (-1, 1):  # of two ways out of the range of levels one leads into it
        for weight in directions.weights:
            param, grad = local(weight.param), weight.param.grad
            if grad is None or not param.numel():
                continue  # a rank may hold no row of a small weight
            size = float(param.abs().max() + full(weight.step_size()).max())
            predicted += size * float(local(grad).abs().sum()) / directions.grad_scale
            param.add_(local(grad).sign().to(param.dtype), alpha=sign * size)
        same = torch.equal(probes.evaluate(closure).to(loss), loss) and same
        probes.reset_()
    told = torch.tensor(float(same and predicted > 1e3 * loss_error))
    # On all ranks or on none, or one would wait for the others.
    if mean_over_ranks([told], compute_device(directions.weights[0].param)) == [1.0]:
        raise ValueError(
            "the closure's loss does not depend on the quantized weights: it evaluates another "
            "model, or a cached output. List the weights of the model in the closure: "
            "fogzo.quantized_weights(model)"
        )


def _codes(weights: Sequence[QuantizedWeight]) -> list[Tensor]:
    """This rank's part of the integer codes."""
    return [shard_like(weight.codes(), weight.param) for weight in weights if weight.codes]


def _flip_rate(directions: Directions, probe: Probe, two_sided: bool) -> float:
    """The fraction of codes that differ between the two losses of a probe.

    The weights must be unperturbed, and are so again afterwards.
    """
    weights = directions.weights
    flips = []
    for index, weight in enumerate(weights):
        param = local(weight.param)
        saved = param.detach().clone()
        before = [] if two_sided else _codes([weight])
        directions.move_(index, param, probe)
        if two_sided:
            before = _codes([weight])
            param.lerp_(saved, 2.0)  # as Probes.mirror_ does
        flips += [(a != b).sum() for a, b in zip(before, _codes([weight]), strict=True)]
        param.copy_(saved)
    params = [weight.param for weight in weights]
    return float(sum(sum_over_shards(flips, params))) / sum(param.numel() for param in params)
