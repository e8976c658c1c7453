"""Lean probes: weights move one layer at a time, while that layer computes.

The default keeps a copy of all quantized weights during the probes. Here each layer's weight is
copied, moved, used and put back by hooks around its own forward, so that what is held beside the
model is one layer, and the noise is drawn once more per pair of probes.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fogzo.probing.directions import Direction, Directions
from fogzo.probing.lender import Closure, Lender
from fogzo.wording import caveat


def losses(
    lender: Lender,
    directions: Directions,
    plan: Sequence[Direction],
    closure: Closure,
    two_sided: bool,
) -> list[Tensor]:
    """Losses at weights that are moved while their layers compute.

    Raises:
        ValueError: If a part of a model is compiled, or nothing moved.
    """
    _check_hooks_run(lender.models, directions)
    found: list[Tensor] = []
    for direction in plan:
        for mirrored in (False, True) if two_sided else (False,):
            with _moved_while_computing(lender.models, directions, direction, mirrored):
                found.append(lender.evaluate(closure))
    return found


def _check_hooks_run(models: Sequence[nn.Module], directions: Directions) -> None:
    """Raise a `ValueError` if a weight lies in a compiled part, where it would not move."""
    # What is compiled implies that this module is loaded.
    compiled: Any = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
    names = {id(weight.param): weight.name for weight in directions.weights}
    # A closure may run a model eagerly that is known as compiled. If not, nothing moves at all.
    parts = [part for model in models for part in model.modules() if part is not model]
    for part in parts:
        for param in part.parameters() if isinstance(part, compiled) else ():
            if id(param) in names:
                raise ValueError(
                    f"{names[id(param)]!r} is in a compiled part of the model, which runs "
                    'without the hooks that lean probes need: evaluate="in_place"'
                    + caveat("Stacked and lean probes")
                )


@contextmanager
def _moved_while_computing(
    models: Sequence[nn.Module], directions: Directions, direction: Direction, mirrored: bool
) -> Iterator[None]:
    """While it lasts, every layer computes with its weight moved, mirrored to the other side.

    Raises:
        ValueError: If a weight did not move that the loss depends on, or nothing moved.
    """
    index_of = {id(weight.param): index for index, weight in enumerate(directions.weights)}
    # Stack of active forward passes: the module, and what it moved with its copies.
    calls: list[tuple[nn.Module, list[tuple[Tensor, Tensor]]]] = []
    moved: set[int] = set()

    def before(module: nn.Module, arguments: Any) -> None:
        busy = {id(param) for _, pairs in calls for param, _ in pairs}
        own = [p for p in module._parameters.values() if id(p) in index_of and id(p) not in busy]
        calls.append((module, []))
        with torch.no_grad():
            for param in own:
                assert param is not None
                copy = param.detach().clone()
                calls[-1][1].append((param, copy))
                moved.add(index_of[id(param)])
                directions.move_(param, index_of[id(param)], direction)
                if mirrored:  # to the bit what Lender.mirror_ does
                    param.lerp_(copy, 2.0)

    def after(module: nn.Module, *_: Any) -> None:
        # Another hook's exception may have kept `before` from running.
        if calls and calls[-1][0] is module:
            _put_back(calls.pop()[1])

    holders = [
        module
        for model in models
        for module in model.modules()
        if any(id(param) in index_of for param in module._parameters.values())
    ]
    handles = []
    for module in dict.fromkeys(holders):
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while calls:
            _put_back(calls.pop()[1])
    if not moved:
        raise ValueError(
            "no layer with a quantized weight ran its forward, so lean probes moved nothing. A "
            "compiled model runs without the hooks that they need, and a closure may evaluate "
            'another model: use evaluate="in_place", or list the weights of that model'
            + caveat("Stacked and lean probes")
        )
    # What backward gave a gradient was computed with, unless the closure is another loss.
    for index, weight in enumerate(directions.weights):
        if directions.norms[index] > 0 and index not in moved:
            raise ValueError(
                f"{weight.name!r} has a gradient, but its layer did not run as a module, so lean "
                "probes did not move it. Call the layer, layer(x), and not layer.forward(x) or a "
                'function of its weight, or use evaluate="in_place"'
                + caveat("Stacked and lean probes")
            )


def _put_back(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for param, copy in pairs:
            param.copy_(copy)
