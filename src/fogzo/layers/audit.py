"""Mistakes that show only while layers train: bypassed layers and steps that nothing trains."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fogzo.collectives import local
from fogzo.layers.bypasses import warn_of_bypassed_layers
from fogzo.layers.quantized_layer import QuantizedLayer
from fogzo.wording import listed

_SAMPLE = 4096  # weights


class LayerAudit:
    """Checks a model's quantized layers now and then, after a backward pass.

    Args:
        model: Quantized. The state it is in now is what `check` compares with.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._then = {name: _fingerprint(layer) for name, layer in _learning(model)}

    def check(self) -> None:
        """Warn of bypassed layers and of learned steps that nothing trains."""
        warn_of_bypassed_layers(self._model, only_with_gradient=True)
        self._warn_of_untrained_steps()

    def _warn_of_untrained_steps(self) -> None:
        """Warn if all weights have changed since the audit was made, and no learned step has."""
        learning = {n: layer for n, layer in _learning(self._model) if _has_gradient(layer)}
        pairs = [(self._then[n], _fingerprint(learning[n])) for n in learning if n in self._then]
        weights_train = all(_moved_visibly(then, now) for then, now in pairs)
        steps_train = any(not torch.equal(then[1], now[1]) for then, now in pairs)
        if pairs and weights_train and not steps_train:
            warnings.warn(
                f"the weights train but the learned step sizes of {listed(list(learning))} do not, "
                "as in an optimizer made before fogzo.quantize_, which does not know them. Make it "
                "after: optimizer = torch.optim.AdamW(model.parameters())",
                UserWarning,
                stacklevel=3,
            )


def _layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def _learning(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """The layers whose steps an optimizer should train."""
    for name, layer in _layers(model):
        step = layer.weight_step
        if isinstance(step, nn.Parameter) and step.requires_grad and layer.weight.requires_grad:
            yield name, layer


@torch.no_grad()
def _fingerprint(layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """Some of the weights, and the steps."""
    assert layer.weight_step is not None
    some, steps = local(layer.weight).flatten()[:_SAMPLE], local(layer.weight_step)
    return some.cpu().clone(), steps.cpu().clone()  # the model may move meanwhile


def _moved_visibly(then: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> bool:
    """Whether a weight has moved so far that a step that moved as far would have changed."""
    if not (now[0].numel() and now[1].numel()):
        return True  # on other ranks
    distance = (now[0] - then[0].to(now[0].dtype)).abs().max()
    step = now[1].abs().max()
    return bool(distance > 8 * torch.finfo(step.dtype).eps * step)


def _has_gradient(layer: QuantizedLayer) -> bool:
    grad = None if layer.weight_step is None else layer.weight_step.grad
    return grad is not None and bool(local(grad).any())
