"""Memory that every step needs again."""

from collections.abc import Hashable, Sequence

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
        self, key: Hashable, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A contiguous tensor.

        Args:
            key: Its user, who is done with it when asking again.
            shape: Its shape.
            dtype: Its dtype.
            device: Where it is.
        """
        kept = self._kept.get(key)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (shape, dtype, device):
            kept = torch.empty(shape, dtype=dtype, device=device)
            self._keep(key, kept)
        return kept

    def empty_like(self, key: Hashable, like: Tensor) -> Tensor:
        """A tensor of that one's shape, dtype, device and, where it is dense, strides.

        Args:
            key: Its user, who is done with it when asking again.
            like: Its model.
        """
        kept = self._kept.get(key)
        wanted = (like.shape, like.dtype, like.device)
        if kept is None or (kept.shape, kept.dtype, kept.device) != wanted:
            kept = torch.empty_like(like, requires_grad=False)
            self._keep(key, kept)
        return kept

    def _keep(self, key: Hashable, made: Tensor) -> None:
        self._kept.pop(key, None)
        if made.device.type == "cpu":
            self._kept[key] = made
