"""Quantized layers that nothing calls, although something may use their weights."""

import warnings

from torch import nn

from fogzo.wording import caveat, listed


def warn_of_bypassed_layers(model: nn.Module, only_with_gradient: bool = False) -> None:
    """Warn of layers whose quantized weight no forward pass used, although the model ran.

    A parent that reads ``layer.weight`` itself (a head tied by hand, torch's functional attention)
    uses the latent weight: in float, although it is listed and baked in as a quantized one. So does
    a forward that goes around ``self.weight``. Of a model that never ran, a freshly loaded one say,
    nothing is known and nothing said.

    Args:
        model: Its layers are known by their attribute ``weight_was_read``.
        only_with_gradient: Leave out layers whose weight has no gradient, such as unused experts.
    """
    layers = {
        name: module for name, module in model.named_modules() if hasattr(module, "weight_was_read")
    }
    if not any(layer.forward_ran for layer in layers.values()):
        return
    bypassed = [
        name
        for name, layer in layers.items()
        if not layer.weight_was_read and not (only_with_gradient and layer.weight.grad is None)
    ]
    if bypassed:
        warnings.warn(
            f"the forward of {listed(bypassed)} never ran, or did not read self.weight of the "
            "object that it was called on, and only that is quantized: what reads layer.weight "
            "itself (or self._parameters, or by a method bound before) uses the float weight. Call "
            "the layer, layer(x), or leave it out, fogzo.quantize_(model, quantizer, "
            "filter_fn=...). Layers that are not used at all are no mistake"
            + caveat("Bypassed layers"),
            UserWarning,
            stacklevel=3,
        )
