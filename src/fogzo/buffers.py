"""Memory that every step needs again."""

from collections.abc import Hashable

import torch
from torch import Tensor


class Buffers:
    """Uninitialised tensors, on a CPU the same ones in every step.

    On a CPU, memory allocated anew makes the C library hand it back and fetch it again in every
    forward, which costs more than what it is needed for. On an accelerator it is free between its
    uses, when activations need it.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor] = {}

    def empty(
        self,
        key: Hashable,
        like: Tensor,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> Tensor:
        """A tensor of that one's shape and device.

        Args:
            key: Its user, who is done with it when asking again.
            like: Its model.
            dtype: By default the model's.
            memory_format: By default the model's.
        """
        dtype = like.dtype if dtype is None else dtype
        kept = self._kept.get(key)
        if kept is not None and kept.dtype == dtype and kept.shape == like.shape:
            return kept
        made = torch.empty_like(like, dtype=dtype, memory_format=memory_format, requires_grad=False)
        if like.device.type == "cpu":
            self._kept[key] = made
        return made
