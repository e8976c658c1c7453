"""Many probes at once: the closure under `torch.vmap`, the model's weights lent as stacks.

A small network spends more time between operations than in them, which k forward passes in one
spend once. The closure stays as it is: while it runs, the modules hold one weight per probe in the
parameter's place, and all that it computes from them is one value per probe.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fogzo.layers.weights import QuantizedWeight
from fogzo.probing.directions import Direction, Directions
from fogzo.probing.lender import Closure, Lender
from fogzo.wording import caveat

# Bound on the copies of the weights and their offsets: a CPU gains nothing from more than its
# caches hold.
_MAX_BYTES = {"cpu": 4 * 2**20}
_MAX_BYTES_ELSEWHERE = 256 * 2**20
# In what torch says of what vmap cannot follow; the last is of tolist().
_NOT_FOLLOWED = ("vmap", "functorch", "atching rule", "have storage")
_REMEDY = 'evaluate="in_place" evaluates the probes one by one, without torch.vmap'


def losses(
    lender: Lender,
    directions: Directions,
    plan: Sequence[Direction],
    closure: Closure,
    two_sided: bool,
) -> list[Tensor]:
    """Losses at moved copies of the weights, as many at a time as the bound on memory allows.

    Raises:
        ValueError: If one-sided probes would drop out other activations than the loss that they
            are compared with.
    """
    if not two_sided and directions.weights[0].param.is_cuda and _drops_out(lender.models):
        raise ValueError(
            "on a GPU torch.vmap draws other dropout masks than the forward pass whose loss "
            'one-sided probes are compared with: evaluate="in_place", or one_sided=False'
            + caveat("Stacked and lean probes")
        )
    found: list[Tensor] = []
    size = chunk_size(directions.weights)
    for start in range(0, len(plan), size):
        stacks = _stacks(directions, plan[start : start + size])
        sides = [_evaluate(lender, closure, directions, stacks)]
        if two_sided:
            for part, stack in zip(directions.parts, stacks, strict=True):
                stack.lerp_(part.param, 2.0)  # as Lender.mirror_ does
            sides.append(_evaluate(lender, closure, directions, stacks))
        found += torch.stack(sides, 1).flatten().unbind()
    return found


def _drops_out(models: Sequence[nn.Module]) -> bool:
    modules = (module for model in models for module in model.modules())
    kind = nn.modules.dropout._DropoutNd
    return any(isinstance(m, kind) and m.training and 0 < m.p < 1 for m in modules)


def chunk_size(weights: Sequence[QuantizedWeight]) -> int:
    """How many directions to take together."""
    params = [weight.param for weight in weights]
    size = sum(p.numel() * (p.itemsize + max(p.itemsize, 4)) for p in params)
    limit = _MAX_BYTES.get(params[0].device.type, _MAX_BYTES_ELSEWHERE)
    return max(1, limit // size)


def _stacks(directions: Directions, plan: Sequence[Direction]) -> list[Tensor]:
    """Copies of every weight, moved along one direction each: (directions, *shape) per weight."""
    stacks = []
    for index, part in enumerate(directions.parts):
        stack = part.param.detach().expand(len(plan), *part.param.shape)
        stack = stack.clone(memory_format=torch.contiguous_format)
        for row, direction in zip(stack.unbind(), plan, strict=True):
            directions.move_(row, index, direction)
        stacks.append(stack)
    return stacks


def _evaluate(
    lender: Lender, closure: Closure, directions: Directions, stacks: Sequence[Tensor]
) -> Tensor:
    """The closure's losses, one per row of the stacks.

    Raises:
        ValueError: If the closure returns anything but one number or does what `torch.vmap`
            cannot follow.
    """
    weights = directions.weights
    stack_of = {id(weight.param): stack for weight, stack in zip(weights, stacks, strict=True)}
    lent: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in (module for model in lender.models for module in model.modules()):
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
        rows_of = [(held, name, row) for (held, name, _), row in zip(lent, rows, strict=True)]

        def of_rows() -> Tensor | float:
            with _lent(rows_of):
                return closure()

        return lender.evaluate(of_rows)

    try:
        return torch.vmap(loss, randomness="same")(*(stack for *_, stack in lent))
    except RuntimeError as error:
        if not any(word in str(error) for word in _NOT_FOLLOWED):
            error.add_note(f"fogzo: {_REMEDY}, if the closure is not the cause")
            raise
        raise ValueError(
            "torch.vmap, which evaluates many probes at once, cannot follow the closure. Usual "
            "causes: backward() in it, a number taken out of a tensor (loss.item(), an if on its "
            "value), a buffer updated in place, an autograd function without generate_vmap_rule. "
            f"{_REMEDY}{caveat('Stacked and lean probes')}. torch says: {error!s:.300}"
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
