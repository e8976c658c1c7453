"""Forgetting: an edit of a finished quantized network after which examples fit no better than new.

The direction comes from first-order gradients, the length from the loss itself: the quantized loss
is a staircase, on which a gradient says which way is up and nothing of how far to go. Directions
estimated from forward passes alone are of little use, as docs/forgetting.md shows.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from fogzo.collectives import is_sharded
from fogzo.layers.weights import QuantizedWeight
from fogzo.methods.pull import Weights, as_records, in_float
from fogzo.probing.directions import Directions, Part
from fogzo.probing.lender import Closure, Lender
from fogzo.quantizers.checks import is_number, require_positive
from fogzo.wording import listed

_FIRST = 2.0**-6  # radii: hardly a weight rounds differently
_DOUBLINGS = 16  # beyond 2^9 radii every weight has reached an end of its range
_BISECTIONS = 8


@dataclass(frozen=True)
class ForgetReport:
    """What `forget_` did.

    Attributes:
        reached: Whether the loss to forget is at the target. If not, no weight has changed.
        step: Length of the edit, the root mean square over weights, in perturbation radii (for the
            identity .29 step sizes); 0 if nothing changed.
        forget_before: Quantized loss on what is to be forgotten, before.
        forget_after: The same afterwards.
        keep_before: Mean quantized loss on what is to be kept, before.
        keep_after: The same afterwards.
        probes: Forward passes of the loss to forget that the length took.
        flipped: The share of integer codes that changed; None where a record does not tell them.
    """

    reached: bool
    step: float
    forget_before: float
    forget_after: float
    keep_before: float
    keep_after: float
    probes: int
    flipped: float | None


def forget_(
    weights: Weights,
    forget: Closure,
    keep: Iterable[Closure],
    *,
    target: float,
    damping: float = 0.1,
) -> ForgetReport:
    """Raise the quantized loss on given examples to a target, in one move of the weights.

    Experimental, and no privacy guarantee: who attacks the network still tells the examples from
    new ones better than by chance. Some steps of training on what is kept should follow; without
    them a network without room to spare is damaged.

    The weights move along the first-order gradient of the loss to forget, divided by the squared
    gradients (diagonal Fisher information) of what is kept. How far is found by doubling and
    bisection on the quantized loss itself, forward passes without gradients: the shortest step
    found that reaches the target. The idea is that of Xiao et al. (arXiv 2508.14013), who estimate
    directions from forward passes.

    The model is used in the mode that it is in, ``model.eval()`` for one that is finished. Buffers,
    gradients, modes and random streams are given back, and so are the weights, bit for bit, if the
    target is not reached or a closure raises.

    Args:
        weights: A quantized model, or what `fogzo.quantized_weights` lists.
        forget: Returns the mean loss on the examples to forget.
        keep: Closures that return the mean loss on a batch each of what is to be kept. The smaller
            the batches, the better the Fisher information.
        target: The loss to reach, in the loss's units: that of examples that the network has never
            seen, drawn as those to forget were.
        damping: Added to the Fisher information of every weight, in units of its mean.

    Returns:
        Lengths, losses and counts. If the loss is above the target already, nothing happens.

    Raises:
        ValueError: If an argument is not as described, a loss or a gradient is not finite, or the
            loss to forget does not depend on the weights.

    Warns:
        RuntimeWarning: If no step reaches the target.
    """
    closures = _check_keep(keep)
    if not callable(forget):
        raise ValueError(
            f"forget must be a function that returns a loss, got {type(forget).__name__}: "
            "forget=lambda: loss_fn(model(x), y)"
        )
    if not (is_number(target) and math.isfinite(target)):
        raise ValueError(
            f"target must be a finite number, got {target!r:.80}: the mean loss of examples that "
            "the network has not seen, target=loss_fn(model(x_new), y_new).item()"
        )
    require_positive("damping", damping, "damping=0.1")
    records = _editable(as_records(weights))
    with torch.no_grad():
        edit = _Edit(records, forget, closures)
        # Dynamic step sizes follow the weights afterwards, so they do in the probes too.
        lent = [replace(record, hold_step_size=nullcontext) for record in records]
        with edit.lender.lend(lent):
            report = edit.search(float(target), damping)
        if report.step:
            edit.move_(report.step)
    if not report.reached:
        warnings.warn(
            f"no step along the gradient raises the loss to forget to the target of {target:g} "
            f"(it is {report.forget_before:g}), and the weights are as they were: take the target "
            "from examples that the network has not seen, or train a few steps and try again",
            RuntimeWarning,
            stacklevel=2,
        )
    return report


class _Edit:
    """One move of all weights along a direction, ``w + length * eps * u`` with u of rms 1."""

    def __init__(
        self, records: Sequence[QuantizedWeight], forget: Closure, keep: Sequence[Closure]
    ) -> None:
        self.records, self.forget, self.keep = records, forget, keep
        self.lender = Lender(records)
        self.parts: list[Part] = Directions(records, 0, guided=False).parts
        self._direction: list[Tensor] = []

    def search(self, target: float, damping: float) -> ForgetReport:
        """Find the length, with the weights lent; they are anywhere afterwards."""
        forget_before, keep_before = self._loss([self.forget]), self._loss(self.keep)
        for name, loss in (("forget", forget_before), ("keep", keep_before)):
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of {name} is {loss} at the weights as they are: it must be finite, "
                    f"or nothing can be measured; check the data and {name}=lambda: ..."
                )
        codes = self._codes()
        nothing = ForgetReport(
            reached=forget_before >= target,
            step=0.0,
            forget_before=forget_before,
            forget_after=forget_before,
            keep_before=keep_before,
            keep_after=keep_before,
            probes=0,
            flipped=None if codes is None else 0.0,
        )
        if nothing.reached:
            return nothing
        self._direction = self._directions(damping)
        length, loss, probes = shortest(self._loss_at, target)
        if length is None:
            return replace(nothing, probes=probes)
        self._move_from_start(length)
        after = self._codes()
        return ForgetReport(
            reached=True,
            step=length,
            forget_before=forget_before,
            forget_after=loss,
            keep_before=keep_before,
            keep_after=self._loss(self.keep),
            probes=probes,
            flipped=None if codes is None or after is None else _share(codes, after),
        )

    def move_(self, length: float) -> None:
        """Move the weights, which are where they began."""
        for part, u in zip(self.parts, self._direction, strict=True):
            part.add_(part.param, [(u, part.eps, length)])

    def _move_from_start(self, length: float) -> None:
        self.lender.reset_()
        self.move_(length)

    def _loss_at(self, length: float) -> float:
        self._move_from_start(length)
        return self._loss([self.forget])

    def _loss(self, closures: Sequence[Closure]) -> float:
        losses = [float(self.lender.evaluate(closure)) for closure in closures]
        return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan

    def _directions(self, damping: float) -> list[Tensor]:
        """The gradient to forget over the Fisher information of what is kept, both in radii."""
        guide = self._gradients(self.forget, "forget")
        if not any(bool(g.any()) for g in guide):
            raise ValueError(
                "the loss to forget has no gradient at any quantized weight: they are weights of "
                "another model than the closure's, or all lie where their surrogate's slope is 0 "
                '(surrogate="identity_unmasked" has no mask)'
            )
        fisher = [torch.zeros_like(g) for g in guide]
        for closure in self.keep:
            for total, g in zip(fisher, self._gradients(closure, "keep"), strict=True):
                total.addcmul_(g, g)
        count = sum(int(part.moves.expand(part.param.shape).sum()) for part in self.parts)
        mean = math.fsum(float(f.sum(dtype=torch.float64)) for f in fisher) / count
        if mean > 0:  # otherwise nothing that is kept depends on the weights
            guide = [g / (f / mean + damping) for g, f in zip(guide, fisher, strict=True)]
        norm = math.hypot(*(float(torch.linalg.vector_norm(g.double())) for g in guide))
        return [g * (math.sqrt(count) / norm) for g in guide]

    def _gradients(self, closure: Closure, name: str) -> list[Tensor]:
        """First-order gradients in the basis of rounding, per radius."""
        found = []
        gradients = self.lender.differentiate(closure, self.records)
        for part, g in zip(self.parts, gradients, strict=True):
            if g is None:
                g = torch.zeros_like(part.param)
            if not g.isfinite().all():
                raise ValueError(
                    f"the gradient of {name} at {part.weight.name!r} is not finite: "
                    "torch.autograd.set_detect_anomaly(True) finds where that comes from"
                )
            found.append(part.rotated(g.to(part.dtype)) * part.eps)
        return found

    def _codes(self) -> list[Tensor] | None:
        if any(record.codes is None for record in self.records):
            return None
        return [record.codes() for record in self.records if record.codes is not None]


def shortest(loss_at: Callable[[float], float], target: float) -> tuple[float | None, float, int]:
    """The length at which a loss reaches a target, by doubling and then bisection.

    Returns:
        The length, None if there is none; the loss there; how many losses were asked for.
    """
    low, high, probes = 0.0, _FIRST, 0
    best: tuple[float | None, float] = (None, math.nan)
    while True:
        loss = loss_at(high)
        probes += 1
        if not loss < target:  # NaN too: the loss may end before it does
            break
        if probes == _DOUBLINGS:
            return None, loss, probes
        low, high = high, 2 * high
    if loss < math.inf:
        best = high, loss
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        loss = loss_at(middle)
        probes += 1
        if loss < target:
            low = middle
            continue
        high = middle
        if loss < math.inf:
            best = high, loss
    return *best, probes


def _share(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    return changed / sum(codes.numel() for codes in before)


def _check_keep(keep: object) -> list[Closure]:
    """The closures of what is to be kept.

    Raises:
        ValueError: If there are none, or they are no closures.
    """
    closures = list(keep) if isinstance(keep, Iterable) else []
    if not closures or not all(map(callable, closures)):
        came = "an empty list" if keep == [] else repr(keep)
        raise ValueError(
            f"keep must be a list of functions that return a loss, one per batch of what is to be "
            f"kept, got {came:.80}: keep=[lambda x=x, y=y: loss_fn(model(x), y) for x, y in loader]"
        )
    return closures


def _editable(records: Sequence[QuantizedWeight]) -> list[QuantizedWeight]:
    """The records that may move.

    Raises:
        ValueError: If there are none, some are in float for now, or other ranks hold parts of them
            or edit them too.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several or any(is_sharded(record.param) for record in records):
        raise ValueError(
            "forget_ edits the weights of one process, and ranks that each edit theirs drift "
            "apart: load the checkpoint in a process of its own, edit it there and save it"
        )
    trained = [record for record in records if record.param.requires_grad]
    if not trained:
        raise ValueError(
            "no quantized weight requires a gradient, they are all frozen: "
            "model.requires_grad_(True)"
        )
    floating = in_float(trained)
    left = [record.name for record in trained if id(record.param) in floating]
    if left:
        raise ValueError(
            f"{listed(left)} are still in float, and forget_ edits a finished quantized network: "
            "call switch.advance_() of fogzo.methods.quantize_from after each optimizer step, to "
            "the end of the run"
        )
    return trained
