"""Adapters of PEFT on a quantized base: what is quantized, what trains, and what merging gives."""

import copy

import pytest
import torch
from torch import nn

import fogzo
from fogzo.export import check, export, load_
from toolbox import draw, everything, fill

peft = pytest.importorskip("peft", reason="peft is not installed")

from fogzo.integrations.peft import merge_and_unload  # noqa: E402


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)
        fill(self, 0.4)

    def forward(self, x):
        return self.head(self.down(self.up(x).tanh()))


ADAPTERS = {"target_modules": ["up", "head"], "r": 2, "init_lora_weights": False}


def adapted(first, **options):
    """The network with adapters and a quantized base, in either order."""
    config = peft.LoraConfig(**{**ADAPTERS, **options})
    if first == "quantized first":
        return peft.get_peft_model(fogzo.quantize_(Net(), fogzo.lsq(2)), config)
    return fogzo.quantize_(peft.get_peft_model(Net(), config), fogzo.lsq(2))


ORDERS = pytest.mark.parametrize("first", ["quantized first", "adapted first"])


@ORDERS
def test_adapters_train_in_float_on_a_quantized_base(first):
    model = adapted(first)
    quantized = [name for name, m in model.named_modules() if isinstance(m, fogzo.QuantizedLayer)]
    assert quantized == ["base_model.model.up.base_layer", "base_model.model.down"]
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = (model(draw(16, 8)) - draw(16, 4, seed=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained


def test_copies_of_heads_that_adapters_train_stay_in_float():
    model = adapted("adapted first", target_modules=["up"], modules_to_save=["head"])
    weights = [weight.name for weight in fogzo.quantized_weights(model)]
    assert weights == ["base_model.model.up.base_layer.weight", "base_model.model.down.weight"]


def test_adapters_are_quantized_if_they_are_asked_for():
    model = peft.get_peft_model(Net(), peft.LoraConfig(**ADAPTERS))
    fogzo.quantize_(model, fogzo.lsq(2), lambda module, name: "lora_A" in name)
    assert len(fogzo.quantized_weights(model)) == 2


def test_on_a_frozen_base_there_is_nothing_to_refine():
    model = adapted("quantized first")
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    loss = model(draw(4, 8)).square().mean()
    loss.backward()
    with pytest.raises(ValueError, match=r"all frozen.*Under adapters \(LoRA\) the base stays"):
        estimator.refine_grads_(lambda: model(draw(4, 8)).square().mean())


@ORDERS
def test_merging_gives_what_was_trained(first):
    model, x = adapted(first).eval(), draw(4, 8)
    answer = model(x)
    # PEFT's own adds adapters to the latent weights, and rounds the sum.
    assert (copy.deepcopy(model).merge_and_unload()(x) - answer).abs().max() > 0.01
    merged = merge_and_unload(model)
    torch.testing.assert_close(merged(x), answer)
    assert not any(isinstance(module, fogzo.QuantizedLayer) for module in merged.modules())


@ORDERS
def test_what_divides_by_the_norm_of_latent_weights_cannot_be_merged(first):
    model = adapted(first, use_dora=True)
    with pytest.raises(ValueError, match=r"model\.up' compute with the latent .*DoRA.*keep the "):
        merge_and_unload(model)
    assert isinstance(model.base_model.model.down, fogzo.QuantizedLayer)
    model.add_adapter("plain", peft.LoraConfig(target_modules=["up"]))
    merged = merge_and_unload(model, adapter_names=["plain"])
    assert type(merged.up) is nn.Linear


def test_adapters_that_are_merged_already_are_to_be_unmerged_first():
    model, x = adapted("quantized first").eval(), draw(4, 8)
    answer = model(x)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the latent .*model\.unmerge_adapter\(\)"):
        merge_and_unload(model)
    model.unmerge_adapter()
    torch.testing.assert_close(merge_and_unload(model)(x), answer)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ({"lora_bias": True}, {}, r"does not merge .*up' \(.*no bias.*\): keep the adapters apart"),
        ({}, {"adapter_names": "default"}, r"got 'default': .*adapter_names=\['default'\]\)"),
        ({}, {"adapter_names": ["other"]}, r"some of 'default', got \['other'\]"),
        ({}, {"safe": True}, r"no option 'safe', but .*: merge_and_unload\(model, safe_merge=True"),
    ],
)
def test_what_peft_would_refuse_is_refused_before_anything_is_done(config, options, says):
    net = Net()
    net.up.bias = None
    base = fogzo.quantize_(net, fogzo.lsq(2))
    model = peft.get_peft_model(base, peft.LoraConfig(**ADAPTERS, **config)).eval()
    answer = model(draw(4, 8))
    with pytest.raises(ValueError, match=says):
        merge_and_unload(model, **options)
    assert len(fogzo.quantized_weights(model)) == 2
    assert torch.equal(model(draw(4, 8)), answer)


def test_a_weight_that_is_no_number_is_refused_before_anything_is_done():
    model = adapted("quantized first")
    model.base_model.model.head.lora_A["default"].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"does not merge the adapters of .*head'"):
        merge_and_unload(model, safe_merge=True)
    assert len(fogzo.quantized_weights(model)) == 2


def test_what_has_no_adapters_or_no_quantized_base_is_refused():
    with pytest.raises(ValueError, match=r"got Net: peft\.get_peft_model"):
        merge_and_unload(fogzo.quantize_(Net(), fogzo.lsq(2)))
    plain = peft.get_peft_model(Net(), peft.LoraConfig(**ADAPTERS))
    with pytest.raises(ValueError, match=r"PEFT's own .*: model\.merge_and_unload\(\)"):
        merge_and_unload(plain)


KINDS = {
    "LoRA": (peft.LoraConfig, {"r": 2}, True),
    "LoHa": (peft.LoHaConfig, {"r": 2}, True),
    "OFT": (peft.OFTConfig, {"oft_block_size": 4}, True),
    "VeRA": (peft.VeraConfig, {"r": 2}, True),
    "HRA": (peft.HRAConfig, {"r": 2}, False),
    "HiRA": (peft.HiraConfig, {"r": 2}, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_merged_if_they_see_the_quantized_weights(kind):
    config, options, mergeable = KINDS[kind]
    base = fogzo.quantize_(Net(), fogzo.lsq(2))
    model = peft.get_peft_model(base, config(target_modules=["up", "head"], **options)).eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(draw(*param.shape, seed=param.numel()), alpha=0.1)
    answer = model(draw(4, 8))
    if mergeable:
        torch.testing.assert_close(merge_and_unload(model)(draw(4, 8)), answer)
        return
    with pytest.raises(ValueError, match=rf"model\.up' compute with the latent .*{kind}"):
        merge_and_unload(model)
    assert torch.equal(model(draw(4, 8)), answer)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dora_is_refused_in_sixteen_bits_too(bits):
    base = fogzo.quantize_(Net(), fogzo.fixed(bits)).bfloat16()
    model = peft.get_peft_model(base, peft.LoraConfig(**ADAPTERS, use_dora=True))
    with pytest.raises(ValueError, match=r"model\.up' compute with the latent"):
        merge_and_unload(model)


def test_embeddings_and_convolutions_are_merged_too():
    base = nn.Sequential(nn.Embedding(10, 8), nn.Conv1d(5, 4, 3), nn.Flatten(), nn.Linear(24, 2))
    fogzo.quantize_(fill(base), fogzo.lsq(2), everything)
    config = peft.LoraConfig(target_modules=["0", "1"], r=2, init_lora_weights=False)
    model, x = peft.get_peft_model(base, config).eval(), torch.arange(10).reshape(2, 5)
    answer = model(x)
    torch.testing.assert_close(merge_and_unload(model)(x), answer)


def test_adapters_on_packed_weights_are_merged_or_nothing_is(tmp_path):
    export(fogzo.quantize_(Net(), fogzo.lsq(2)), tmp_path, "packed", verify=False)
    model = peft.get_peft_model(load_(Net(), tmp_path), peft.LoraConfig(**ADAPTERS)).eval()
    answer = model(draw(4, 8))
    for safe in (False, True):
        with pytest.raises(ValueError, match=r"packed weight .* lost.*unpack_.*merge_and_unload"):
            copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    assert torch.equal(model(draw(4, 8)), answer)
    merged = merge_and_unload(model)
    torch.testing.assert_close(merged(draw(4, 8)), answer)
    assert not any(param.requires_grad for param in (merged.up.weight, merged.down.weight))


def test_readers_that_build_the_network_know_no_adapters():
    model = adapted("quantized first")
    assert check(model, "packed") == []
    for format in ("float", "compressed-tensors", "gguf", "mlx", "bitnet"):
        assert "has adapters of PEFT" in check(model, format)[0]
    assert check(model.unload(), "float") == []


def test_quantized_inputs_cannot_be_merged():
    base = fogzo.quantize_(Net(), fogzo.lsq(2), activations=fogzo.abs_max(8))
    model = peft.get_peft_model(base, peft.LoraConfig(**ADAPTERS))
    with pytest.raises(ValueError, match=r"keep the adapters apart"):
        merge_and_unload(model)
    assert isinstance(model.base_model.model.down, fogzo.QuantizedLayer)
