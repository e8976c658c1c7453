"""A folder in the names of the model hub, which transformers of any version and vLLM read."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from fogzo.export.folder import write_config
from fogzo.export.source import Source


def write_hub_folder(
    source: Source,
    folder: Path,
    tensors: Mapping[str, Tensor],
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write these tensors in place of the quantized layers' weights, and all others as they are.

    transformers names them as the hub does, which is not always how its modules are called, and
    writes tied tensors once.
    """
    model: Any = source.model
    own = model.config
    model.config = copy.deepcopy(own)  # it is written to
    try:
        model.save_pretrained(folder, state_dict=source.other_tensors() | dict(tensors))
    finally:
        model.config = own
    write_config(model, folder, quantization)


def hub_named(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as `write_hub_folder` names them, for a file that transformers does not write.

    Experts that transformers has fused come apart.
    """
    from transformers.core_model_loading import revert_weight_conversion

    named: dict[str, Tensor] = revert_weight_conversion(cast(Any, model), dict(tensors))
    return named


def linear_layers_in_float(source: Source) -> list[str]:
    """Names of the linear layers that are not quantized."""
    return [
        name
        for name, module in source.model.named_modules()
        if isinstance(module, nn.Linear) and name not in source.layers
    ]
