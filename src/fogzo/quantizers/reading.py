"""Whether a tensor's value can be read at no cost, and whether a gradient is wanted."""

import torch
from torch import Tensor, nn


def can_be_read(*tensors: Tensor) -> bool:
    """Whether values are to be had without waiting for a device or leaving a graph."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or torch._C._len_torch_dispatch_stack() != 0  # somebody records operations (make_fx)
    ):
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator would cost more than it asks
        if not (tensor.is_cpu and has_a_value(tensor)):
            return False
    return True


def has_a_value(tensor: Tensor) -> bool:
    """Whether one value is there to be read, on whatever device.

    `torch.func.vmap` has one for each sample, a tensor without storage (meta, FakeTensor) none.
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def needs_grad(*tensors: Tensor) -> bool:
    """Whether the backward pass may ask for the gradient of one of these tensors."""
    if not torch.is_grad_enabled():
        return False
    if any(tensor.requires_grad for tensor in tensors):
        return True
    # What torch.func.vmap wraps does not say what a torch.func.grad around it asks for.
    return torch._C._functorch.maybe_current_level() is not None
