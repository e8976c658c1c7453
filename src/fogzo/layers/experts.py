"""Fused experts: modules that keep one matrix per expert in a parameter of three dimensions."""

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

# The name of the module that quantizes a parameter is the parameter's with this behind it.
SUFFIX = "_quantized"


class ExpertMatrices(nn.Module):
    """One parameter of fused experts, listed as a layer that can be quantized.

    `fogzo.quantize_` gives it to ``filter_fn``, under the parameter's own name. Its weight stays
    the parameter of the module that computes with it.

    Args:
        experts: The module.
        parameter: The name of its parameter, of shape (experts, outputs, inputs), or (experts,
            inputs, outputs) where ``experts.is_transposed``.
    """

    def __init__(self, experts: nn.Module, parameter: str) -> None:
        super().__init__()
        self._held_by = (experts,)  # in a tuple, as the module is no child of this one
        self.parameter = parameter

    def forward(self) -> Tensor:
        """The weight; once it is quantized, as the experts compute with it."""
        return self.weight

    @property
    def experts(self) -> nn.Module:
        """The module that holds the parameter."""
        return self._held_by[0]

    @property
    def transposed(self) -> bool:
        """Whether inputs come before outputs."""
        return bool(self.experts.is_transposed)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, of three dimensions."""
        found = self.experts._parameters.get(self.parameter)
        if found is None:
            raise ValueError(
                f"{self.parameter!r} of {type(self.experts).__name__} is no parameter any longer, "
                "as something computes it (LoRA of PEFT's target_parameters, a parametrization): "
                "leave the experts in float with filter_fn, or do without it"
            )
        return found


def fused_parameters(module: nn.Module) -> Iterator[ExpertMatrices]:
    """The parameters of fused experts that a module holds, quantized already or not.

    Modules of transformers whose experts have several implementations say how many they are and
    whether they are transposed; so can any other.
    """
    experts = getattr(module, "num_experts", None)
    if not isinstance(experts, int) or not isinstance(getattr(module, "is_transposed", None), bool):
        return
    for name, param in module._parameters.items():
        if param is None or isinstance(param, UninitializedTensorMixin) or param.dim() != 3:
            continue
        if len(cast(Tensor, param)) == experts and param.numel():
            quantized = module._modules.get(name + SUFFIX)
            if isinstance(quantized, ExpertMatrices):
                yield quantized
            else:
                yield ExpertMatrices(module, name)


def layer_name(name: str, layer: nn.Module) -> str:
    """What a quantized layer is called: of experts the name of the parameter."""
    return name.removesuffix(SUFFIX) if isinstance(layer, ExpertMatrices) else name
