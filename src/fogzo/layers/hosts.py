"""transformers saves and loads models by its own means, and is told what became of them."""

import copy
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import nn

# By name, as this package must not import what is built on it.
_INTEGRATION = "fogzo.integrations.transformers"


def tell_transformers(model: nn.Module) -> None:
    """Note in the config of transformers' models how they are quantized now.

    What `save_pretrained` and the Trainer write then says so. Nothing happens to other models, and
    transformers is not imported for them.

    Args:
        model: As it was given to `quantize_` or `dequantize_`: a model of transformers, or one
            that holds some.
    """
    for own in models_of_transformers(model):
        import_module(_INTEGRATION).update_config_(own)


def check_loaded_as_saved(model: nn.Module) -> None:
    """Raise a `ValueError` if transformers loaded a quantized model as one in float.

    It does so, with no more than a warning, where the method that its config names is unknown.
    """
    for own in models_of_transformers(model):
        found: Any = getattr(own.config, "quantization_config", None)
        if isinstance(found, dict) and found.get("quant_method") == _INTEGRATION:
            raise ValueError(
                "this model was saved quantized and loaded in float, with latent weights and "
                f"without their step sizes: import {_INTEGRATION} before from_pretrained. Of a "
                "new model of that config: del model.config.quantization_config"
            )


def forget_quantization_(model: Any) -> None:
    """Let transformers take a model that it has loaded as a quantized one for one in float.

    It can then be cast, compiled, trained and saved as one.
    """
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.is_quantized = False
    take_own_config(model)
    for name in ("_is_quantized", "quantization_config"):
        model.config.__dict__.pop(name, None)


def take_own_config(model: Any) -> None:
    """A copy of the config in place of one that models may share, as teacher and student do."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        shared = module.__dict__.get("config")
        if id(shared) in copies:  # also one of a part, which the whole holds
            module.config = copies[id(shared)]


def models_of_transformers(model: nn.Module) -> Iterator[Any]:
    """The outermost models of transformers in a model."""
    # A model of theirs implies that this module is loaded.
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not hasattr(modeling, "PreTrainedModel"):
        return
    outermost: list[str] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in outermost)
        if isinstance(module, modeling.PreTrainedModel) and not inside:
            outermost.append(name)
            yield module
