"""Adapters of PEFT on a quantized base.

model = fogzo.quantize_(AutoModelForCausalLM.from_pretrained("float"), fogzo.quest(4))
model = peft.get_peft_model(model, peft.LoraConfig(...))  # trains adapters on the frozen base
merged = fogzo.integrations.peft.merge_and_unload(model)
"""

import copy
from typing import Any, cast

import torch
from peft import PeftModel
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
            layers would take in float, or adapters compute with the latent weights, as those of
            DoRA, HRA, HiRA and SHiRA do. The model is then untouched; a packed base that PEFT
            itself refuses to merge is left unpacked.
    """
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        known = {id(param) for param in model.parameters()}
        for param in unpack_(model).parameters():
            if id(param) not in known:  # unpacked just now, of a base that adapters leave frozen
                param.requires_grad_(False)
        return cast(nn.Module, model.merge_and_unload(**options))
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
    return cast(nn.Module, dequantize_(model).merge_and_unload(**options))


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
