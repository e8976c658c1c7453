"""Packed folders in transformers: import this module, then ``AutoModel.from_pretrained(folder)``.

import fogzo.export.transformers
model = AutoModelForCausalLM.from_pretrained("out")

What is loaded so, or by `load_`, can be saved again: `save_pretrained` and `push_to_hub` write the
packed weights and how they are packed.
"""

from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fogzo.export.packed import METHOD, check_version, pack_layers_, tie_layers_


class PackedConfig(QuantizationConfigMixin):
    """What ``quantization_config`` of a packed folder says."""

    def __init__(
        self,
        modules: dict[str, Any],
        ties: dict[str, str],
        format_version: int,
        **unused: Any,
    ) -> None:
        self.quant_method: Any = METHOD  # transformers lists its own alone
        self.format_version = format_version
        self.modules = modules
        self.ties = ties


class PackedQuantizer(HfQuantizer):
    """Makes the layers of a model that is being loaded take packed weights."""

    requires_calibration = True
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: Any, **unused: Any) -> None:
        config = self.quantization_config
        check_version(vars(config), getattr(model, "name_or_path", "the folder"))
        for other, first in config.ties.items():
            if other not in model.all_tied_weights_keys:
                raise ValueError(
                    f"{other!r} is {first!r} by another name, and transformers builds both from "
                    "the config and would fill one: fogzo.export.load_(model, folder) loads a "
                    "model that shares them"
                )
        pack_layers_(model, config.modules)
        for name in config.modules:  # has no parameter to tie; see `tie_layers_`
            model.all_tied_weights_keys.pop(f"{name}.weight", None)

    def _process_model_after_weight_loading(self, model: Any, **unused: Any) -> Any:
        tie_layers_(model, self.quantization_config.modules)
        return model

    def is_serializable(self, *unused: Any) -> bool:
        """By ``save_pretrained``."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights are no parameters."""
        return False


def register(
    method: str, config: type[QuantizationConfigMixin], quantizer: type[HfQuantizer]
) -> None:
    """Make a quantization method known to transformers; once, as notebooks import again."""
    if method not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(method)(config)
        register_quantizer(method)(quantizer)


register(METHOD, PackedConfig, PackedQuantizer)
