"""Modules of fused experts whose own forward sees quantized weights."""

from functools import cache
from typing import Any, cast

import torch
from torch import nn

from fogzo.layers.experts import SUFFIX, ExpertMatrices
from fogzo.layers.quantized_input import plain_class_of
from fogzo.layers.quantized_layer import QuantizedLayer


class QuantizedExperts(nn.Module):
    """Mixed into the class of a module whose `ExpertMatrices` are quantized.

    These are its children, beside the parameters, so that every parameter keeps its name.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, on quantized weights."""
        tracing = torch.compiler.is_dynamo_compiling()
        # By a call, as hooks (of accelerate's offloading) may have to fetch step sizes.
        weights = {
            name: child.weight_of_forward(tracing) if tracing else child()
            for name, child in self._matrices()
        }
        if tracing:
            # Only the trace sees these attributes; see QuantizedLayer.forward.
            self.__dict__.update(weights)
            try:
                return super().forward(*args, **kwargs)
            finally:
                for name in weights:
                    del self.__dict__[name]
        cls: Any = type(self)
        view = object.__new__(_view_class(cls, tuple(weights)))
        object.__setattr__(view, "__dict__", self.__dict__)
        object.__setattr__(view, "_quantized_weights", weights)
        return super(QuantizedExperts, view).forward(*args, **kwargs)

    def _matrices(self) -> list[tuple[str, QuantizedLayer]]:
        """The quantized children, by the names of their parameters."""
        return [
            (child.parameter, child)
            for child in self._modules.values()
            if isinstance(child, QuantizedLayer) and isinstance(child, ExpertMatrices)
        ]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Here, as children are shown no names but their own.
        for name, child in self._matrices():
            step = f"{prefix}{name}{SUFFIX}.weight_step"
            child.measure_missing_step_size(state_dict, prefix + name, step)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _replicate_for_data_parallel(self) -> Any:
        raise ValueError(
            f"{type(self).__name__} cannot be replicated by nn.DataParallel: use "
            "torch.nn.parallel.DistributedDataParallel"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_experts, (plain_experts_class(self),), self.__getstate__()


def attach_matrices_(matrices: ExpertMatrices) -> None:
    """Let the module that holds quantized matrices compute with them."""
    experts = matrices.experts
    experts.register_module(matrices.parameter + SUFFIX, matrices)
    if not isinstance(experts, QuantizedExperts):
        experts.__dict__.pop("forward", None)  # its class's own, as `check_quantizable` made sure
        cls: Any = type(experts)
        cast(Any, experts).__class__ = _experts_class(cls)


def detach_matrices_(matrices: ExpertMatrices) -> None:
    """Leave nothing of `attach_matrices_` behind."""
    experts = matrices.experts
    del experts._modules[matrices.parameter + SUFFIX]
    if not any(isinstance(child, ExpertMatrices) for child in experts._modules.values()):
        cast(Any, experts).__class__ = plain_experts_class(experts)


def plain_experts_class(experts: nn.Module) -> Any:
    """The class that a module of experts had."""
    return plain_class_of(type(experts), QuantizedExperts)


@cache
def _experts_class(plain: Any) -> Any:
    members = {"__module__": __name__}
    return type(f"Quantized{plain.__name__}", (QuantizedExperts, plain), members)


def _new_experts(plain: type) -> nn.Module:
    cls = _experts_class(plain)
    return cast(nn.Module, cls.__new__(cls))


@cache
def _view_class(cls: Any, parameters: tuple[str, ...]) -> Any:
    """The class of objects that share a module's state, but for these parameters."""
    members: dict[str, Any] = {"__module__": __name__, "__slots__": ("_quantized_weights",)}
    members |= {name: _quantized(name) for name in parameters}
    return type(cls.__name__, (cls,), members)


def _quantized(name: str) -> property:
    return property(lambda self: self._quantized_weights[name])
