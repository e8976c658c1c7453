"""Quantized layers that nothing calls, although something may use their weights."""

import warnings

from torch import nn

from fogzo.wording import caveat, listed


def warn_of_bypassed_layers(model: nn.Module, only_with_gradient: bool = False) -> None:
    """Warn of quantized layers whose forward never ran although that of others did.

    A parent that reads ``layer.weight`` itself (a head tied by hand, torch's functional attention)
    uses the latent weight: in float, although it is listed and baked in as a quantized one. Of a
    model that never ran, a freshly loaded one say, nothing is known and nothing said.

    Args:
        model: Its layers are known by their attribute ``forward_ran``.
        only_with_gradient: Leave out layers whose weight has no gradient, such as unused experts.
    """
    layers = {
        name: module for name, module in model.named_modules() if hasattr(module, "forward_ran")
    }
    if not any(layer.forward_ran for layer in layers.values()):
        return
    bypassed = [
        name
        for name, layer in layers.items()
        if not layer.forward_ran and not (only_with_gradient and layer.weight.grad is None)
    ]
    if bypassed:
        warnings.warn(
            f"the forward of {listed(bypassed)} never ran, and only there is the weight quantized: "
            "what reads layer.weight itself uses the float weight. Call the layer, layer(x), or "
            "leave it out, fogzo.quantize_(model, quantizer, filter_fn=...). Layers that are not "
            f"used at all are no mistake{caveat('Bypassed layers')}",
            UserWarning,
            stacklevel=3,
        )
