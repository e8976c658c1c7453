"""The networks whose steps are timed: quantized, each with a loss on one random batch."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fogzo import QuantizedWeight, lsq, quantize_, quantized_weights
from fogzo_lab.training.model_config import LlamaConfig, ResNetConfig
from fogzo_lab.training.models import Shapes, float_model


@dataclass(frozen=True)
class Network:
    """A model and its loss.

    Attributes:
        name: Name, with the batch size.
        model: The quantized network.
        batch: Number of examples.
        loss_of: The loss of the first n examples, for a given n.
    """

    name: str
    model: nn.Module
    batch: int
    loss_of: Callable[[int], Tensor]

    def loss(self) -> Tensor:
        """The loss of the whole batch."""
        return self.loss_of(self.batch)

    @property
    def weights(self) -> list[QuantizedWeight]:
        """The weights that an estimator perturbs."""
        return quantized_weights(self.model)

    @property
    def num_weights(self) -> int:
        """d, the number of quantized weights."""
        return sum(weight.param.numel() for weight in self.weights)

    @property
    def weight_bytes(self) -> int:
        """Memory of the quantized weights."""
        return sum(weight.param.nbytes for weight in self.weights)


def mlp(
    widths: tuple[int, ...],
    batch: int,
    device: torch.device,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Network:
    """A multilayer perceptron, all of it quantized to 2 bits.

    Args:
        widths: Sizes of the input, the hidden layers and the output.
        batch: Number of examples.
        device: Where it computes.
        wrap: Wraps the model that the loss calls, for data parallelism.
    """
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    quantize_(model, lsq(bits=2), lambda module, name: True)
    forward = wrap(model.to(device))
    x = torch.randn(batch, widths[0], device=device)
    y = torch.randint(widths[-1], (batch,), device=device)
    name = f"MLP {'-'.join(map(str, widths))}, batch {batch}"
    return Network(name, model, batch, lambda n: cross_entropy(forward(x[:n]), y[:n]))


def llama(width: int, blocks: int, batch: int, length: int, device: torch.device) -> Network:
    """A byte-level LLaMA with heads of up to 64 channels."""
    config = LlamaConfig(width=width, depth=blocks, heads=max(1, width // 64))
    model = float_model(config, Shapes(num_outputs=256, context=length))
    quantize_(model, lsq(bits=2)).to(device)
    tokens = torch.randint(256, (batch, length), device=device)
    name = f"LLaMA of width {width}, {batch} x {length} tokens"
    return Network(
        name, model, batch, lambda n: model(input_ids=tokens[:n], labels=tokens[:n]).loss
    )


def resnet(widths: tuple[int, ...], batch: int, device: torch.device) -> Network:
    """A ResNet of one block per stage, with batch norm, on 32 x 32 images."""
    config = ResNetConfig(widths=widths, depths=(1,) * len(widths))
    model = float_model(config, Shapes(num_outputs=10, channels=3, image_size=32))
    quantize_(model, lsq(bits=2, granularity="channel")).to(device)
    images = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch,), device=device)
    name = f"ResNet up to width {widths[-1]}, batch {batch}"
    return Network(
        name, model, batch, lambda n: model(pixel_values=images[:n], labels=labels[:n]).loss
    )
