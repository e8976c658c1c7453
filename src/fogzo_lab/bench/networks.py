"""The networks whose steps are timed: quantized, each with a loss on one random batch."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fogzo import QuantizedWeight, lsq, quantize_, quantized_weights


@dataclass(frozen=True)
class Network:
    """A model and its loss.

    Attributes:
        name: With its batch.
        model: Quantized.
        batch: How many examples there are.
        loss_of: The loss of the first so many of them.
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
        """What an estimator perturbs."""
        return quantized_weights(self.model)

    @property
    def num_weights(self) -> int:
        """d, how many weights are quantized."""
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
        widths: Of the input, the hidden layers and the output.
        batch: Examples.
        device: Where it computes.
        wrap: What the loss calls instead of the model, for data parallelism.
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
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=blocks,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=length,
            use_cache=False,
        )
    )
    quantize_(model, lsq(bits=2)).to(device)
    tokens = torch.randint(256, (batch, length), device=device)
    name = f"LLaMA of width {width}, {batch} x {length} tokens"
    return Network(
        name, model, batch, lambda n: model(input_ids=tokens[:n], labels=tokens[:n]).loss
    )


def resnet(widths: tuple[int, ...], batch: int, device: torch.device) -> Network:
    """A ResNet of one block a stage, with batch norm, on 32 x 32 images."""
    from transformers import ResNetConfig, ResNetForImageClassification

    model: nn.Module = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=widths[0],
            hidden_sizes=list(widths),
            depths=[1] * len(widths),
            layer_type="basic",
            id2label={label: str(label) for label in range(10)},
        )
    )
    quantize_(model, lsq(bits=2, granularity="channel")).to(device)
    images = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch,), device=device)
    name = f"ResNet up to width {widths[-1]}, batch {batch}"
    return Network(
        name, model, batch, lambda n: model(pixel_values=images[:n], labels=labels[:n]).loss
    )
