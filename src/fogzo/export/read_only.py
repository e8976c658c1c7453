"""Tensors that are made anew whenever they are read, so that what is written to one is lost.

PEFT merges adapters by writing into the weight that it reads. It gets tensors that refuse, and
everybody else plain ones, as torch takes no subclass in some places (a parameter, a file, a trace).
"""

import sys
from typing import Any, NoReturn

import torch
from torch import Tensor


class ReadOnly(Tensor):
    """Raises where it would be changed; what is computed from it is a plain tensor."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> "ReadOnly":
        """The same, as others write to weights by way of this."""
        return self

    @data.setter
    def data(self, value: object) -> NoReturn:
        _refuse()

    def __setitem__(self, *args: Any) -> NoReturn:
        _refuse()


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "a packed weight is made from its codes whenever it is read, and what is written to it is "
        "lost: fogzo.export.unpack_(model) makes it a parameter. Adapters of PEFT are merged by "
        "fogzo.integrations.peft.merge_and_unload(model)"
    )


def read_only_for_peft(tensor: Tensor, frames: int) -> Tensor:
    """The tensor, as one that refuses writes if PEFT has asked for it.

    Args:
        tensor: Made to be read.
        frames: How many calls ago it was asked for.
    """
    asking = sys._getframe(frames + 1).f_globals.get("__name__", "")
    return tensor.as_subclass(ReadOnly) if asking.startswith("peft.") else tensor


_KEEP_VALUES = {"requires_grad_", "share_memory_", "detach_"}
_OPERATORS = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__"}
_METHODS = {name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_")}
for _name in (_METHODS - _KEEP_VALUES) | _OPERATORS:
    setattr(ReadOnly, _name, _refuse)
