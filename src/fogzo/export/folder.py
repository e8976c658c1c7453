"""The files that several formats share: transformers' config.json and model.safetensors."""

import copy
import json
import os
import tempfile
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fogzo.layers import QuantizedLayer
from fogzo.quantizers.checks import require_type

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def folder_path(folder: object, call: str) -> Path:
    """A folder as the user named it, with ``~`` for the home folder.

    Raises:
        ValueError: If it is no path; the call is the corrected one.
    """
    require_type("folder", folder, (str, os.PathLike), call)
    return Path(cast(str, folder)).expanduser()


def write_config(
    model: nn.Module,
    folder: Path,
    quantization: Mapping[str, Any] | None = None,
    /,
    **changes: Any,
) -> None:
    """Write config.json: transformers' own where the model has one, and how it is quantized.

    Args:
        model: Whose config it is.
        folder: Where to write.
        quantization: The entry ``quantization_config``.
        changes: Other entries, instead of the config's own.
    """
    entries = dict(changes)
    if quantization is not None:
        entries["quantization_config"] = dict(quantization)
    own: Any = getattr(model, "config", None)
    if not hasattr(own, "save_pretrained"):
        (folder / CONFIG).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        return
    config = copy.deepcopy(own)
    config.architectures = [type(model).__name__]
    # Readers load all in one dtype: in one that holds all quantized weights, these are as trained.
    layers = (module for module in model.modules() if isinstance(module, QuantizedLayer))
    widest = reduce(torch.promote_types, (layer.weight.dtype for layer in layers))
    config.dtype = str(widest).removeprefix("torch.")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the latent weights, which are not what is written
    for name, value in entries.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def why_not_saved(model: nn.Module) -> str | None:
    """What is wrong with a generation config, which transformers says as it saves it."""
    own, generation = (getattr(model, name, None) for name in ("config", "generation_config"))
    if not hasattr(own, "save_pretrained") or generation is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            cast(Any, generation).save_pretrained(folder)
        except ValueError as error:
            return " ".join(str(error).split())
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """The entries of config.json.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"{folder} has no config.json and is no exported folder: "
            "fogzo.export.export(model, folder) writes one"
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """What a file of an export says; raises a `ValueError` if it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): export the model again") from None


def write_tensors(
    tensors: Mapping[str, Tensor], folder: Path, framework: str = "pt"
) -> dict[str, str]:
    """Write model.safetensors; a tensor with two names is written under the first.

    Returns:
        The names that are left out, each with the one that its tensor is written under.
    """
    from safetensors.torch import save_file

    owners: dict[int, str] = {}
    ties = {name: owners.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    written = {
        name: tensor.detach().cpu().clone().contiguous()  # parts of one memory are refused
        for name, tensor in tensors.items()
        if ties[name] == name
    }
    path = folder / WEIGHTS
    save_file(written, path, metadata={"format": framework})
    path.chmod(folder.stat().st_mode & 0o666)  # it is written for its owner alone
    return {name: owner for name, owner in ties.items() if name != owner}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote, or transformers of it, in several files if it is large.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / f"{WEIGHTS}.index.json"
    files = [WEIGHTS]
    if index.is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} has no {name}: export the model again")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): export the model again") from None
    return tensors
