"""A folder that transformers' ``from_pretrained`` reads: config.json and safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from fogzo.export.source import Source


def write_hub_folder(
    source: Source,
    folder: Path,
    tensors: Mapping[str, Tensor],
    quantization_config: Mapping[str, Any],
) -> None:
    """Write these tensors in place of the quantized layers' weights, and all others as they are.

    transformers itself writes the rest: tied tensors once, large models in several files, the
    generation config.
    """
    model = cast(Any, source.model)
    state = {name: tensor.contiguous() for name, tensor in tensors.items()}
    model.save_pretrained(folder, state_dict=source.other_tensors() | state)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = dict(quantization_config)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def unquantized_linear_layers(source: Source) -> list[str]:
    """Names of the linear layers that stay in float."""
    return [
        name
        for name, module in source.model.named_modules()
        if isinstance(module, nn.Linear) and name not in source.layers
    ]
