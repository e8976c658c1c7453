"""Reading one number out of a tensor, where that is possible and costs nothing."""

import torch
from torch import Tensor, nn


def can_be_read(tensor: Tensor) -> bool:
    """Whether a tensor's value is to be had without waiting for a device or leaving a graph."""
    return (
        not torch.compiler.is_compiling()
        and tensor.is_cpu
        and has_a_value(tensor)
        and torch._C._len_torch_dispatch_stack() == 0  # nobody records operations (make_fx)
    )


def has_a_value(tensor: Tensor) -> bool:
    """Whether one value is there to be read, on whatever device.

    `torch.func.vmap` has one for each sample, a tensor without storage (meta, FakeTensor) none.
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
