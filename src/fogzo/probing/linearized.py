"""The loss to first order in the rounded weights: probes that need no forward pass."""

from functools import partial

import torch
from torch import Tensor, nn

from fogzo.collectives import is_sharded
from fogzo.layers.quantized_layer import QuantizedLayer

_SAMPLE = 64  # values of a weight, to tell whether an optimizer has moved it


class LinearizedLoss:
    """``sum g . Q(w)``: backward's exact gradient g at the rounded weights, times their values.

    A closure for `refine_grads_` that stands for the loss itself. A probe then measures
    ``g . [Q(w + v) - Q(w - v)] / 2``, two roundings and a product, instead of two forward passes.
    It is exact where the loss is linear between the probes. What the loss's curvature adds is all
    that forward passes know beyond it.

    Unlike ``param.grad``, g is what reaches the rounded weights, before the surrogate masks or
    scales it. It is added up over the backward passes of a step, and begins anew after a probe,
    when the weights have changed, or when their gradients were dropped.

    Example::

        linear = fogzo.LinearizedLoss(model)
        ...
        loss.backward()
        estimator.refine_grads_(linear)

    With gradients that are scaled against underflow, give the closure ``lambda: linear() / scale``.

    Args:
        model: A model after `quantize_`. It keeps one gradient more per quantized weight.

    Raises:
        ValueError: If it has no quantized layers, or another linearized loss already.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
        if not self._layers:
            raise ValueError(
                "the model has no quantized layers whose gradients could be kept: "
                "fogzo.quantize_(model, fogzo.lsq(bits=2)); fogzo.LinearizedLoss(model)"
            )
        if any(layer.observe_quantized_weight is not None for layer in self._layers):
            raise ValueError(
                "the model has a LinearizedLoss already, which would no longer be told of its "
                "gradients: use that one, or call its close() first"
            )
        self._grads: dict[QuantizedLayer, Tensor] = {}
        self._probed = False
        self._task = -1  # autograd's number of the backward pass that was seen last
        self._versions: list[int] = []
        self._sampled = torch.empty(0)
        for layer in self._layers:
            layer.observe_quantized_weight = partial(self._observe, layer)

    def __call__(self) -> Tensor:
        """The value at the present weights, float64.

        Raises:
            ValueError: If no backward pass has reached the quantized weights, or they are sharded.
        """
        if not self._grads:
            raise ValueError(
                "no gradient has reached the rounded weights since they changed: compute the loss "
                "and call backward after fogzo.LinearizedLoss(model) and before the estimator. "
                "Compiled models and closures of their own do not tell it"
            )
        self._probed = True
        terms = [
            torch.sum(grad.double() * layer.quantized_weight().double())
            for layer, grad in self._grads.items()
        ]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def close(self) -> None:
        """Keep no gradients any more."""
        for layer in self._layers:
            layer.observe_quantized_weight = None
        self._grads.clear()

    def _observe(self, layer: QuantizedLayer, weight: Tensor) -> None:
        """Called with the quantized weight of every forward pass."""
        if is_sharded(layer.weight):
            raise ValueError(
                "a LinearizedLoss needs whole gradients, and FSDP's ranks hold shards: use DDP, or "
                "let the estimator measure the loss itself"
            )
        if weight.requires_grad and weight is not layer.weight:  # as it is in a float phase
            weight.register_hook(partial(self._add, layer))

    def _add(self, layer: QuantizedLayer, grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            versions, sampled = [each.weight._version for each in self._layers], self._sample()
            # A fused optimizer counts no version, so that values are asked too.
            moved = versions != self._versions or not sampled.equal(self._sampled)
            if self._probed or moved or self._dropped():
                self._grads.clear()  # another step: what is left of the last one is of its weights
                self._probed, self._versions, self._sampled = False, versions, sampled
        kept = self._grads.get(layer)
        self._grads[layer] = grad.detach().clone() if kept is None else kept + grad.detach()

    def _dropped(self) -> bool:
        """Whether no weight has a gradient of the passes before, as after `zero_grad`."""
        trained = [each.weight for each in self._layers if each.weight.requires_grad]
        return bool(trained) and not any(w.grad is not None and w.grad.any() for w in trained)

    def _sample(self) -> Tensor:
        """A few values of every weight."""
        flat = [layer.weight.detach().flatten() for layer in self._layers]
        parts = [weight[:: max(1, len(weight) // _SAMPLE)].double() for weight in flat]
        return torch.cat([part.to(parts[0].device) for part in parts])
