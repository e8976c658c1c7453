"""Which weights a step size was measured on, to tell by whether they are others later."""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from fogzo.quantizers.reading import has_a_value

_SAMPLE = 64  # values of a tensor; an edit by way of `.data` counts no version


class Measured(NamedTuple):
    """A weight and its step size as they are at one time.

    Attributes:
        weight: The weight itself; by its identity it would be taken for one that came after it.
        versions: How often both were changed in place.
        samples: Some values of both; None where they cannot be read.
    """

    weight: "weakref.ref[Tensor]"
    versions: tuple[int, int]
    samples: tuple[list[float], list[float]] | None

    @classmethod
    def now(cls, weight: Tensor, step: Tensor) -> "Measured":
        """As they are at present."""
        samples = (_sample(weight), _sample(step)) if _can_be_sampled(weight, step) else None
        return cls(weakref.ref(weight), (weight._version, step._version), samples)

    def is_outdated(self, weight: Tensor, step: Tensor) -> bool:
        """Whether the weight has been changed since, and the step size has not."""
        if weight is not self.weight() or step._version != self.versions[1]:
            return False  # FSDP lends a gathered weight, or the step sizes were set since
        if weight._version != self.versions[0]:
            return True
        before, now = self.samples, Measured.now(weight, step).samples
        if before is None or now is None:
            return False
        return before[0] != now[0] and before[1] == now[1]


def _can_be_sampled(weight: Tensor, step: Tensor) -> bool:
    """Whether values can be read, perhaps by waiting for a device."""
    return (
        has_a_value(weight)
        and has_a_value(step)
        and torch._C._len_torch_dispatch_stack() == 0  # nobody records operations
        and torch._C._functorch.maybe_current_level() is None
        and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _sample(tensor: Tensor) -> list[float]:
    stride = max(1, tensor.numel() // _SAMPLE)
    indices = torch.arange(0, tensor.numel(), stride, device=tensor.device)
    return tensor.detach().take(indices).tolist()
