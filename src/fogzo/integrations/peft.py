"""Adapters of PEFT on a quantized base.

model = fogzo.quantize_(AutoModelForCausalLM.from_pretrained("float"), fogzo.quest(4))
model = peft.get_peft_model(model, peft.LoraConfig(...))  # trains adapters on the frozen base
merged = fogzo.integrations.peft.merge_and_unload(model)
"""

from typing import Any

from peft import PeftModel
from torch import nn

from fogzo.layers import QuantizedLayer, dequantize_
from fogzo.layers.described import forms_of
from fogzo.wording import listed


def merge_and_unload(model: PeftModel, **options: Any) -> nn.Module:
    """Merge adapters into the quantized weights: a float model that answers as the two together.

    PEFT's own ``merge_and_unload`` adds adapters to the latent weights, and what comes out is
    rounded again, to other weights than were trained. Here the quantized weights are baked in
    first, so the result is in float.

    Args:
        model: With adapters on a quantized base.
        options: Of PEFT's ``merge_and_unload``.

    Raises:
        ValueError: If nothing in the base is quantized, inputs are quantized, which the merged
            layers would take in float, or adapters are of DoRA, which divides by the norm of the
            latent weights. The model is then untouched.
    """
    with_input = [name for name, form in forms_of(model).items() if form.input is not None]
    if with_input:
        raise ValueError(
            f"the inputs of {listed(with_input)} are quantized for the base alone, so one merged "
            "layer cannot compute both: keep the adapters apart, model.save_pretrained(folder)"
        )
    of_dora = [
        name
        for name, module in model.named_modules()
        if (found := getattr(module, "lora_magnitude_vector", None))
        and isinstance(module.get_base_layer(), QuantizedLayer)
        # The others are left out of what is merged.
        and not found.keys().isdisjoint(options.get("adapter_names") or module.active_adapters)
    ]
    if of_dora:
        raise ValueError(
            f"DoRA divides what {listed(of_dora)} add up to by the norm of the latent weights, "
            "and merged with the quantized ones they would answer otherwise than they were "
            "trained: keep the adapters apart, model.save_pretrained(folder)"
        )
    return dequantize_(model).merge_and_unload(**options)
