"""One layer, quantized by this package, by plain torch operations and by other libraries.

The other libraries are imported where they are used, as neither has to be installed.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from fogzo import Quantizer, abs_max, fixed, lsq, quantize_
from fogzo_lab.bench.cases import NotHereError

Layer = nn.Linear | nn.Conv2d
Make = Callable[[Layer], nn.Module]


class Chain(nn.Module):
    """2 bits and a learned step size as a chain of torch operations, the STE as a detach.

    Its levels are those of ``fogzo.lsq(2)``.

    Args:
        layer: The layer whose weight is quantized.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.step = nn.Parameter(layer.weight.detach().abs().mean())

    def forward(self, x: Tensor) -> Tensor:
        """The forward pass of the layer with a quantized weight."""
        layer = self.layer
        scaled = (layer.weight / self.step).clamp(-1.5, 1.5)
        level = scaled.floor() + 0.5
        weight = (scaled + (level - scaled).detach()) * self.step
        if isinstance(layer, nn.Conv2d):
            return conv2d(x, weight, layer.bias, layer.stride, layer.padding)
        return linear(x, weight, layer.bias)


def with_torchao(layer: Layer) -> nn.Module:
    """The fake-quantized linear layer of torchao: int4, symmetric, measured by output channel.

    Raises:
        NotHereError: For a convolution.
    """
    with _quiet():
        from torchao.quantization import quantize_ as prepare_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        if isinstance(layer, nn.Conv2d):
            raise NotHereError("torchao has no fake-quantized convolution")
        int4 = getattr(torch, "int4")  # noqa: B009 -- torch's stubs do not list it
        weights = IntxFakeQuantizeConfig(int4, granularity="per_channel", is_symmetric=True)
        model = nn.Sequential(layer)
        prepare_(model, QATConfig(weight_config=weights, step="prepare"))
        return model[0]


def with_brevitas(layer: Layer) -> nn.Module:
    """Brevitas' layer with 2-bit weights and its default scale, from the largest magnitude."""
    with _quiet():
        from brevitas.nn import QuantConv2d, QuantLinear

        has_bias = layer.bias is not None
        quantized: nn.Module
        if isinstance(layer, nn.Conv2d):
            quantized = QuantConv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                stride=layer.stride,
                padding=layer.padding,
                bias=has_bias,
                weight_bit_width=2,
            )
        else:
            quantized = QuantLinear(
                layer.in_features, layer.out_features, bias=has_bias, weight_bit_width=2
            )
        return quantized.to(layer.weight.device)


def _with(quantizer: Quantizer) -> Make:
    return lambda layer: quantize_(nn.Sequential(layer), quantizer, lambda *_: True)[0]


FLOAT = "float"
LAYERS: dict[str, Make] = {
    FLOAT: lambda layer: layer,
    "fogzo.fixed(2)": _with(fixed(2)),
    "fogzo.lsq(2)": _with(lsq(2)),
    "fogzo.lsq(4), channel": _with(lsq(4, granularity="channel")),
    "fogzo.abs_max(4), channel": _with(abs_max(4, granularity="channel")),
    "fogzo.abs_max(2)": _with(abs_max(2)),
    "chain of torch operations": Chain,
    "torchao, int4, channel": with_torchao,
    "brevitas, 2 bits": with_brevitas,
}
"""How to quantize a layer, by name; `FLOAT` leaves it as it is."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of other libraries at their import."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
