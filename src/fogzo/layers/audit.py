"""Mistakes that show only while layers train: bypassed layers, step sizes that stay."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fogzo.collectives import local
from fogzo.layers.bypasses import warn_of_bypassed_layers
from fogzo.layers.quantized_layer import QuantizedLayer
from fogzo.wording import caveat, listed

_SAMPLE = 4096  # weights


class LayerAudit:
    """Checks a model's quantized layers now and then, after a backward pass.

    Args:
        model: Quantized. The state it is in now is what `check` compares with.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._then = {name: _fingerprint(layer, step) for name, layer, step in _learning(model)}

    def check(self) -> None:
        """Warn of bypassed layers, and if weights have changed but no learned step size has."""
        warn_of_bypassed_layers(self._model, only_with_gradient=True)
        pairs = {
            name: (self._then[name], _fingerprint(layer, step))
            for name, layer, step in _learning(self._model)
            if name in self._then and step.grad is not None and local(step.grad).any()
        }
        weights_train = all(_moved_visibly(then, now) for then, now in pairs.values())
        steps_train = any(not torch.equal(then[1], now[1]) for then, now in pairs.values())
        if pairs and weights_train and not steps_train:
            warnings.warn(
                f"the weights train but the learned step sizes of {listed(list(pairs))} do not, "
                "as in an optimizer made before fogzo.quantize_, which does not know them. Make it "
                "after: torch.optim.AdamW(fogzo.parameter_groups(model, weight_decay=0.01))"
                + caveat("Untrained step sizes"),
                UserWarning,
                stacklevel=2,
            )


def _learning(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer, nn.Parameter]]:
    """The layers whose step sizes an optimizer should train, and these."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            step = layer.weight_step
            if isinstance(step, nn.Parameter) and step.requires_grad and layer.weight.requires_grad:
                yield name, layer, step


@torch.no_grad()
def _fingerprint(layer: QuantizedLayer, step: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the weights, and the step sizes."""
    some = local(layer.weight).flatten()[:_SAMPLE]
    return some.cpu().clone(), local(step).cpu().clone()  # the model may move meanwhile


def _moved_visibly(then: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> bool:
    """Whether a weight has moved so far that a step size that moved as far would have changed."""
    if not (now[0].numel() and now[1].numel()):
        return True  # on other ranks
    distance = (now[0] - then[0].to(now[0].dtype)).abs().max()
    step = now[1].abs().max()
    return bool(distance > 8 * torch.finfo(step.dtype).eps * step)
