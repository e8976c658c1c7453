"""Granularity: which values share one step size, as reshapes to (groups, group size) and back."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from fogzo.quantizers.checks import is_int

Granularity = Literal["tensor", "channel", "token"] | int


def check_granularity(granularity: Granularity) -> None:
    """Raise a `ValueError` unless it is one of the words or a positive int."""
    if isinstance(granularity, str) and granularity in ("tensor", "channel", "token"):
        return
    if isinstance(granularity, str) or not is_int(granularity) or granularity < 1:
        raise ValueError(
            'granularity must be "tensor", "channel" (of weights), "token" (of activations) or a '
            f"group size, got {granularity!r}: "
            "for example fogzo.lsq(bits=4, granularity=64)"
        )


def to_rows(weight: Tensor, output_dim: int) -> Tensor:
    """A weight as (outputs, inputs), the kernel positions of a convolution among the inputs."""
    return weight.movedim(output_dim, 0).flatten(1)


def from_rows(rows: Tensor, shape: Sequence[int], output_dim: int) -> Tensor:
    """The inverse of `to_rows` for a weight of that shape."""
    rest = [size for dim, size in enumerate(shape) if dim != output_dim % len(shape)]
    return rows.reshape(rows.shape[0], *rest).movedim(0, output_dim)


def to_groups(rows: Tensor, granularity: Granularity) -> Tensor:
    """Rows as (groups, group size).

    Raises:
        ValueError: If the group size does not divide the number of inputs.
    """
    if granularity == "tensor":
        return rows.reshape(1, -1)
    if isinstance(granularity, str):  # channels or tokens
        return rows
    inputs = rows.shape[1]
    if inputs % granularity:
        sizes = range(2, min(granularity, inputs) + 1)
        fitting = [f"granularity={size} or " for size in sizes if inputs % size == 0][-1:]
        raise ValueError(
            f"a group size of {granularity} does not divide the {inputs} inputs of a layer: "
            f'use {"".join(fitting)}granularity="channel"'
        )
    return rows.reshape(-1, granularity)


def broadcast_step_size(
    step: Tensor, shape: Sequence[int], granularity: Granularity, output_dim: int
) -> Tensor:
    """Step sizes of shape (groups, 1), reshaped to broadcast against a weight of that shape."""
    if granularity == "tensor":
        return step.reshape(())
    if isinstance(granularity, str):
        return step.reshape(
            [-1 if dim == output_dim % len(shape) else 1 for dim in range(len(shape))]
        )
    rows = step.expand(-1, granularity).reshape(shape[output_dim], -1)
    return from_rows(rows, shape, output_dim)
