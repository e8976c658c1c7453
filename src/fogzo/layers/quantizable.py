"""Layers of a supported kind that cannot be quantized all the same, and the way out."""

import re
import warnings
from collections.abc import Mapping
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fogzo.collectives import is_sharded
from fogzo.layers.experts import ExpertMatrices
from fogzo.layers.weights import check_parameter
from fogzo.wording import listed

# Whose layers and tensors quantize weights themselves; known by name, as this package must not
# import them.
_QUANTIZING_PACKAGES = (
    "torch.ao.",
    "torchao.",
    "aimet_torch.",
    "bitsandbytes.",
    "brevitas.",
    "compressed_tensors.",
    "modelopt.",
    "nncf.",
    "neural_compressor.",
    "optimum.quanto.",
    "pytorch_quantization.",
    "quanto.",
    "transformers.integrations.",
)
_QUANTIZING_NAMES = re.compile(
    r"[Qq]uant(?!um|ile)|QAT|(Binar|Ternar)\w*(Linear|Conv|Dense|Layer)|Bit(Linear|Conv)"
)
_LATENT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Parametrization(NamedTuple):
    """A mechanism that computes a layer's weight, and how to make it a parameter again."""

    name: str
    way_out: str


def parametrization(layer: nn.Module) -> Parametrization | None:
    """The mechanism that computes this layer's weight; None where it is a parameter."""
    if is_parametrized(layer, "weight"):
        parts: Any = layer.parametrizations
        return Parametrization(
            f"the parametrization {type(parts.weight[0]).__name__}",
            'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight") first',
        )
    held = layer._parameters
    if "weight_g" in held:
        return Parametrization("weight_norm", "torch.nn.utils.remove_weight_norm(layer) first")
    if "weight_orig" in held and "weight_mask" in layer._buffers:
        return Parametrization("pruning", 'torch.nn.utils.prune.remove(layer, "weight") first')
    if "weight_orig" in held:
        return Parametrization("spectral_norm", "torch.nn.utils.remove_spectral_norm(layer) first")
    return None


def require_module(model: object, call: str) -> None:
    """Raise a `ValueError` unless it is a module; the call is the corrected one."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}: {call}")


def check_quantizable(name: str, layer: nn.Module) -> None:
    """Raise a `ValueError` unless quantizing this layer gives what its forward then uses."""
    weight = layer.weight
    if isinstance(weight, UninitializedTensorMixin):
        raise ValueError(
            f"{name!r} is lazy and has no weight yet: run a forward pass, model(x), before "
            "fogzo.quantize_(model, quantizer)"
        )
    how = parametrization(layer)
    if how is not None:
        raise ValueError(
            f"the weight of {name!r} is computed by {how.name} and is no parameter of its own: "
            f"leave it out with filter_fn, or {how.way_out}, if no class that builds it so, as "
            "Wav2Vec2 of transformers does, is to load it from a file"
        )
    computing = layer.experts if isinstance(layer, ExpertMatrices) else layer
    quantizing = _own_quantization(computing, cast(Tensor, weight))
    if quantizing is not None:
        raise ValueError(
            f"{name!r} is quantized already, by {quantizing}: start from the float model, or leave "
            "it out with filter_fn"
        )
    _check_own_forward(name, computing)
    check_parameter(f"{name}.weight", weight)
    weight = cast(Tensor, weight)
    if weight.dtype not in _LATENT_DTYPES:
        raise ValueError(
            f"'{name}.weight' holds {weight.dtype}, too coarse for a latent weight that an "
            "optimizer trains: layer.float() first"
        )
    if is_sharded(weight):
        raise ValueError(
            f"{name!r} is sharded already, and FSDP would not know of its step sizes: "
            "fogzo.quantize_(model, quantizer) first, then fully_shard(model)"
        )
    if any(
        stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)
    ):
        raise ValueError(
            f"'{name}.weight' is expanded, several of its entries are one number in memory, so no "
            "optimizer can train it and nothing can be baked into it: "
            "layer.weight = nn.Parameter(layer.weight.detach().clone()) first"
        )
    if getattr(layer, "sparse", False):
        raise ValueError(
            f"{name!r} has sparse gradients, which no rounding passes on: build it with "
            "nn.Embedding(..., sparse=False), or leave it out with filter_fn"
        )
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError(
            f"{name!r} scales its rows down to max_norm={layer.max_norm} in its forward, away from "
            "the levels that they were rounded to: build it with nn.Embedding(..., max_norm=None), "
            "or leave it out with filter_fn"
        )
    if not bool(weight.detach().isfinite().all()):
        raise ValueError(
            f"'{name}.weight' has values that are NaN or infinite, which no level stands for: "
            "load or initialise it before fogzo.quantize_(model, quantizer)"
        )


def warn_of_own_quantization(layers: Mapping[str, nn.Module]) -> None:
    """Warn of layers that, by their class's name, may quantize their weights themselves."""
    suspects = [
        name
        for name, layer in layers.items()
        if any(_QUANTIZING_NAMES.search(cls.__name__) for cls in type(layer).__mro__)
    ]
    if suspects:
        classes = sorted({type(layers[name]).__name__ for name in suspects})
        warnings.warn(
            f"by the name of its class ({', '.join(classes)}), a layer like {listed(suspects)} may "
            "quantize its weight itself, which would then be quantized twice: leave it out, "
            "fogzo.quantize_(model, quantizer, filter_fn=lambda module, name: ...)",
            UserWarning,
            stacklevel=3,
        )


def _own_quantization(layer: nn.Module, weight: Tensor) -> str | None:
    """The tool that quantizes the layer's weight already."""
    for cls in type(layer).__mro__:
        if f"{cls.__module__}.".startswith(_QUANTIZING_PACKAGES):
            return f"{cls.__module__}.{cls.__name__}"
    # torch.ao's and torchao's `weight_fake_quantizer`, brevitas's `weight_quant`.
    for child in layer._modules:
        if "weight" in child and "quant" in child:
            return f"its module {child!r}"
    tensor = type(weight)
    if tensor is nn.Parameter or is_sharded(weight):
        return None
    of_package = f"{tensor.__module__}.".startswith(_QUANTIZING_PACKAGES)
    if of_package or is_traceable_wrapper_subclass(weight):
        return f"{tensor.__module__}.{tensor.__name__}, the type of its weight"
    return None


def _check_own_forward(name: str, layer: nn.Module) -> None:
    """Raise a `ValueError` if the layer's forward was replaced on the layer itself."""
    forward = vars(layer).get("forward")
    if forward is None:
        return
    # accelerate leaves its class's own behind when it takes its hooks off, or the one that the
    # layer had before `dequantize_`.
    if isinstance(forward, MethodType) and forward.__self__ is layer:
        function = forward.__func__
        if function is type(layer).forward or function.__module__ == "fogzo.layers.quantized_layer":
            return
    raise ValueError(
        f"{name!r} has a forward that was put on the layer itself (by accelerate's device_map or "
        "offload hooks, say) and would go around its quantized weight. Take it off first: "
        "accelerate.hooks.remove_hook_from_module(model, recurse=True); fogzo.quantize_(model, "
        "quantizer); accelerate.dispatch_model(model, device_map)"
    )
