"""The networks of the recipes: transformers configs, quantized as a run's config says."""

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fogzo import calibrate_, quantize_
from fogzo.layers.selection import output_dim
from fogzo_lab.system.devices import drawing_gpus
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.model_config import (
    DeitConfig,
    LlamaConfig,
    MlpConfig,
    ModelConfig,
    ResNetConfig,
)

# By name, as importing the classes would take seconds.
_BLOCKS = {"LlamaDecoderLayer", "ViTLayer", "ResNetBasicLayer", "ResNetBottleNeckLayer"}


@dataclass(frozen=True)
class Shapes:
    """The shapes of the data that a network depends on."""

    num_outputs: int
    """Classes, or tokens of the vocabulary."""
    channels: int = 1
    image_size: int = 0
    """Pixels per side."""
    context: int = 0
    """Tokens per block of text."""


def build_model(config: TrainConfig, shapes: Shapes) -> nn.Module:
    """The quantized network of a run, with initial weights that depend only on the seed.

    Raises:
        ValueError: If the data do not fit the network, or there is nothing to quantize.
    """
    with torch.random.fork_rng(drawing_gpus()):
        torch.manual_seed(config.seed)  # noqa: TID251 -- initial weights only, and given back
        try:
            model = float_model(config.model, shapes)
        except (RuntimeError, MemoryError, OverflowError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"this network cannot be built here ({reason:.200}): give smaller --model sizes"
            ) from error
    weights = config.quantizer.build()
    if weights is not None:
        chosen = _layers_to_quantize(config, model)
        if all(isinstance(layer, nn.Embedding) for layer in chosen):
            raise ValueError(
                "between the first and the last layer there is nothing to quantize: add "
                "--quantize-first or --quantize-last, or a hidden layer"
            )
        if config.method.name != "parq":
            quantize_(
                model,
                weights,
                lambda module, _: module in chosen,
                activations=config.activations.build_for_inputs(),
            )
    return model


def weights_to_quantize(config: TrainConfig, model: nn.Module) -> list[nn.Parameter]:
    """The weights of a float network that a run's config means to be quantized."""
    return [layer.get_parameter("weight") for layer in _layers_to_quantize(config, model)]


def _layers_to_quantize(config: TrainConfig, model: nn.Module) -> list[nn.Module]:
    layers, (first, last) = _quantizable(model), _first_and_last(model)
    left_out = {first} if not config.quantize_first else set()
    left_out |= {last} if not config.quantize_last else set()
    return [layer for layer in layers if layer not in left_out]


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """The logits of a network that returns them as a tensor or as a transformers output."""
    outputs = model(inputs)
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the network, in order; none in a multilayer perceptron."""
    return [module for module in model.modules() if type(module).__name__ in _BLOCKS]


def checkpoint_blocks_(model: nn.Module) -> None:
    """Store only the inputs of the blocks for the backward pass and recompute the rest.

    Unlike the gradient checkpointing of transformers it also works for ResNets, whose batch norms
    must not count a batch twice.
    """
    for block in blocks(model):
        contexts = partial(_recompute_contexts, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _recompute_contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _spare_buffers(block)


@contextmanager
def _spare_buffers(block: nn.Module) -> Iterator[None]:
    """Let the block update copies of its buffers.

    Copying values back instead would count as an in-place edit of tensors saved by autograd.
    """
    owned = [
        (module, name, buffer)
        for module in block.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    for module, name, buffer in owned:
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in owned:
            module._buffers[name] = buffer


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Tensor, seed: int) -> None:
    """Measure the step sizes of quantized activations on one batch, the same on every rank."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with ExitStack() as spared, torch.random.fork_rng(drawing_gpus()):
        torch.manual_seed(seed)  # noqa: TID251 -- one dropout mask for all ranks, and given back
        for norm in norms:
            spared.enter_context(_spare_buffers(norm))
        spared.enter_context(calibrate_(model))
        model(inputs)


def float_model(config: ModelConfig, shapes: Shapes) -> nn.Module:
    """The network itself, with weights from torch's global generator.

    Raises:
        ValueError: If patches do not tile the images.
    """
    match config:
        case MlpConfig():
            return _mlp(config, shapes)
        case ResNetConfig():
            return _resnet(config, shapes)
        case DeitConfig():
            return _deit(config, shapes)
        case LlamaConfig():
            return _llama(config, shapes)


def _mlp(config: MlpConfig, shapes: Shapes) -> nn.Module:
    widths = [shapes.channels * shapes.image_size**2, *config.hidden, shapes.num_outputs]
    layers: list[nn.Module] = [nn.Flatten()]
    for width, next_width in itertools.pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _resnet(config: ResNetConfig, shapes: Shapes) -> nn.Module:
    from transformers import ResNetConfig as HubConfig
    from transformers import ResNetForImageClassification

    stem = config.widths[0] // (4 if config.bottleneck else 1)
    model = ResNetForImageClassification(
        HubConfig(
            num_channels=shapes.channels,
            id2label=_labels(shapes),
            embedding_size=stem,
            hidden_sizes=list(config.widths),
            depths=list(config.depths),
            layer_type="bottleneck" if config.bottleneck else "basic",
        )
    )
    if config.small_images:
        embeddings = model.resnet.embedder
        embeddings.embedder.convolution = nn.Conv2d(shapes.channels, stem, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(
            embeddings.embedder.convolution.weight, mode="fan_out", nonlinearity="relu"
        )
        setattr(embeddings, "pooler", nn.Identity())  # noqa: B010 -- typed as a pooling
    return model


def _deit(config: DeitConfig, shapes: Shapes) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    if shapes.image_size % config.patch_size:
        fitting = config.patch_size * max(1, shapes.image_size // config.patch_size)
        raise ValueError(
            f"patches of {config.patch_size} pixels do not tile images of {shapes.image_size}: "
            f"--model.patch-size {math.gcd(config.patch_size, shapes.image_size)}, or "
            f"--data.image-size {fitting}"
        )
    return ViTForImageClassification(
        ViTConfig(
            num_channels=shapes.channels,
            image_size=shapes.image_size,
            patch_size=config.patch_size,
            id2label=_labels(shapes),
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            layer_norm_eps=1e-6,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
        )
    )


def _llama(config: LlamaConfig, shapes: Shapes) -> nn.Module:
    from transformers import LlamaConfig as HubConfig
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(
        HubConfig(
            vocab_size=shapes.num_outputs,
            hidden_size=config.width,
            intermediate_size=256 * math.ceil(8 * config.width / 3 / 256),
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            max_position_embeddings=shapes.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    # As in GPT-2 and QuEST: the more blocks add to the residual stream, the smaller their initial
    # output weights.
    for name, param in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(param, std=0.02 / math.sqrt(2 * config.depth))
    return model


def _labels(shapes: Shapes) -> dict[int, str]:
    return {number: str(number) for number in range(shapes.num_outputs)}


def _quantizable(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if output_dim(module) is not None]


def _first_and_last(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The first layer (stem, patch projection or embedding) and the output head."""
    layers = _quantizable(model)
    return layers[0], [layer for layer in layers if isinstance(layer, nn.Linear)][-1]
