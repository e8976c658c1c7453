"""Lean probes: weights move one layer at a time, while that layer computes.

The default keeps a copy of all quantized weights during the probes. Here each layer's weight is
copied, moved, used and put back by hooks around its own forward, so that what is held beside the
model is one layer, and the noise is drawn once more a pair.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fogzo.collectives import is_sharded
from fogzo.layers.weights import QuantizedWeight
from fogzo.probing.directions import Directions, Probe


def check_lean(weights: Sequence[QuantizedWeight], models: Sequence[nn.Module]) -> None:
    """Raise a `ValueError` unless these weights can move while their layers compute."""
    held = {id(p) for model in models for m in model.modules() for p in m._parameters.values()}
    for weight in weights:
        if is_sharded(weight.param):
            raise ValueError(
                f"{weight.name!r} is sharded, and FSDP gathers it before lean probes could move "
                "it; its copy is one shard anyway: leave lean=True out"
            )
        if id(weight.param) not in held:
            raise ValueError(
                f"lean probes move {weight.name!r} in the forward of the module that holds it, and "
                "no known model does: give the estimator model=model, or leave lean=True out"
            )


@contextmanager
def moved_in_forwards(
    models: Sequence[nn.Module], directions: Directions, probe: Probe, mirrored: bool
) -> Iterator[None]:
    """While it lasts, every layer computes with its weight at ``w + v``, mirrored at ``w - v``.

    Outside of its layer's forward a weight is as it was; what else reads it sees it unmoved.

    Raises:
        ValueError: If no layer's forward ran.
    """
    index_of = {id(weight.param): index for index, weight in enumerate(directions.weights)}
    # The forwards at work, inner ones last, with what they moved and its copies.
    calls: list[tuple[nn.Module, list[tuple[Tensor, Tensor]]]] = []
    moved = False

    def before(module: nn.Module, arguments: Any) -> None:
        nonlocal moved
        busy = {id(param) for _, pairs in calls for param, _ in pairs}
        own = [p for p in module._parameters.values() if id(p) in index_of and id(p) not in busy]
        calls.append((module, []))
        with torch.no_grad():
            for param in own:
                assert param is not None
                copy = param.detach().clone()
                calls[-1][1].append((param, copy))
                directions.move_(index_of[id(param)], param, probe)
                if mirrored:  # to the bit what Probes.mirror_ does
                    param.lerp_(copy, 2.0)
                moved = True

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
            "another model: leave lean=True out, or list the weights of the model in the closure"
        )


def _put_back(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for param, copy in pairs:
            param.copy_(copy)
