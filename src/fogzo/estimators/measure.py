"""Measuring: the loss along every probe, one by one or many at once."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fogzo.collectives import compute_device, local, mean_over_ranks, shard_like, sum_over_shards
from fogzo.directions import Directions, Probe
from fogzo.probes import Closure, Probes, as_loss, check_same_loss
from fogzo.stacked_probes import AtOnce, chunk_size, evaluate_stacked
from fogzo.weights import QuantizedWeight


class Measurement(NamedTuple):
    """Losses in the order ``L1+, L1-, L2+, ...``, averaged over ranks, and what was counted."""

    losses: list[float]
    flip_rate: float | None = None


def measure(
    probes: Probes,
    directions: Directions,
    plan: Sequence[Probe],
    closure: Closure,
    *,
    at_once: AtOnce = 1,
    track_flips: bool = False,
    expected_loss: Tensor | float | None = None,
    check_dependence: bool = False,
) -> Measurement:
    """The losses at ``w + v`` and ``w - v`` for every probe of a plan.

    Args:
        probes: Lends the weights.
        directions: Of this step.
        plan: One probe or more.
        closure: Recomputes the loss.
        at_once: How many probes are evaluated together.
        track_flips: Count the codes that differ between the first two losses.
        expected_loss: What the closure must return at the unperturbed weights, if it is to be
            checked.
        check_dependence: If all losses are the same, check that the closure uses these weights.

    Raises:
        ValueError: If the closure fails a check.
    """
    weights = directions.weights
    with probes.loan(weights):
        if expected_loss is not None:
            check_same_loss(probes.evaluate(closure), as_loss(expected_loss))
        size = chunk_size(at_once, weights)
        if size == 1:
            losses, flip_rate = _one_by_one(probes, directions, plan, closure, track_flips)
        else:
            losses, flip_rate = _together(probes, directions, plan, closure, track_flips, size)
        # The step's one wait for the device.
        means = mean_over_ranks(losses, compute_device(weights[0].param))
        same = math.isfinite(means[0]) and all(mean == means[0] for mean in means)
        if same and check_dependence:
            _check_dependence(probes, directions, closure, losses[0])
    return Measurement(means, flip_rate)


def _one_by_one(
    probes: Probes,
    directions: Directions,
    plan: Sequence[Probe],
    closure: Closure,
    track_flips: bool,
) -> tuple[list[Tensor], float | None]:
    """Losses at the weights themselves, moved in place."""
    losses: list[Tensor] = []
    flip_rate = None
    for probe in plan:
        if losses:
            probes.reset_()
        directions.add_offsets_(probe)
        losses.append(probes.evaluate(closure))
        count_flips = track_flips and flip_rate is None
        codes = _codes(directions.weights) if count_flips else []
        probes.mirror_()
        losses.append(probes.evaluate(closure))
        if count_flips:
            flip_rate = _flip_rate(directions.weights, codes)
    return losses, flip_rate


def _together(
    probes: Probes,
    directions: Directions,
    plan: Sequence[Probe],
    closure: Closure,
    track_flips: bool,
    size: int,
) -> tuple[list[Tensor], float | None]:
    """The same losses at moved copies of the weights, ``size`` probes at a time."""
    weights = directions.weights
    losses: list[Tensor] = []
    flip_rate = None
    for start in range(0, len(plan), size):
        stacks = directions.stacks(plan[start : start + size])
        plus = evaluate_stacked(probes, closure, weights, stacks)
        for weight, stack in zip(weights, stacks, strict=True):
            stack.lerp_(weight.param, 2.0)  # as Probes.mirror_ does
        minus = evaluate_stacked(probes, closure, weights, stacks)
        losses += torch.stack([plus, minus], 1).flatten().unbind()
    if track_flips:  # codes are read off the weights themselves
        directions.add_offsets_(plan[0])
        codes = _codes(weights)
        probes.mirror_()
        flip_rate = _flip_rate(weights, codes)
        probes.reset_()
    return losses, flip_rate


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


def _flip_rate(weights: Sequence[QuantizedWeight], codes: Sequence[Tensor]) -> float:
    """The fraction of codes that have changed."""
    params = [weight.param for weight in weights]
    flips = [(a != b).sum() for a, b in zip(codes, _codes(weights), strict=True)]
    return float(sum(sum_over_shards(flips, params))) / sum(param.numel() for param in params)
