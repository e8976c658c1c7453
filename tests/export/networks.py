"""Small networks of the four families, quantized and ready to be exported, with inputs."""

import copy
import json
import warnings
from functools import cache

import torch
from torch import nn

import fogzo
from fogzo.export.source import Options, Source


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def mlp():
    return seeded(
        lambda: nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, 32), nn.ReLU()),
            *(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)),
        )
    )


def resnet():
    return _of_transformers(
        "ResNetForImageClassification",
        num_channels=8,
        embedding_size=16,
        hidden_sizes=(16, 32),
        depths=(1, 1),
        layer_type="basic",
    )


def vit():
    return _of_transformers(
        "ViTForImageClassification",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_channels=4,
    )


def llama(width=64, **changes):
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    }
    return _of_transformers("LlamaForCausalLM", **shape | changes)


def tied_llama(**changes):
    return llama(tie_word_embeddings=True, **changes)


def bert():
    """Its head has a weight of its embedding, and a bias of two names."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return _of_transformers("BertForMaskedLM", **shape, num_hidden_layers=1, vocab_size=32)


def grouped_query_llama(**changes):
    return llama(num_key_value_heads=2, **changes)


def mixtral():
    """Its experts, fused by transformers, are apart on the hub."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 96}
    return _of_transformers("MixtralForCausalLM", **shape, num_hidden_layers=1)


NETWORKS = {"mlp": mlp, "resnet": resnet, "vit": vit, "llama": llama}


def _of_transformers(name, **shape):
    return copy.deepcopy(_built(name, json.dumps(shape)))  # to copy is faster than to build


@cache
def _built(name, shape):
    import transformers

    cls = getattr(transformers, name)
    return seeded(lambda: cls(cls.config_class(**json.loads(shape))))


def inputs_of(model):
    """A batch that the network takes."""
    generator = torch.Generator().manual_seed(1)
    config = getattr(model, "config", None)
    if hasattr(config, "vocab_size"):
        return torch.randint(0, config.vocab_size, (2, 16), generator=generator)
    if config is not None:
        size = getattr(config, "image_size", 32)
        return torch.randn(2, config.num_channels, size, size, generator=generator)
    return torch.randn(8, 64, generator=generator)


def inner(module, name):
    """All layers but embeddings and the heads after them."""
    return not isinstance(module, nn.Embedding) and name not in ("lm_head", "classifier")


def inner_linear(module, name):
    return isinstance(module, nn.Linear) and inner(module, name)


def quantized(model, quantizer, activations=None, filter_fn=inner_linear):
    """The network itself, its inputs calibrated."""
    fogzo.quantize_(model, quantizer, filter_fn, activations)
    if activations is not None:
        with torch.no_grad(), fogzo.calibrate_(model):
            model(inputs_of(model))
    return model


def source_of(model, **options):
    return Source.of(model, Options(**options))


@torch.no_grad()
def logits(model, inputs=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        output = model(inputs_of(model) if inputs is None else inputs)
    return getattr(output, "logits", output)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def weights_are_equal(model, source):
    return all(
        torch.equal(model.get_submodule(name).weight, layer.weight.dequantize())
        for name, layer in source.layers.items()
    )
