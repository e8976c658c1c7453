"""Many probes at once: the closure under `torch.vmap`, the model's weights lent as stacks.

A small network spends more time between operations than in them, which k forwards in one spend
once. The closure stays as it is: while it runs, the modules hold one weight a probe in the
parameter's place, and all that it computes from them is one value a probe.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fogzo.collectives import is_sharded
from fogzo.layers.weights import QuantizedWeight
from fogzo.probing.loan import Closure, Probes
from fogzo.probing.noise import working_dtype

AtOnce = int | Literal["auto"]

# Of copies of the weights and their noise. A CPU gains nothing from more than its caches hold.
_MAX_BYTES = {"cpu": 4 * 2**20}
_MAX_BYTES_ELSEWHERE = 256 * 2**20
_REMEDY = "probes_at_once=1 evaluates the probes one by one, without torch.vmap"


def check_at_once(at_once: object, weights: Sequence[QuantizedWeight], probes: Probes) -> None:
    """Raise a `ValueError` unless so many probes of these weights can be evaluated together."""
    if at_once != "auto" and (
        isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1
    ):
        raise ValueError(
            f'probes_at_once must be an integer of 1 or more or "auto", got {at_once!r}: '
            "probes_at_once=1 evaluates them one by one"
        )
    if at_once == 1:
        return
    held = {id(p) for model in probes.models for p in model.parameters()}
    for weight in weights:
        if is_sharded(weight.param):
            raise ValueError(
                f"{weight.name!r} is sharded, and no rank can stack weights that it does not "
                "hold: use probes_at_once=1"
            )
        if id(weight.param) not in held:
            raise ValueError(
                f"probes_at_once={at_once!r} lends {weight.name!r} to the modules that hold it, "
                "and no known model does: give the estimator model=model, or probes_at_once=1"
            )


def chunk_size(at_once: AtOnce, weights: Sequence[QuantizedWeight]) -> int:
    """How many directions to take together; ``"auto"`` bounds the memory of the stacks."""
    if at_once != "auto":
        return at_once
    sizes = [
        w.param.numel() * (w.param.itemsize + working_dtype(w.param).itemsize) for w in weights
    ]
    limit = _MAX_BYTES.get(weights[0].param.device.type, _MAX_BYTES_ELSEWHERE)
    return max(1, limit // sum(sizes))


def evaluate_stacked(
    probes: Probes,
    closure: Closure,
    weights: Sequence[QuantizedWeight],
    stacks: Sequence[Tensor],
) -> Tensor:
    """The closure's losses, one a row of the stacks.

    Args:
        probes: On loan.
        closure: Sees each row in place of the weights.
        weights: What the stacks replace.
        stacks: For each weight a tensor of shape (rows, *weight.shape).

    Raises:
        ValueError: If the closure returns anything but one number or does what `torch.vmap`
            cannot follow.
    """
    stack_of = {id(weight.param): stack for weight, stack in zip(weights, stacks, strict=True)}
    lent: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in (module for model in probes.models for module in model.modules()):
        for name, param in module._parameters.items():
            if id(param) in stack_of:
                lent.append((module._parameters, name, stack_of[id(param)]))
        if isinstance(module, nn.modules.batchnorm._NormBase):
            # They take each batch's statistics in, in place, so each probe needs its own.
            for name in ("running_mean", "running_var"):
                if (buffer := module._buffers[name]) is not None:
                    copies = buffer.expand(len(stacks[0]), *buffer.shape).clone()
                    lent.append((module._buffers, name, copies))

    def loss(*rows: Tensor) -> Tensor:
        with _lent([(held, name, row) for (held, name, _), row in zip(lent, rows, strict=True)]):
            return probes.evaluate(closure)

    try:
        return torch.vmap(loss, randomness="same")(*(stack for *_, stack in lent))
    except RuntimeError as error:
        if not any(word in str(error) for word in ("vmap", "functorch", "atching rule")):
            error.add_note(f"fogzo: {_REMEDY}, if the closure is not the cause")
            raise
        raise ValueError(
            "torch.vmap, which evaluates many probes at once, cannot follow the closure. Usual "
            "causes: a number taken out of a tensor (loss.item(), an if on its value), a buffer "
            "updated in place, an autograd function without generate_vmap_rule. "
            f"{_REMEDY}. torch says: {error!s:.300}"
        ) from error


@contextmanager
def _lent(values: Sequence[tuple[dict[str, Any], str, Tensor]]) -> Iterator[None]:
    """Modules hold these values in place of their own."""
    own = [held[name] for held, name, _ in values]
    try:
        for held, name, value in values:
            held[name] = value
        yield
    finally:
        for (held, name, _), value in zip(values, own, strict=True):
            held[name] = value
