"""Whether the closure is the loss that backward() differentiated, asked again as training goes on.

At initialisation all batches have nearly the same loss, so a closure over another batch is only
found out by a tolerance that fits: the same operations on the same numbers give the same loss to
a few units in the last place. Where they cannot, the tolerance is what is seen to move the loss,
unless it moves one way only, as that of a closure that counts its calls.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fogzo.probing.lender import Closure, Lender
from fogzo.wording import caveat

_TIGHT = 1e-5
# bfloat16, another graph of the compiler, statistics that every forward pass moves.
_LOOSE = 5e-3
_ULPS = 8
_ASKED = 6  # times, of which scattered losses go one way once in thousands

_CAUSES = (
    "the closure reads a variable that the loop has rebound to the next batch; dropout, fixed by "
    "`with estimator.record_rng(): loss = ...` around the first forward pass; a sum against a "
    "mean, or a missing division by the accumulation steps"
)


class Audit:
    """Compares the closure with the loss of the backward pass at steps 1, 10, 100, ...

    In between, `suspects` compares for nothing: the mean of a probe's two losses lies next to the
    loss itself, or the step is audited.

    Args:
        checked: Whether the closure was compared already.

    Attributes:
        steps: How many were measured and found right, counted by whoever measures.
    """

    def __init__(self, checked: bool = False) -> None:
        self.steps = 0
        self._checked = checked
        self._room = 1.0

    @property
    def due(self) -> bool:
        """Whether this step's closure is to be evaluated at the weights themselves."""
        if self._checked and not self.steps:
            return False
        return math.log10(self.steps + 1).is_integer()

    def suspects(self, middle: float, expected: float, reach: float) -> bool:
        """Whether the probes lie so far from the expected loss that it is to be audited.

        Args:
            middle: Mean loss of the probes, of both sides.
            expected: The loss that backward() differentiated.
            reach: What the perturbations change the loss by.
        """
        distance = abs(middle - expected)
        allowed = _LOOSE * max(abs(middle), abs(expected)) + 8 * reach
        if not distance > self._room * allowed:
            return False
        # A sharp minimum is no mistake: do not pay for the same answer again.
        self._room = 2 * distance / allowed if allowed > 0 else math.inf
        return True

    def check(self, lender: Lender, closure: Closure, expected: Tensor) -> None:
        """Raise a `ValueError`, on all ranks together, unless the closure returns that loss.

        Args:
            lender: Lends the weights, which are unperturbed.
            closure: The closure to check.
            expected: The loss that was differentiated, a scalar.
        """
        found = lender.evaluate(closure)
        loss, wanted = float(found), float(expected)
        distance = abs(loss - wanted) if math.isfinite(wanted) else math.nan  # within no tolerance
        # A loss that is not finite is a fallback of the step, not a mistake in the closure.
        is_off = math.isfinite(loss) and not distance <= rounding(found, expected)
        if not lender.on_any_rank(is_off):
            return
        # All ranks ask again, as forward passes may communicate.
        room, again = _room(lender, closure, max(abs(loss), abs(wanted), 1e-3))
        losses, differs = [loss], is_off
        for _ in range(_ASKED):
            losses.append(float(lender.evaluate(closure)))
            scatter = 4 * (max(again, *losses) - min(again, *losses))
            drifts = _goes_one_way([wanted, *losses])
            is_off = differs and (drifts or not distance <= room + scatter)
            if not lender.on_any_rank(is_off):
                return
        if not is_off:
            raise ValueError(
                "on another rank the closure does not return expected_loss; its message says more"
            )
        raise ValueError(
            f"the closure returned {loss:.8g} at the unperturbed weights, but expected_loss is "
            f"{wanted:.8g}. It must be the loss that backward() differentiated, at the weights it "
            f"was differentiated at. Usual causes: {getattr(closure, 'causes', _CAUSES)}; "
            f"optimizer.step() called before{caveat('Same batch')}"
        )


def rounding(one: Tensor, other: Tensor, least: float = _TIGHT) -> float:
    """How far two values of one loss may lie apart.

    Args:
        one: A scalar.
        other: A scalar.
        least: Of their size, in a dtype that resolves it.
    """
    size = max(abs(float(one)), abs(float(other)), 1e-3)
    return max(least, _ULPS * max(_eps(one), _eps(other))) * size


def _room(lender: Lender, closure: Closure, size: float) -> tuple[float, float]:
    """How far the closure's loss may lie from backward's although each repeats; and one more."""
    with _watched(lender.models) as seen:
        again = float(lender.evaluate(closure, reset_buffers=False))  # as backward's own pass did
    statistics = nn.modules.batchnorm._NormBase  # which are not read in train mode
    moved = any(not isinstance(module, statistics) for module in lender.modules_moved())
    compiled = not seen and _something_is_compiled()  # such graphs call no hooks
    inexact = moved or compiled or any(dtype.itemsize < 4 for dtype in seen)
    return (_LOOSE if inexact else 0.0) * size, again


def _goes_one_way(losses: list[float]) -> bool:
    """Whether backward's loss, which comes first, and later ones drift, which is no scatter."""
    stays = losses[-1] == losses[1]  # as in 16 bits, where backward's alone may differ
    return not stays and sorted(losses) in (losses, losses[::-1])


@contextmanager
def _watched(models: Sequence[nn.Module]) -> Iterator[set[torch.dtype]]:
    """The dtypes that the modules compute in."""
    seen: set[torch.dtype] = set()

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            seen.add(output.dtype)

    modules = dict.fromkeys(module for model in models for module in model.modules())
    handles = [module.register_forward_hook(after) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _something_is_compiled() -> bool:
    """Whether torch.compile has run here: backward and probes then have graphs of their own."""
    utils: Any = getattr(sys.modules.get("torch._dynamo"), "utils", None)
    return bool(getattr(utils, "counters", {}).get("frames"))


def _eps(loss: Tensor) -> float:
    return torch.finfo(loss.dtype).eps if loss.is_floating_point() else 0.0
