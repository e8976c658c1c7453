"""Quantized inputs come out the same by every kernel, precision, order of sums and batch size."""

import copy

import pytest
import torch
from torch import Generator, Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fogzo
from fogzo.quantizers import Quantizer, learned_scale, uniform

ACTIVATIONS = {
    "lsq": fogzo.lsq(2),
    "fixed": fogzo.fixed(2),
    "lsq, integer": fogzo.lsq(2, levels="integer"),
    "fixed, integer": fogzo.fixed(2, levels="integer"),
    "lsq, 1 bit": fogzo.lsq(1),
    "lsq, 4 bits, half": fogzo.lsq(4, levels="half"),
    "sign of each token": fogzo.sign(granularity="token"),
    "quest": fogzo.quest(2),
}
EVERY_ACTIVATION = pytest.mark.parametrize(
    "activations", ACTIVATIONS.values(), ids=ACTIVATIONS.keys()
)
TOKENS = torch.randint(32, (4, 16), generator=Generator().manual_seed(1))


def _llama(seed: int, activations: Quantizer) -> nn.Module:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    fogzo.quantize_(model, fogzo.lsq(2), activations=activations)
    if activations.scale.has_state:
        with torch.no_grad(), fogzo.calibrate_(model):
            model(TOKENS)
    return model


def _reordered(model: nn.Module) -> nn.Module:
    """The same function, whose products sum their terms in another order."""
    model = copy.deepcopy(model)
    generator = Generator().manual_seed(2)
    with torch.no_grad():
        for block in model.model.layers:
            mlp, attention = block.mlp, block.self_attn
            order = torch.randperm(64, generator=generator)
            # Values of a head may change places; those of queries and keys are rotated in pairs.
            heads = torch.cat([8 * i + torch.randperm(8, generator=generator) for i in range(4)])
            for layer, dim, places in (
                (mlp.gate_proj, 0, order),
                (mlp.up_proj, 0, order),
                (mlp.down_proj, 1, order),
                (attention.v_proj, 0, heads),
                (attention.o_proj, 1, heads),
            ):
                layer.weight.copy_(layer.weight.index_select(dim, places))
    return model


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@EVERY_ACTIVATION
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_a_transformer_gives_the_same_logits_in_every_way_to_compute_them(activations, seed):
    model = _llama(seed, activations)
    exact = copy.deepcopy(model).double()(TOKENS).logits
    assert _difference(model(TOKENS).logits, exact) < 1e-3
    one_by_one = torch.cat([model(row[None]).logits for row in TOKENS])
    assert _difference(one_by_one, exact) < 1e-3
    if activations.rotation is None:  # places would mix what a rotation mixes
        assert _difference(_reordered(model)(TOKENS).logits, exact) < 1e-3


@pytest.mark.parametrize("step", [0.1, 0.3])
@torch.no_grad()
def test_steps_in_simple_ratios_put_sums_on_every_threshold(step):
    """Products of levels are then multiples of a fraction of the next layer's step."""
    quantizer = fogzo.fixed(2, step_size=step)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    generator = Generator().manual_seed(0)
    for param in model.parameters():
        param.normal_(0, step, generator=generator)
    fogzo.quantize_(model, quantizer, lambda *_: True, quantizer)
    x = step * torch.randn(64, 16, generator=generator)
    assert _difference(model(x), copy.deepcopy(model).double()(x.double())) < 1e-3


@pytest.mark.parametrize("quantizer", [*ACTIVATIONS.values(), fogzo.abs_max(2)])
def test_round_off_about_zero_and_both_zeros_round_alike(quantizer):
    x = torch.tensor([[1.0, -1.0, 0.0, -0.0, 1e-7, -1e-7, 1e-6, -1e-6]])
    if quantizer.rotation is None:
        assert len(quantizer.quantize_input(x)[0, 2:].unique()) == 1


@pytest.mark.parametrize("levels", ["integer", "unsigned"])
def test_integer_levels_round_as_integer_kernels_do(levels):
    quantizer = fogzo.fixed(3, step_size=1.0, levels=levels)
    x = torch.linspace(-9, 9, 4001)[None]
    low, high = quantizer.grid.low, quantizer.grid.high
    assert torch.equal(quantizer.quantize_input(x, torch.ones(1, 1)), x.round().clamp(low, high))


def test_weights_keep_their_thresholds():
    """Nobody sums them, and codes of other libraries are to be the same."""
    w = torch.tensor([[1.0, -1e-6, 0.0, 1e-6]])
    assert fogzo.fixed(2)(w, torch.ones(1, 1)).tolist() == [[1.5, -0.5, 0.5, 0.5]]


@pytest.mark.parametrize("levels", ["half", "integer"])
def test_round_off_below_zero_does_not_make_levels_signed(levels):
    quantizer = Quantizer(uniform(2, levels), learned_scale())
    layer = fogzo.quantize_(nn.Linear(8, 4), fogzo.fixed(8), lambda *_: True, quantizer)
    x = torch.rand(5, 8, generator=Generator().manual_seed(0))
    x[0, :3] = torch.tensor([-1e-7, -0.0, -3e-6])
    layer(x)
    assert layer.activation_quantizer.grid.name == "uniform2-unsigned"
    assert (layer.activation_quantizer.quantize_input(x, layer.input_step)[0, :3] == 0).all()
    x[0, 0] = -0.01
    with fogzo.calibrate_(layer):
        layer(x)
    assert layer.activation_quantizer == quantizer
