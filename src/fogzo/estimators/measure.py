"""Measuring: the loss along every probe, one by one or many at once."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fogzo.collectives import compute_device, local, mean_over_ranks, shard_like, sum_over_shards
from fogzo.directions import Directions, Probe
from fogzo.lean_probes import moved_in_forwards
from fogzo.probes import Closure, Probes, as_loss, check_same_loss
from fogzo.stacked_probes import AtOnce, chunk_size, evaluate_stacked
from fogzo.weights import QuantizedWeight


class Measurement(NamedTuple):
    """What was measured, averaged over ranks.

    Attributes:
        losses: In the order ``L1+, L1-, L2+, ...``, one-sided ``L1+, L2+, ...``.
        base: The loss at the weights themselves, one-sided only.
        flip_rate: Share of codes that differ between the first two of these losses.
    """

    losses: list[float]
    base: float | None = None
    flip_rate: float | None = None

    @property
    def slopes(self) -> list[float]:
        """Half the loss's change from one side of each probe to the other."""
        if self.base is not None:
            return [loss - self.base for loss in self.losses]
        pairs = zip(self.losses[::2], self.losses[1::2], strict=True)
        return [(plus - minus) / 2 for plus, minus in pairs]


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
    base_loss: Tensor | float | None = None,
    check_dependence: bool = False,
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
        expected_loss: What the closure must return at the unperturbed weights, if it is to be
            checked.
        base_loss: The loss at the unperturbed weights: only ``w + v`` is evaluated then.
        check_dependence: If all losses are the same, check that the closure uses these weights.

    Raises:
        ValueError: If the closure fails a check.
    """
    weights, two_sided = directions.weights, base_loss is None
    with probes.loan(weights, copy=not lean):
        if expected_loss is not None:
            check_same_loss(probes.evaluate(closure), as_loss(expected_loss))
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
        base = [] if base_loss is None else [as_loss(base_loss).to(losses[0])]
        # The step's one wait for the device.
        means = mean_over_ranks([*losses, *base], compute_device(weights[0].param))
        same = math.isfinite(means[0]) and all(mean == means[0] for mean in means)
        if same and check_dependence and not lean:  # lean probes know what they have moved
            _check_dependence(probes, directions, closure, losses[0])
    count = len(losses)
    return Measurement(means[:count], None if two_sided else means[count], flip_rate)


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
    probes: Probes, directions: Directions, closure: Closure, loss: Tensor
) -> None:
    """Every probe gave the same loss: see whether the closure uses these weights at all."""
    for weight, u in zip(directions.weights, directions.noise(0), strict=True):
        param = local(weight.param)
        if param.numel():  # a rank may hold no row of a small weight
            param.add_(u * param.abs().max())
    if torch.equal(probes.evaluate(closure).to(loss), loss):
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
