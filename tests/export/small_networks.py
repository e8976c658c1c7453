"""Small networks of the four families, with an input of each."""

import torch
from torch import nn

import fogzo


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=8,
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            layer_type="basic",
        )
    )


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            num_channels=4,
            image_size=16,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
        )
    )


def llama(width=32, tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
    )


NETWORKS = {"mlp": mlp, "resnet": resnet, "vit": vit, "llama": llama}


def example(name):
    generator = torch.Generator().manual_seed(1)
    match name:
        case "llama":
            return torch.randint(0, 48, (2, 12), generator=generator)
        case "mlp":
            return torch.randn(3, 1, 8, 8, generator=generator)
        case "vit":
            return torch.randn(2, 4, 16, 16, generator=generator)
    return torch.randn(2, 8, 32, 32, generator=generator)


def quantized(network, quantizer, activations=None, **options):
    """A network in eval mode, inputs calibrated, with every linear layer and convolution."""
    model = seeded(NETWORKS[network])
    fogzo.quantize_(model, quantizer, is_no_embedding, activations=activations, **options)
    if activations is not None:
        with torch.no_grad(), fogzo.calibrate_(model.train()):
            model(example(network))
    return model.eval()


def is_no_embedding(module, name):
    return not isinstance(module, nn.Embedding)


def logits(model, x):
    with torch.no_grad():
        output = model(x)
    return getattr(output, "logits", output)
