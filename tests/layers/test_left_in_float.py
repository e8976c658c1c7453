"""What `quantize_` says of weights that stay in float, and of the layers taken for output heads."""

import warnings

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import fogzo
from fogzo import QuantizedLayer

QUANTIZER = fogzo.lsq(2)


class Experts(nn.Module):
    """Experts in one parameter of three dimensions."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.blocks = nn.ModuleList(
            nn.ParameterDict({"up": torch.randn(4, 16, 8)}) for _ in range(layers)
        )
        self.head = nn.Linear(8, 2)


class Raw(nn.Module):
    """A matrix beside the layers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer, self.mix = nn.Linear(8, 8), nn.Parameter(torch.randn(size, 8))
        self.head = nn.Linear(8, 2)


class Decorated(nn.Module):
    """Large parameters that nobody expects to be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.bag = nn.Embedding(999, 8), nn.EmbeddingBag(999, 8)
        self.pos_embed, self.cls_token = (
            nn.Parameter(torch.randn(1, 99, 8)),
            nn.Parameter(torch.ones(1, 1, 999)),
        )
        self.gamma, self.norm = nn.Parameter(torch.ones(999)), nn.LayerNorm((99, 8))
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 999)


def _named(**layers: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(layers)


def _linears(*names: str, size: int = 8) -> dict[str, nn.Module]:
    return {name: nn.Linear(8, size) for name in names}


def _mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
        )
    )


# A model, and what the warning says of the largest in float.
MOSTLY_FLOAT = {
    "fused experts": (Experts, r"only 2% .*'blocks\.0\.up' and 3 like it \(2,048 weights\)"),
    "a matrix of one's own": (
        lambda: Raw(99),
        r"only 7% .*'mix' \(792 weights\), a parameter of Raw",
    ),
    "a recurrent layer": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 16), nn.Linear(16, 2)),
        r"'1\.weight_hh_l0' \(1,024 weights\), a parameter of LSTM",
    ),
    "attention": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 2)),
        r"only 20% .*'1\.in_proj_weight' .* nn\.MultiheadAttention uses its weights itself",
    ),
}


@pytest.mark.parametrize("make, says", MOSTLY_FLOAT.values(), ids=MOSTLY_FLOAT.keys())
def test_a_model_that_stays_mostly_in_float_says_so(make, says):
    with pytest.warns(UserWarning, match=says) as said:
        fogzo.quantize_(make(), QUANTIZER)
    assert len(said) == 1


def test_a_warning_made_an_error_leaves_the_model_untouched():
    model = Experts()
    with pytest.raises(UserWarning):
        fogzo.quantize_(model, QUANTIZER)
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())
    assert "weight_step" not in " ".join(model.state_dict())


def test_a_filter_knows_what_it_leaves():
    fogzo.quantize_(Experts(), QUANTIZER, lambda module, name: name == "router")
    fogzo.quantize_(_mixtral(), QUANTIZER, lambda module, name: isinstance(module, nn.Linear))


def test_fused_experts_of_transformers_are_not_left_in_float():
    model = fogzo.quantize_(_mixtral(), QUANTIZER)
    assert sum("experts" in weight.name for weight in fogzo.quantized_weights(model)) == 4


def test_attention_is_mentioned_whatever_the_filter():
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 2))
    with pytest.warns(
        UserWarning, match=r"'1\.in_proj_weight', '1\.out_proj\.weight' left in float"
    ):
        fogzo.quantize_(model, QUANTIZER, lambda module, name: name == "0")


# --- heads -------------------------------------------------------------------------------------

DOUBTFUL_HEADS = {
    "hidden layers named fc": (
        lambda: _named(
            **{f"b{i}": _named(**_linears("fc", "up")) for i in range(2)}, **_linears("out")
        ),
        r"'b0\.fc', 'b1\.fc' left in float .*'out', which comes last, is quantized.*name != 'out'",
    ),
    "hidden layers named as the true head": (
        lambda: _named(a=_named(**_linears("fc", "up")), **_linears("fc", size=3)),
        r"'a\.fc' left in float .*'fc', which comes last, is left in float, too.*name != 'fc'",
    ),
    "a hidden classifier": (
        lambda: _named(**_linears("classifier", "up", "logits")),
        r"'classifier' left in float .*'logits', which comes last, is quantized",
    ),
    "a convolution after the last linear layer": (
        lambda: _named(**_linears("time", "mix"), out=nn.Conv2d(8, 3, 1)),
        r"'out', which comes last, is quantized.*name != 'out'",
    ),
    "convolutions alone": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)),
        r"'2', which comes last, is quantized",
    ),
    "a second head of another name": (
        lambda: _named(**_linears("a", "b"), **_linears("head", "head_dist", size=3)),
        r"'head' left in float .*'head_dist', which comes last, is quantized",
    ),
}


@pytest.mark.parametrize("make, says", DOUBTFUL_HEADS.values(), ids=DOUBTFUL_HEADS.keys())
def test_a_doubtful_head_is_named(make, says):
    with pytest.warns(UserWarning, match=says):
        fogzo.quantize_(make(), QUANTIZER)


def test_the_advice_for_a_doubtful_head_works():
    model = _named(**{f"b{i}": _named(**_linears("fc", "up")) for i in range(2)}, **_linears("out"))
    fogzo.quantize_(
        model,
        QUANTIZER,
        filter_fn=lambda module, name: not isinstance(module, torch.nn.Embedding) and name != "out",
    )
    float_layers = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    assert float_layers == ["out"]


def test_hidden_layers_taken_for_heads_count_as_left_in_float():
    model = _named(
        **{f"b{i}": _named(fc=nn.Linear(32, 32)) for i in range(3)}, **_linears("up", "out")
    )
    with pytest.warns(UserWarning) as said:
        fogzo.quantize_(model, QUANTIZER)
    assert "'b0.fc.weight' and 2 like it" in str(said[-1].message)
    assert "taken for an output head by its name" in str(said[-1].message)


# --- models of whose selection nothing is to be said -------------------------------------------

TINY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = LlamaConfig(vocab_size=32, num_key_value_heads=1, pad_token_id=0, **TINY)


def _tied_llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **TINY))


def _auxiliary() -> nn.Module:
    """An auxiliary classifier, as in Inception."""
    return _named(
        **_linears("a"), aux=_named(**_linears("fc", size=5)), **_linears("b"), fc=nn.Linear(8, 5)
    )


QUIET = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)),
    "convolutions and a head": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)
    ),
    "auxiliary classifier": _auxiliary,
    "embeddings, tokens and norms": Decorated,
    "a small matrix beside": lambda: Raw(4),
    "llama": lambda: LlamaForCausalLM(LLAMA),
    "llama, tied": _tied_llama,
    "llama, sequences": lambda: LlamaForSequenceClassification(LLAMA),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(vocab_size=32, **TINY)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **TINY)),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    ),
}


@pytest.mark.parametrize("make", QUIET.values(), ids=QUIET.keys())
def test_nothing_is_said_of_ordinary_models(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fogzo.quantize_(make(), QUANTIZER)
    assert any(isinstance(module, QuantizedLayer) for module in model.modules())
