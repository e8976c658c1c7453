"""Saving quantized models with transformers and loading them again.

import fogzo.integrations.transformers

model = fogzo.quantize_(AutoModelForCausalLM.from_pretrained("float"), fogzo.lsq(2))
model.save_pretrained("out")
model = AutoModelForCausalLM.from_pretrained("out")

`save_pretrained`, the Trainer's `save_model` and `push_to_hub` write the latent weights under their
own names, the step sizes beside them and, in config.json, how each layer is quantized. What
`from_pretrained` makes of that is the same model, to be trained on. Only loading needs the import;
to serve a model, export it (`fogzo.export`).

Importing this also lets transformers load folders of the packed format.
"""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fogzo.export.transformers import register
from fogzo.integrations.trainer import refine
from fogzo.layers import QuantizedLayer
from fogzo.layers.activations import Activations
from fogzo.layers.described import (
    LayerForm,
    attach_forms_,
    chosen_forms,
    forms_of,
    settle_,
)
from fogzo.layers.hosts import forget_quantization_, take_own_config
from fogzo.layers.quantized_input import FloatPhase
from fogzo.layers.quantized_layer import STEP_NAMES
from fogzo.layers.selection import FilterFn, quantizable_layers
from fogzo.quantizers import Quantizer
from fogzo.quantizers.description import describe, from_description
from fogzo.wording import listed

__all__ = ["FogzoConfig", "refine", "update_config_"]

logger = logging.getLogger(__name__)

# Where this is not imported, transformers says that it does not know this method.
METHOD, VERSION = __name__, 1


class FogzoConfig(QuantizationConfigMixin):
    """How a model is quantized, for ``from_pretrained(..., quantization_config=...)``.

    ``from_pretrained("float", quantization_config=FogzoConfig(fogzo.lsq(2)))`` loads a float model
    and quantizes it, as `fogzo.quantize_` would. Models that were saved quantized have theirs in
    config.json and need none here.

    Args:
        quantizer: As of `fogzo.quantize_`.
        filter_fn: As of `fogzo.quantize_`.
        activations: As of `fogzo.quantize_`.
        keep_dtype: Load in the dtype that is asked for, also in half precision. By default models
            that are quantized while loading are loaded in float32, as the steps that an optimizer
            takes are lost in half precision.
        groups: In config.json: the layers of the same quantizers, by name.
        in_float: In config.json: whether they were still in the float phase of
            `fogzo.methods.quantize_from`, so that their step sizes are not those of their weights.
        format_version: In config.json: of these entries.

    Raises:
        ValueError: If there is neither a quantizer nor groups, or they are of a later version.
    """

    def __init__(
        self,
        quantizer: Quantizer | None = None,
        filter_fn: FilterFn | None = None,
        activations: Activations = None,
        *,
        keep_dtype: bool = False,
        groups: list[dict[str, Any]] | None = None,
        in_float: bool = False,
        format_version: int = VERSION,
        **unused: Any,
    ) -> None:
        if quantizer is None and groups is None:
            raise ValueError("FogzoConfig needs a quantizer: FogzoConfig(fogzo.lsq(bits=2))")
        if format_version != VERSION:
            raise ValueError(
                f"this folder is of version {format_version!r} of quantized models, and this fogzo "
                f"reads {VERSION}: pip install --upgrade fogzo"
            )
        self.quant_method: Any = METHOD  # transformers lists its own alone
        self.quantizer, self.filter_fn, self.activations = quantizer, filter_fn, activations
        self.keep_dtype = keep_dtype
        self.groups = groups or []
        self._float_phase = FloatPhase(in_float)

    @classmethod
    def of(cls, model: nn.Module) -> "FogzoConfig":
        """How a model is quantized now."""
        groups: dict[LayerForm, list[str]] = {}
        for name, form in forms_of(model).items():
            # PEFT's wrappers are gone when the model is saved.
            groups.setdefault(form, []).append(name.replace(".base_layer", ""))
        config = cls(
            groups=[
                {
                    "weight": describe(form.weight),
                    "input": None if form.input is None else describe(form.input),
                    "layers": names,
                }
                for form, names in groups.items()
            ]
        )
        layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
        phases = (layer._float_phase for layer in layers)
        config._float_phase = next(filter(None, phases), config._float_phase)
        return config

    @property
    def in_float(self) -> bool:
        """Whether the layers compute in float for now."""
        return self._float_phase.active

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {
            "quant_method": self.quant_method,
            "format_version": VERSION,
            "groups": self.groups,
            **({"in_float": True} if self.in_float else {}),
        }

    def forms(self) -> dict[str, LayerForm]:
        """How each layer is quantized."""
        return {
            name: LayerForm(
                from_description(group["weight"]),
                None if group["input"] is None else from_description(group["input"]),
            )
            for group in self.groups
            for name in group["layers"]
        }


class FogzoQuantizer(HfQuantizer):
    """Quantizes a model before its weights are loaded, and measures what no file held."""

    quantization_config: FogzoConfig

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Latent weights in float32, unless they were trained otherwise."""
        if self.pre_quantized or self.quantization_config.keep_dtype or dtype.itemsize >= 4:
            return dtype
        logger.warning(
            "loading in float32 and not in %s, in which an optimizer's small steps would be lost: "
            "train with autocast (bf16=True), or FogzoConfig(quantizer, keep_dtype=True)",
            str(dtype).removeprefix("torch."),
        )
        return torch.float32

    def _process_model_before_weight_loading(self, model: Any, **unused: Any) -> None:
        config = self.quantization_config
        if config.groups:
            forms = _of_this_class(model, config.forms())
        else:
            quantizer = cast(Quantizer, config.quantizer)
            with _tied(model):
                forms = chosen_forms(model, quantizer, config.filter_fn, config.activations)
        attach_forms_(model, forms)
        _expect_steps(model, saved=bool(config.groups))

    def _process_model_after_weight_loading(self, model: Any, **unused: Any) -> Any:
        named = [*model.named_parameters(), *model.named_buffers()]
        if self.quantization_config.in_float:
            named = [pair for pair in named if pair[0].rpartition(".")[2] not in STEP_NAMES]
            warnings.warn(
                "this model was saved before its quantization began, and is quantized from here "
                "on, with step sizes measured on its weights. To train it on in float: switch = "
                "fogzo.methods.quantize_from(model, ...), switch.load_state_dict(saved)",
                UserWarning,
                stacklevel=2,
            )
        settle_(model, {id(tensor) for _, tensor in named if self._is_loaded(tensor)})
        # From here on its config says how it is quantized, and transformers has no part in it.
        forget_quantization_(model)
        update_config_(model)
        return model

    def _is_loaded(self, tensor: Tensor) -> bool:
        # transformers' own mark; what it offloads loses that, and waits on the disk.
        offloaded = self.pre_quantized and tensor.is_meta
        return offloaded or getattr(tensor, "_is_hf_initialized", False)

    def is_serializable(self, *unused: Any) -> bool:
        """By ``save_pretrained``."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The weights are latent weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """It is what they are there for."""
        return True


def update_config_(model: PreTrainedModel) -> None:
    """Note in a model's config how its layers are quantized now, or that none is any longer.

    `fogzo.quantize_` and `fogzo.dequantize_` do it for the model that they are given. Call it
    where they were given a part of it alone.
    """
    is_quantized = any(isinstance(module, QuantizedLayer) for module in model.modules())
    was_quantized = isinstance(getattr(model.config, "quantization_config", None), FogzoConfig)
    if not (is_quantized or was_quantized):
        return
    take_own_config(model)
    if was_quantized:
        del model.config.quantization_config
    if not is_quantized:
        return
    try:
        model.config.quantization_config = FogzoConfig.of(model)
    except ValueError as error:
        warnings.warn(
            f"save_pretrained will not say how this model is quantized, as {error}",
            UserWarning,
            stacklevel=2,
        )


@contextmanager
def _tied(model: PreTrainedModel) -> Iterator[None]:
    """Let the names of a weight hold one parameter, as they do once transformers has loaded it."""
    with ExitStack() as stack:
        for target, source in model.all_tied_weights_keys.items():
            owner, _, name = target.rpartition(".")
            held = model.get_submodule(owner)._parameters
            if name in held:  # and no buffer
                stack.callback(held.update, {name: held[name]})
                held[name] = model.get_parameter(source)
        yield


def _of_this_class(model: PreTrainedModel, forms: dict[str, LayerForm]) -> dict[str, LayerForm]:
    """The forms of a model with another head or with none, under the names of this one."""
    names = quantizable_layers(model)
    prefix = f"{model.base_model_prefix}."
    found: dict[str, LayerForm] = {}
    missing: list[str] = []
    for name, form in forms.items():
        own = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), "")
        if own:
            found[own] = form
        else:
            missing.append(name)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has none of the layers that were saved quantized, "
            f"{listed(missing)}: load the class that was saved"
        )
    if missing:
        warnings.warn(
            f"{type(model).__name__} has no {listed(missing)}, which were saved quantized: as of a "
            "head that it does not have",
            UserWarning,
            stacklevel=2,
        )
    return found


def _expect_steps(model: PreTrainedModel, saved: bool) -> None:
    """Tell transformers which step sizes to tie, and which are in no file.

    Args:
        model: Its layers quantize, and its tensors are still to be loaded.
        saved: Whether files hold step sizes.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    absent = [] if saved else [f"{name}.{kind}" for name in layers for kind in STEP_NAMES]
    ties: dict[str, str] = model.all_tied_weights_keys
    for target, source in list(ties.items()):
        owners = target.removesuffix(".weight"), source.removesuffix(".weight")
        if not all(name in layers for name in owners):
            continue
        for kind in ("weight_step", "weight_step_knee"):
            # It ties parameters alone, and those that it has loaded; `settle_` ties the others.
            if saved and kind in layers[owners[0]]._parameters:
                ties[f"{owners[0]}.{kind}"] = f"{owners[1]}.{kind}"
            else:
                absent.append(f"{owners[0]}.{kind}")
    ignored = model._keys_to_ignore_on_load_missing or []
    model._keys_to_ignore_on_load_missing = [*ignored, *map(re.escape, absent)]


register(METHOD, FogzoConfig, FogzoQuantizer)
