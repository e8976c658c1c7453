"""Adapters of PEFT on a quantized base.

model = fogzo.quantize_(AutoModelForCausalLM.from_pretrained("float"), fogzo.quest(4))
model = peft.get_peft_model(model, peft.LoraConfig(...))  # trains adapters on the frozen base
merged = fogzo.integrations.peft.merge_and_unload(model)
"""

import copy
import inspect
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fogzo.export.packed import PackedLayer, unpack_
from fogzo.layers import QuantizedLayer, dequantize_
from fogzo.layers.described import forms_of
from fogzo.wording import listed

# Of the largest output, in float32. Equal weights give equal ones; latent weights differ by more.
_SAME = 1e-4


def merge_and_unload(model: PeftModel, **options: Any) -> nn.Module:
    """Merge adapters into the quantized weights: a float model that answers as the two together.

    PEFT's own ``merge_and_unload`` adds adapters to the latent weights, and what comes out is
    rounded again, to other weights than were trained. Here the quantized weights are baked in
    first, so the result is in float. The base may also have been loaded from a packed folder.

    Args:
        model: With adapters on a quantized base.
        options: Of PEFT's ``merge_and_unload``.

    Raises:
        ValueError: If nothing in the base is quantized, inputs are quantized, which the merged
            layers would take in float, adapters compute with the latent weights, as those of
            DoRA, HRA, HiRA and SHiRA do, are merged already, or PEFT itself refuses to merge them.
            The model is then untouched; a packed base that PEFT refuses is left unpacked.
    """
    _check_adapters(model, options)
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        known = {id(param) for param in model.parameters()}
        for param in unpack_(model).parameters():
            if id(param) not in known:  # unpacked just now, of a base that adapters leave frozen
                param.requires_grad_(False)
        return cast(nn.Module, model.merge_and_unload(**options))
    if not any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise ValueError(
            "nothing in the base of these adapters is quantized, so PEFT's own function merges "
            "them: model.merge_and_unload()"
        )
    with_input = [name for name, form in forms_of(model).items() if form.input is not None]
    if with_input:
        raise ValueError(
            f"the inputs of {listed(with_input)} are quantized for the base alone, so one merged "
            "layer cannot compute both: keep the adapters apart, model.save_pretrained(folder)"
        )
    merged = options.get("adapter_names") or model.active_adapters
    of_latents = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "get_base_layer")
        and isinstance(module.get_base_layer(), QuantizedLayer)
        and not _adds_to_the_quantized_weight(module, merged)
    ]
    if of_latents:
        raise ValueError(
            f"the adapters of {listed(of_latents)} compute with the latent weights, as those of "
            "DoRA, HRA, HiRA and SHiRA do, and merged with the quantized ones they would answer "
            "otherwise than they were trained: keep the adapters apart, "
            "model.save_pretrained(folder)"
        )
    for name, module in _adapted(model).items():
        _check_merge(name, module, merged, options.get("safe_merge", False))
    return cast(nn.Module, dequantize_(model).merge_and_unload(**options))


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The layers that hold adapters."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def _check_adapters(model: Any, options: dict[str, Any]) -> None:
    """Raise a `ValueError` unless there are adapters to merge, and the options name them."""
    merge = getattr(getattr(model, "base_model", None), "merge_and_unload", None)
    if merge is None:
        raise ValueError(
            f"expected a model with adapters that PEFT can merge, got {type(model).__name__}: "
            'peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))'
        )
    names, known = options.get("adapter_names"), list(model.peft_config)
    if names is not None and (
        isinstance(names, str) or not names or any(name not in known for name in names)
    ):
        raise ValueError(
            f"adapter_names must list some of {listed(known)}, got {names!r:.80}: "
            f"merge_and_unload(model, adapter_names=[{known[0]!r}])"
        )
    allowed = inspect.signature(merge).parameters
    if unknown := [name for name in options if name not in allowed]:
        raise ValueError(
            f"PEFT's merge_and_unload has no option {listed(unknown)}, but {', '.join(allowed)}: "
            "merge_and_unload(model, safe_merge=True)"
        )
    if merged := [name for name, module in _adapted(model).items() if module.merged]:
        raise ValueError(
            f"the adapters of {listed(merged)} are merged into the latent weights already, which "
            "are then rounded to other weights than were trained: call model.unmerge_adapter() "
            "first"
        )


def _check_merge(name: str, module: Any, adapters: list[str], safe: bool) -> None:
    """Raise a `ValueError` if PEFT refuses to merge the adapters of a layer, tried on a copy."""
    try:
        copy.deepcopy(module).merge(safe_merge=safe, adapter_names=list(adapters))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"PEFT does not merge the adapters of {name!r} ({error}): keep the adapters apart, "
            "model.save_pretrained(folder)"
        ) from error


@torch.no_grad()
def _adds_to_the_quantized_weight(module: Any, adapters: list[str]) -> bool:
    """Whether adapters answer as before once the quantized weight is baked into their layer."""
    x = _example(module.get_base_layer())
    if x is None:
        return True
    twin = copy.deepcopy(module).eval().float()
    twin.enable_adapters(True)
    twin.set_adapter(adapters)
    before = twin(x)
    after = dequantize_(twin)(x)
    return float((after - before).abs().max()) <= _SAME * float(before.abs().max())


def _example(layer: nn.Module) -> Tensor | None:
    """An input of a layer; None where its kind is not known."""
    weight = cast(Tensor, layer.weight)
    if isinstance(layer, nn.Embedding):
        return torch.arange(layer.num_embeddings, device=weight.device)[:64]
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (4, layer.in_features)
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        reach = (1 + d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        shape = (1, layer.in_channels, *reach)
    else:
        return None
    draws = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=draws).to(weight.device)
