"""Attaching: a layer's own forward sees exactly the quantized weight, and nothing else changes."""

import copy
import io
import logging
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

import fogzo
from fogzo import QuantizedLayer
from toolbox import EVERY_QUANTIZER, PRESETS, draw, everything, fill


class DoubledLinear(nn.Linear):
    """A user's layer, whose forward reads the weight twice and takes an argument of its own."""

    def forward(self, x: Tensor, bonus: float = 0.0) -> Tensor:
        return F.linear(x, self.weight, self.bias) + x @ self.weight.t() + bonus


class Tied(nn.Module):
    """Two layers of one weight between two of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


class TiedOutside(nn.Module):
    """An embedding whose weight a module of one's own reads, or one that sums rows."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.embed, self.reader = nn.Embedding(8, 8), reader
        reader.weight = self.embed.weight


def _mlp() -> nn.Sequential:
    return fill(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 4)))


def _snapshot(model: nn.Module):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    return state, classes, attributes


def _assert_unchanged(model: nn.Module, before) -> None:
    state, classes, attributes = before
    assert [type(module) for module in model.modules()] == classes
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, state[name])


# --- the layers --------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (2, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=1), (2, 8, 5)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 2, padding="same", padding_mode="circular"), (2, 8, 4, 4)),
    "conv2d, depthwise": (lambda: nn.Conv2d(8, 8, (2, 2), groups=8), (2, 8, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(8, 6, 2), (2, 8, 3, 3, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(8, 6, 2), (2, 8, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(8, 6, 2, stride=2), (2, 8, 3, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(8, 6, 2), (1, 8, 3, 3, 3)),
    "transformers conv1d": (lambda: Conv1D(6, 8), (2, 8)),
    "a subclass": (lambda: DoubledLinear(8, 6), (2, 8)),
    "embedding": (lambda: nn.Embedding(10, 8, padding_idx=0), None),
}
EVERY_LAYER = pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS.keys())


@EVERY_LAYER
@EVERY_QUANTIZER
def test_every_layer_uses_exactly_the_quantized_weight(make, shape, quantizer):
    layer = fill(make())
    plain = copy.deepcopy(layer)
    latent, classes = layer.weight, type(layer)
    x = torch.tensor([[0, 3, 9]]) if shape is None else draw(*shape, seed=1)
    fogzo.quantize_(layer, quantizer, everything)

    assert isinstance(layer, classes) and isinstance(layer, QuantizedLayer)
    assert layer.weight is latent and torch.equal(latent, plain.weight)
    dim = 1 if isinstance(layer, Conv1D) or "Transpose" in classes.__name__ else 0
    step = quantizer.initial_step_size(latent, dim)
    quantized = quantizer(latent, step, dim)
    assert not torch.equal(quantized, latent)
    with torch.no_grad():
        plain.weight.copy_(quantized)
    output = layer(x)
    assert torch.equal(output, plain(x))

    # The gradient of the weight the forward used goes through the surrogate to the latent one.
    output.square().sum().backward()
    plain(x).square().sum().backward()
    own = latent.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(quantizer(own, step, dim), own, plain.weight.grad)
    assert torch.allclose(latent.grad, expected, rtol=1e-5, atol=1e-6)
    assert layer.weight is latent and "weight" not in vars(layer)


def test_arguments_of_a_subclass_reach_its_forward():
    layer, x = fogzo.quantize_(fill(DoubledLinear(4, 4)), fogzo.lsq(2), everything), draw(2, 4)
    assert torch.equal(layer(x, bonus=1.5), layer(x) + 1.5)


def test_a_forward_that_raises_gives_the_latent_weight_back():
    layer = fogzo.quantize_(fill(nn.Linear(4, 4)), fogzo.lsq(2), everything)
    with pytest.raises(RuntimeError):
        layer(draw(2, 5))
    assert isinstance(layer.weight, nn.Parameter) and "weight" not in vars(layer)


def test_hooks_and_training_mode_stay():
    model, seen = _mlp().eval(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(module))
    fogzo.quantize_(model, fogzo.lsq(2))
    model(draw(2, 8))
    assert seen == [model[0]] and not model[0].training


def test_quantize_returns_the_model_itself():
    model = _mlp()
    assert fogzo.quantize_(model, fogzo.lsq(2)) is model


# --- ties --------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [fogzo.lsq(2), fogzo.fixed(2)], ids=["learned", "fixed"])
def test_tied_weights_stay_tied_and_share_their_step(quantizer):
    model = fogzo.quantize_(fill(Tied()), quantizer)
    assert model.first.weight is model.second.weight
    assert model.first.weight_step is model.second.weight_step
    names = [name for name, _ in model.named_parameters()]
    assert "first.weight" in names and "second.weight" not in names
    assert "second.weight_step" not in names
    assert [record.name for record in fogzo.quantized_weights(model)] == ["first.weight"]


def test_a_shared_learned_step_gets_the_gradients_of_both_uses():
    model, x = fogzo.quantize_(fill(Tied()), fogzo.lsq(2)), draw(4, 8)
    untied = copy.deepcopy(model)
    untied.second.weight = nn.Parameter(untied.first.weight.detach().clone())
    untied.second.weight_step = nn.Parameter(untied.first.weight_step.detach().clone())
    model(x).sum().backward()
    untied(x).sum().backward()
    for name in ("weight", "weight_step"):
        both = getattr(untied.first, name).grad + getattr(untied.second, name).grad
        assert torch.allclose(getattr(model.first, name).grad, both, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_ties_survive_copies(copied):
    model = copied(fogzo.quantize_(fill(Tied()), fogzo.lsq(2)))
    assert model.first.weight is model.second.weight
    assert model.first.weight_step is model.second.weight_step


@EVERY_QUANTIZER  # a dynamic scale would find another step in weights that are baked already
def test_a_tied_layer_bakes_in_once(quantizer):
    model, x = fogzo.quantize_(fill(Tied()), quantizer), draw(4, 8)
    before = model(x)
    fogzo.dequantize_(model)
    assert model.first.weight is model.second.weight
    assert torch.equal(model(x), before)


def _tied_autoencoder() -> nn.Sequential:
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ConvTranspose1d(6, 4, 3))
    model[1].weight = model[0].weight
    return fill(model)


def test_one_step_serves_a_tie_between_layouts():
    """The weight of a transposed convolution has its outputs in another dimension."""
    model, x = fogzo.quantize_(_tied_autoencoder(), fogzo.lsq(2), everything), draw(1, 4, 9)
    assert torch.equal(model[0].quantized_weight(), model[1].quantized_weight())
    before = model(x)
    assert torch.equal(fogzo.dequantize_(model)(x), before)


@pytest.mark.parametrize("quantizer", [fogzo.lsq(2, granularity="channel"), fogzo.quest(2)])
def test_steps_of_channels_cannot_serve_a_tie_between_layouts(quantizer):
    model = _tied_autoencoder()
    before = _snapshot(model)
    with pytest.raises(ValueError, match=r'granularity="tensor" without rotation'):
        fogzo.quantize_(model, quantizer)
    _assert_unchanged(model, before)


@pytest.mark.parametrize("reader", [nn.Module, partial(nn.EmbeddingBag, 8, 8)])
def test_the_advice_for_a_tie_with_what_stays_in_float_works(reader):
    model = fill(TiedOutside(reader()))
    with pytest.raises(ValueError, match=r"'embed' shares.*'reader', which.*in float.*clone\(\)\)"):
        fogzo.quantize_(model, fogzo.lsq(2), everything)
    module = model.get_submodule("reader")
    module.weight = torch.nn.Parameter(module.weight.detach().clone())
    fogzo.quantize_(model, fogzo.lsq(2), everything)


# --- the default selection ---------------------------------------------------------------------


def _quantized_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]


def _llama(tied: bool = False) -> nn.Module:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    return fill(LlamaForCausalLM(config))


def _gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=16,
        n_positions=16,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return fill(GPT2LMHeadModel(config))


def _vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    return fill(ViTForImageClassification(config))


def test_the_last_linear_of_a_plain_model_stays():
    assert _quantized_names(fogzo.quantize_(_mlp(), fogzo.lsq(2))) == ["0", "2"]


def test_embeddings_and_named_heads_stay():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 8), "body": nn.Linear(8, 8)})
    model["fc"] = nn.Linear(8, 8)
    assert _quantized_names(fogzo.quantize_(model, fogzo.lsq(2))) == ["body"]


def test_a_head_tied_to_its_embedding_stays_whatever_its_name():
    model = nn.ModuleDict({"tokens": nn.Embedding(4, 8), "out": nn.Linear(8, 4)})
    model["body"], model["after"] = nn.Linear(8, 8), nn.Linear(8, 8)
    model["out"].weight = model["tokens"].weight
    assert _quantized_names(fogzo.quantize_(model, fogzo.lsq(2))) == ["body"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_keeps_its_embedding_and_head(tied):
    model = fogzo.quantize_(_llama(tied), fogzo.lsq(2))
    layer = "model.layers.0."
    assert _quantized_names(model) == [
        *(f"{layer}self_attn.{name}_proj" for name in "qkvo"),
        *(f"{layer}mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]


def test_a_gpt2_keeps_its_embeddings_and_tied_head():
    model = fogzo.quantize_(_gpt2(), fogzo.quest(2))
    assert _quantized_names(model) == [
        f"transformer.h.0.{name}"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_a_vit_keeps_its_classifier():
    model = fogzo.quantize_(_vit(), fogzo.lsq(2))
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, QuantizedLayer)
    ]
    assert plain == ["classifier"]
    # query, key, value, output, two of the MLP, and the convolution that embeds the patches
    assert len(_quantized_names(model)) == 7


@pytest.mark.parametrize("make", [_llama, _gpt2, _vit], ids=["llama", "gpt2", "vit"])
@pytest.mark.parametrize("quantizer", [fogzo.lsq(2), fogzo.quest(2)], ids=["lsq", "quest"])
def test_transformers_train_and_bake_in_exactly(make, quantizer):
    model = fogzo.quantize_(make(), quantizer).eval()
    if isinstance(model, ViTForImageClassification):
        inputs = {"pixel_values": draw(2, 1, 8, 8), "labels": torch.tensor([0, 1])}
    else:
        tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
        inputs = {"input_ids": tokens, "labels": tokens}
    model(**inputs).loss.backward()
    for record in fogzo.quantized_weights(model):
        assert record.param.grad.isfinite().all() and record.param.grad.any()
    with torch.no_grad():
        before = model(**inputs).logits
        assert torch.equal(fogzo.dequantize_(model)(**inputs).logits, before)


def test_a_filter_decides_alone():
    model = _mlp()
    fogzo.quantize_(model, fogzo.lsq(2), lambda module, name: name == "3")
    assert _quantized_names(model) == ["3"]


def test_two_quantizers_may_share_a_model():
    model = _mlp()
    fogzo.quantize_(model, fogzo.lsq(2), lambda module, name: name == "0")
    fogzo.quantize_(model, fogzo.lsq(8), lambda module, name: name == "2")
    assert [model[i].quantizer.grid.bits for i in (0, 2)] == [2, 8]


def test_multihead_attention_is_left_alone_with_a_warning():
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 2))
    with pytest.warns(UserWarning, match=r"'1\.in_proj_weight'.*nn\.MultiheadAttention"):
        fogzo.quantize_(model, fogzo.lsq(2), everything)
    assert _quantized_names(model) == ["0", "2"]


def test_the_log_says_what_was_quantized_and_what_was_not(caplog):
    with caplog.at_level(logging.INFO, logger="fogzo"):
        fogzo.quantize_(_mlp(), fogzo.lsq(2))
    assert "quantized 0, 2; left alone 3" in caplog.text


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoders_evaluate_on_quantized_weights(padded):
    """In eval mode, torch's fused encoder would read the latent weights past the forward."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 2))
    with pytest.warns(UserWarning, match=r"in_proj_weight.*nn\.MultiheadAttention"):
        fogzo.quantize_(fill(model), fogzo.lsq(2))
    x, mask = draw(2, 3, 8), torch.tensor([[False, False, True], [False] * 3]) if padded else None
    trained = model[0](x, src_key_padding_mask=mask).detach()
    with torch.no_grad():
        evaluated = model.eval()[0](x, src_key_padding_mask=mask)
        assert torch.allclose(evaluated, trained, atol=1e-5)
        baked = fogzo.dequantize_(model)[0](x, src_key_padding_mask=mask)
    if mask is not None:  # where torch's fast path, which is back, has zeros
        evaluated = evaluated.masked_fill(mask.unsqueeze(-1), 0.0)
    assert torch.allclose(baked, evaluated, atol=1e-5)


@pytest.mark.parametrize("activations", ["drop", "keep"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_encoders_have_their_fast_path_back_once_nothing_is_quantized(activations, copied):
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    with pytest.warns(UserWarning, match=r"nn\.MultiheadAttention"):
        fogzo.quantize_(model, fogzo.lsq(2), lambda m, n: n.endswith("linear1"), fogzo.abs_max(8))
        fogzo.quantize_(model, fogzo.lsq(2), lambda m, n: n.endswith("linear2"))
    fogzo.dequantize_(model := copied(model), activations)
    found = [layer.activation_relu_or_gelu for layer in model.layers], model.use_nested_tensor
    assert found == (([2, 2], True) if activations == "drop" else ([0, 0], False))


# --- records -----------------------------------------------------------------------------------


@EVERY_QUANTIZER
def test_records_name_the_weights_and_their_steps(quantizer):
    model = fogzo.quantize_(_mlp(), quantizer)
    records = fogzo.quantized_weights(model)
    assert [record.name for record in records] == ["0.weight", "2.weight"]
    for record, layer in zip(records, (model[0], model[2]), strict=True):
        assert record.param is layer.weight and record.model is model
        assert record.surrogate == quantizer.surrogate
        step = record.step_size()
        assert torch.broadcast_shapes(step.shape, layer.weight.shape) == layer.weight.shape
        assert not step.requires_grad
        assert torch.equal(record.codes(), layer.codes())
        rotate = record.rotate or (lambda tensor: tensor)
        if quantizer.companding is not None:
            step = layer.weight_step  # of levels, which are not cells there
        dequantized = rotate(quantizer.grid.level(record.codes().float()) * step)
        assert torch.allclose(dequantized, layer.quantized_weight(), atol=1e-6)
        assert (record.rotate is None) == (quantizer.rotation is None)


def test_records_follow_the_learned_step():
    model = fogzo.quantize_(_mlp(), fogzo.lsq(2))
    (record, _) = fogzo.quantized_weights(model)
    with torch.no_grad():
        model[0].weight_step.mul_(2)
    assert torch.equal(record.step_size(), model[0].weight_step.detach().reshape(()))


def test_a_single_layer_has_a_record_named_weight():
    layer = fogzo.quantize_(nn.Linear(4, 4), fogzo.lsq(2), everything)
    assert [record.name for record in fogzo.quantized_weights(layer)] == ["weight"]


def test_a_float_model_has_no_records():
    assert fogzo.quantized_weights(_mlp()) == []


@pytest.mark.parametrize("quantizer", [fogzo.quest(2), fogzo.ternary()], ids=["quest", "ternary"])
def test_a_dynamic_step_that_is_held_stays_while_the_weight_moves(quantizer):
    model = fogzo.quantize_(_mlp(), quantizer)
    (record, _) = fogzo.quantized_weights(model)
    before = record.step_size()
    with torch.no_grad(), record.hold_step_size():
        record.param.mul_(3)
        assert torch.equal(record.step_size(), before)
        frozen = quantizer(record.param, before.reshape(-1, 1))
        assert torch.equal(model[0].quantized_weight(), frozen)
    assert torch.allclose(record.step_size(), 3 * before)


def test_held_steps_reach_every_layer_of_a_tie():
    model, x = fogzo.quantize_(fill(Tied()), fogzo.ternary()), draw(2, 8)
    (record,) = fogzo.quantized_weights(model)
    with torch.no_grad(), record.hold_step_size():
        record.param.mul_(1.5)
        assert torch.equal(model.first.quantized_weight(), model.second.quantized_weight())
        model(x)
    assert model.first._held_step_size is None and model.second._held_step_size is None


# --- copies, checkpoints, moves ----------------------------------------------------------------


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@EVERY_QUANTIZER
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_exact_and_independent(quantizer, copied):
    model = nn.Sequential(DoubledLinear(8, 8), nn.Conv1d(8, 8, 1), nn.Linear(1, 1))
    fogzo.quantize_(fill(model), quantizer, lambda module, name: name != "2")
    twin, x = copied(model), draw(8, 8)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(twin[:2](x), model[:2](x))
    for (name, ours), (other, theirs) in zip(
        model.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    assert [r.name for r in fogzo.quantized_weights(twin)] == ["0.weight", "1.weight"]
    assert type(fogzo.dequantize_(twin)[0]) is DoubledLinear


@EVERY_QUANTIZER
def test_a_state_dict_round_trip_is_exact(quantizer):
    model, x = fogzo.quantize_(_mlp(), quantizer), draw(4, 8)
    with torch.no_grad():  # a step as training leaves it, not as a measurement would find it
        for name, tensor in model.state_dict().items():
            if name.endswith("weight_step"):
                tensor.mul_(1.37)
    other = fogzo.quantize_(fill(_mlp(), seed=9), quantizer)
    assert not torch.equal(other(x), model(x))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("shape", [(16, 6), (), (16,)])
def test_a_checkpoint_of_other_shapes_is_refused_by_torch(shape):
    model = fogzo.quantize_(_mlp(), fogzo.lsq(2, granularity=4))
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        model.load_state_dict({"0.weight": torch.ones(shape)}, strict=False)


@EVERY_QUANTIZER
def test_a_float_checkpoint_measures_the_steps_anew(quantizer):
    x, checkpoint = draw(4, 8), fill(_mlp(), seed=9, std=1.5).state_dict()
    keys = set(checkpoint)
    model = fogzo.quantize_(_mlp(), quantizer)
    model.load_state_dict(checkpoint)
    fresh = _mlp()
    fresh.load_state_dict(checkpoint)
    assert torch.equal(model(x), fogzo.quantize_(fresh, quantizer)(x))
    assert set(checkpoint) == keys


def test_names_of_the_float_model_are_kept():
    plain = set(_mlp().state_dict())
    assert set(fogzo.quantize_(_mlp(), fogzo.quest(2)).state_dict()) == plain
    learned = set(fogzo.quantize_(_mlp(), fogzo.lsq(2)).state_dict())
    kept = {f"{i}.{name}" for i in (0, 2) for name in ("weight_step", "weight_step_knee")}
    assert learned == plain | kept


def test_only_learned_steps_are_parameters():
    assert isinstance(fogzo.quantize_(_mlp(), fogzo.lsq(2))[0].weight_step, nn.Parameter)
    fixed = fogzo.quantize_(_mlp(), fogzo.fixed(2))[0]
    assert "weight_step" in dict(fixed.named_buffers())
    assert fogzo.quantize_(_mlp(), fogzo.ternary())[0].weight_step is None


@EVERY_QUANTIZER
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_models_move_to_other_dtypes(quantizer, dtype):
    model, x = fogzo.quantize_(_mlp(), quantizer), draw(4, 8)
    before = model(x)
    model.to(dtype)
    output = model(x.to(dtype))
    assert output.dtype == dtype and model[0].quantized_weight().dtype == dtype
    if dtype == torch.float64:
        assert torch.allclose(output.float(), before, atol=1e-5)
    output.sum().backward()
    assert model[0].weight.grad.isfinite().all()


@EVERY_QUANTIZER
def test_models_quantized_in_bfloat16_run_and_bake_in(quantizer):
    model, x = fogzo.quantize_(_mlp().bfloat16(), quantizer), draw(4, 8).bfloat16()
    before = model(x)
    assert torch.equal(fogzo.dequantize_(model)(x), before)


@EVERY_QUANTIZER
def test_autocast_rounds_activations_but_not_latent_weights(quantizer):
    model, x = fogzo.quantize_(_mlp(), quantizer), draw(4, 8)
    exact = model[0].quantized_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[0].quantized_weight(), exact)
        assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("preset", ["lsq per group", "quest"])
def test_the_compiled_model_agrees(preset):
    torch.compiler.reset()
    model, x = fogzo.quantize_(_mlp(), PRESETS[preset]()), draw(4, 8)
    output = model(x)
    output.square().sum().backward()
    expected = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    compiled.square().sum().backward()
    assert torch.allclose(compiled, output, rtol=1e-6, atol=1e-7)
    for name, param in model.named_parameters():
        assert torch.allclose(param.grad, expected[name], rtol=1e-5, atol=1e-6), name


def test_a_model_is_compiled_that_has_never_run():
    torch.compiler.reset()
    quantizer = fogzo.lsq(2, surrogate="tanh")
    quantizer = replace(quantizer, grid=replace(quantizer.grid, name="no other layer's"))
    model, x = fogzo.quantize_(_mlp(), quantizer), draw(4, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
    assert torch.equal(compiled, model(x))


@pytest.mark.parametrize("inputs", [None, fogzo.lsq(4)], ids=["float", "quantized"])
def test_a_model_is_compiled_once_for_batches_of_any_size(inputs):
    torch.compiler.reset()
    model = fill(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))))
    fogzo.quantize_(model, fogzo.fixed(2), everything, activations=inputs)
    model(draw(4, 8))
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for rows in (4, 6):
        with torch.compiler.set_stance("default" if rows == 4 else "fail_on_recompile"):
            assert torch.equal(compiled(draw(rows, 8)), model(draw(rows, 8)))


# --- dequantize_ and repr ----------------------------------------------------------------------


@EVERY_LAYER
@EVERY_QUANTIZER
def test_dequantize_leaves_the_original_class_and_the_same_outputs(make, shape, quantizer):
    layer = fill(make())
    original, attributes, keys = type(layer), sorted(vars(layer)), list(layer.state_dict())
    x = torch.tensor([[0, 3, 9]]) if shape is None else draw(*shape, seed=1)
    before = fogzo.quantize_(layer, quantizer, everything)(x)
    assert fogzo.dequantize_(layer) is layer
    assert type(layer) is original
    assert sorted(vars(layer)) == attributes and list(layer.state_dict()) == keys
    assert torch.equal(layer(x), before)


def test_a_baked_model_can_be_quantized_again():
    model = fogzo.dequantize_(fogzo.quantize_(_mlp(), fogzo.lsq(2)))
    assert _quantized_names(fogzo.quantize_(model, fogzo.lsq(4))) == ["0", "2"]


def _with_quantized_inputs(activations=None):
    model = fogzo.quantize_(_mlp(), fogzo.lsq(2), activations=activations or fogzo.lsq(4))
    with torch.no_grad(), fogzo.calibrate_(model):
        model(draw(5, 8))
    return model.eval()


def test_dequantize_says_that_it_drops_quantized_inputs(caplog):
    model = _with_quantized_inputs()
    x = draw(5, 8)
    before = model(x)
    fogzo.dequantize_(model)
    assert "the inputs of '0', '2' are no longer quantized" in caplog.text
    assert [type(layer) for layer in model] == [type(layer) for layer in _mlp()]
    assert not torch.equal(model(x), before)


def test_dequantize_drops_quantized_inputs_in_silence_where_that_is_meant(caplog):
    fogzo.dequantize_(_with_quantized_inputs(), activations="drop")
    fogzo.dequantize_(fogzo.quantize_(_mlp(), fogzo.lsq(2)))
    assert caplog.text == ""


@pytest.mark.parametrize(
    "activations", [fogzo.lsq(4), fogzo.abs_max(8, granularity="token"), fogzo.quest(4)]
)
def test_dequantize_can_keep_quantized_inputs(activations, caplog):
    model = _with_quantized_inputs(activations)
    x = draw(5, 8)
    before, weights = model(x), [model[i].quantized_weight() for i in (0, 2)]
    assert fogzo.dequantize_(model, activations="keep") is model
    assert caplog.text == ""
    assert not any(isinstance(layer, QuantizedLayer) for layer in model)
    assert all(torch.equal(model[i].weight, w) for i, w in zip((0, 2), weights, strict=True))
    for baked in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(baked(x), before)
    steps = [name for name in model.state_dict() if "input_step" in name]
    assert bool(steps) == activations.scale.has_state
    with fogzo.calibrate_(model):  # they are still quantized inputs
        model(x)
    with pytest.raises(ValueError, match="nothing in this model is quantized"):
        fogzo.dequantize_(model)


def test_dequantize_keeps_layers_without_quantized_inputs_plain():
    model = fogzo.dequantize_(fogzo.quantize_(_mlp(), fogzo.lsq(2)), activations="keep")
    assert [type(layer) for layer in model] == [type(layer) for layer in _mlp()]


def test_dequantize_explains_what_it_can_do_with_inputs():
    with pytest.raises(ValueError, match='activations must be "drop" or "keep", got True'):
        fogzo.dequantize_(_with_quantized_inputs(), activations=True)


def test_dequantizing_a_float_model_is_refused():
    model = _mlp()
    before = _snapshot(model)
    with pytest.raises(ValueError, match=r"fogzo\.quantize_\(model, fogzo\.lsq\(bits=2\)\)"):
        fogzo.dequantize_(model)
    _assert_unchanged(model, before)


@EVERY_LAYER
def test_printing_shows_the_quantizer(make, shape):
    layer = make()
    plain = repr(layer)
    text = repr(fogzo.quantize_(layer, fogzo.sign(), everything))
    assert text.startswith("Quantized" + plain[:-1])
    assert text.endswith("sign, dynamic scale per channel, hardtanh)")
    assert "Quantized" not in repr(fogzo.dequantize_(layer))


def test_printing_a_model_shows_which_layers_are_quantized():
    text = repr(fogzo.quantize_(_mlp(), fogzo.lsq(2)))
    assert text.count("uniform2-half, learned scale per tensor, identity") == 2


# --- refusals ----------------------------------------------------------------------------------


def _integer_model() -> nn.Module:
    model = _mlp()
    model[2].weight = nn.Parameter(torch.ones(8, 12, dtype=torch.int8), requires_grad=False)
    return model


def _meta_model() -> nn.Module:
    model = _mlp()
    model[2] = nn.Linear(12, 8, device="meta")
    return model


def _odd_model() -> nn.Module:
    return fill(nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8), nn.Linear(8, 4)))


def _half_quantized() -> nn.Module:
    return fogzo.quantize_(_mlp(), fogzo.lsq(2), lambda module, name: name == "2")


def _with_kept_inputs() -> nn.Module:
    model = fogzo.quantize_(_mlp(), fogzo.lsq(2), activations=fogzo.abs_max(8))
    return fogzo.dequantize_(model, activations="keep")


REFUSALS = {
    "no bits": (_mlp, lambda m: fogzo.quantize_(m, fogzo.lsq(0)), r"fogzo\.fixed\(bits=2\)"),
    "nine bits": (_mlp, lambda m: fogzo.quantize_(m, fogzo.fixed(9)), r"fogzo\.fixed\(bits=2\)"),
    "group size": (  # 8 divides the inputs of the first layer, not of the second
        _mlp,
        lambda m: fogzo.quantize_(m, fogzo.lsq(2, granularity=8)),
        r"'2'.*use granularity=6",
    ),
    "group size of a dynamic scale": (
        _mlp,
        lambda m: fogzo.quantize_(m, fogzo.ternary(granularity=8)),
        r"'2'.*use granularity=6",
    ),
    "unknown surrogate": (
        _mlp,
        lambda m: fogzo.quantize_(m, fogzo.lsq(2, surrogate="tahn")),
        r'surrogate="tanh"',
    ),
    "odd size for a rotation": (
        _odd_model,
        lambda m: fogzo.quantize_(m, fogzo.quest(2)),
        r"'1'.*filter_fn",
    ),
    "quantized already": (
        _half_quantized,
        lambda m: fogzo.quantize_(m, fogzo.lsq(2)),
        r"'2' is quantized already.*filter_fn=lambda module, name: name in \{\.\.\.\}",
    ),
    "inputs quantized already": (
        _with_kept_inputs,
        lambda m: fogzo.quantize_(m, fogzo.lsq(2)),
        r"'0' still quantizes its input.*dequantize_\(model, activations=\"drop\"\)",
    ),
    "empty filter": (
        _mlp,
        lambda m: fogzo.quantize_(m, fogzo.lsq(2), lambda module, name: False),
        r"filter_fn returned False.*filter_fn=lambda module, name: True",
    ),
    "only a head": (
        lambda: fill(nn.Sequential(nn.Linear(4, 4))),
        lambda m: fogzo.quantize_(m, fogzo.lsq(2)),
        r"default filter.*filter_fn=lambda module, name: True",
    ),
    "a lone head": (
        lambda: fill(nn.Linear(4, 4)),
        lambda m: fogzo.quantize_(m, fogzo.lsq(2)),
        r"selected out of the model, a Linear \(the default filter",
    ),
    "nothing to quantize": (
        lambda: nn.Sequential(nn.LayerNorm(4)),
        lambda m: fogzo.quantize_(m, fogzo.lsq(2)),
        r"no layer that can be quantized: Linear, Conv1d",
    ),
    "half a tie": (
        lambda: fill(Tied()),
        lambda m: fogzo.quantize_(m, fogzo.lsq(2), lambda module, name: name == "first"),
        r"'first' shares its weight with 'second'.*return True for both",
    ),
    "a tie with a module of one's own": (
        lambda: fill(TiedOutside(nn.Module())),
        lambda m: fogzo.quantize_(m, fogzo.lsq(2), everything),
        r"'embed' shares its weight with 'weight' of 'reader', which.*leave the weight out",
    ),
    "integer weights": (
        _integer_model,
        lambda m: fogzo.quantize_(m, fogzo.lsq(2)),
        r"'2\.weight' holds torch\.int8.*quantize the float model",
    ),
    "meta device": (
        _meta_model,
        lambda m: fogzo.quantize_(m, fogzo.lsq(2)),
        r'model\.to_empty\(device="cpu"\)',
    ),
    "sparse gradients": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4, sparse=True)),
        lambda m: fogzo.quantize_(m, fogzo.lsq(2), everything),
        r"'1'.*nn\.Embedding\(\.\.\., sparse=False\)",
    ),
    "names for a filter": (
        _mlp,
        lambda m: fogzo.quantize_(m, fogzo.lsq(2), ["0"]),
        r"filter_fn must be a function .* got \['0'\]: .*filter_fn=lambda module, name: name in",
    ),
    "a filter of names alone": (
        _mlp,
        lambda m: fogzo.quantize_(m, fogzo.lsq(2), lambda name: name == "0"),
        r"got one of \(name\): .*filter_fn=lambda module, name: name in",
    ),
    "a class for a filter": (
        _mlp,
        lambda m: fogzo.quantize_(m, fogzo.lsq(2), nn.Linear),
        r"got <class 'torch\.nn\.modules\.linear\.Linear'>: .*filter_fn=lambda module, name:",
    ),
    "inference mode": (
        _mlp,
        lambda m: torch.inference_mode()(fogzo.quantize_)(m, fogzo.lsq(2)),
        r"outside of it, or under torch\.no_grad\(\)",
    ),
    "levels of inputs": (  # a grid of one's own without negative levels is one's own decision
        _mlp,
        lambda m: fogzo.quantize_(m, fogzo.lsq(2, levels="unsigned")),
        r"uniform2-unsigned are for inputs.*activations=fogzo\.lsq\(2, levels=\"unsigned\"\)",
    ),
    "not a quantizer": (
        _mlp,
        lambda m: fogzo.quantize_(m, fogzo.lsq),
        r"fogzo\.quantize_\(model, fogzo\.lsq\(bits=2\)\)",
    ),
}


@pytest.mark.parametrize("make, call, advice", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_shows_the_corrected_call_and_changes_nothing(make, call, advice):
    model = make()
    before = _snapshot(model)
    with pytest.raises(ValueError, match=advice):
        call(model)
    _assert_unchanged(model, before)


ENTRIES = {
    "quantize_": lambda given: fogzo.quantize_(given, fogzo.lsq(2)),
    "quantized_weights": fogzo.quantized_weights,
    "dequantize_": fogzo.dequantize_,
    "measure_step_sizes_": fogzo.measure_step_sizes_,
    "calibrate_": lambda given: fogzo.calibrate_(given).__enter__(),
    "parameter_groups": lambda given: fogzo.parameter_groups(given, 0.1),
    "quantize_from": lambda given: fogzo.methods.quantize_from(given, 0.5, total_steps=10),
    "inspect": fogzo.inspect,
}


@pytest.mark.parametrize("given", [[nn.Linear(4, 4)], nn.Linear, None, fogzo.lsq(2)])
@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_no_model_is_refused(name, given):
    with pytest.raises(ValueError, match=rf"must be a torch\.nn\.Module, got .*{name}\(mod"):
        ENTRIES[name](given)


@pytest.mark.parametrize("name", ["dequantize_", "measure_step_sizes_", "quantize_from", "inspect"])
def test_what_needs_a_quantized_model_says_so(name):
    with pytest.raises(ValueError, match=rf"fogzo\.quantize_\(mod.*, then fogzo.*{name}\(model"):
        ENTRIES[name](_mlp())


def test_what_a_filter_raises_comes_through():
    error = TypeError("of the filter itself")

    def picky(module, name):
        raise error

    with pytest.raises(TypeError) as raised:
        fogzo.quantize_(_mlp(), fogzo.lsq(2), picky)
    assert raised.value is error


def test_any_callable_of_two_arguments_is_a_filter():
    class Named:
        def __call__(self, module, name, /, *rest):
            return name == "0"

    for filter_fn in (Named(), partial(lambda names, module, name: name in names, {"0"})):
        assert _quantized_names(fogzo.quantize_(_mlp(), fogzo.lsq(2), filter_fn)) == ["0"]


def test_the_advice_for_a_half_quantized_model_works():
    model = _half_quantized()
    fogzo.quantize_(model, fogzo.lsq(2), lambda m, name: not isinstance(m, fogzo.QuantizedLayer))
    assert _quantized_names(model) == ["0", "2", "3"]
