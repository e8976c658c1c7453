"""Small networks of every family, quantized and ready to be exported."""

import warnings

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import fogzo
from fogzo.export.source import Options, Source


def llama(**changes):
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()


def tied_llama(**changes):
    return llama(tie_word_embeddings=True, **changes)


def grouped_query_llama(**changes):
    return llama(num_key_value_heads=2, **changes)


def vit(**changes):
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "num_channels": 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(**shape | changes)).eval()


def inputs_of(model):
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, LlamaForCausalLM):
        return torch.randint(0, model.config.vocab_size, (2, 16), generator=generator)
    if isinstance(model, ViTForImageClassification):
        return torch.randn(3, 1, 16, 16, generator=generator)
    return torch.randn(8, 64, generator=generator)


def inner_linear(module, name):
    return isinstance(module, nn.Linear) and name not in ("lm_head", "classifier")


def quantized(model, quantizer, activations=None, filter_fn=inner_linear):
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
