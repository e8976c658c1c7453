import copy
import dataclasses
import itertools
import json
import pickle
import re

import pytest
import torch
import transformers
from networks import (
    NETWORKS,
    bert,
    inner,
    inputs_of,
    llama,
    logits,
    mlp,
    quantized,
    seeded,
    tied_llama,
)
from torch import nn

import fogzo
import fogzo.export.transformers
from fogzo.export import check, export, load_, unpack_
from fogzo.export.packed import PackedLayer
from fogzo.quantizers import Hadamard
from toolbox import pairwise

QUANTIZERS = {
    "lsq1": lambda: fogzo.lsq(1),
    "lsq2-channel": lambda: fogzo.lsq(2, granularity="channel"),
    "lsq3-group": lambda: fogzo.lsq(3, granularity=8, scale_dtype=torch.float16),
    "fixed4": lambda: fogzo.fixed(4),
    "fixed8-half": lambda: fogzo.fixed(8, levels="half"),
    "ternary": lambda: fogzo.ternary(scale_dtype=torch.bfloat16),
    "sign": lambda: fogzo.sign(),
    "abs_max4": lambda: fogzo.abs_max(4),
    "quest2": lambda: fogzo.quest(2),
}
INPUTS = {
    "float": lambda: None,
    "lsq2": lambda: fogzo.lsq(2),
    "abs_max8": lambda: fogzo.abs_max(8, granularity="token"),
    "quest4": lambda: fogzo.quest(4),
}


def plain(network):
    """The architecture alone, with other weights than the one that was exported."""
    model = NETWORKS[network]()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.disable_progress_bar()


@pairwise(network=NETWORKS, quantizer=QUANTIZERS, inputs=INPUTS)
def test_the_served_model_is_the_trained_one(network, quantizer, inputs, tmp_path):
    model = quantized(NETWORKS[network](), QUANTIZERS[quantizer](), INPUTS[inputs](), inner)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = export(model, tmp_path / "out", "packed", verify=False)
    loaded = load_(plain(network), tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    packed = {name: m for name, m in loaded.named_modules() if isinstance(m, PackedLayer)}
    assert {layer.name for layer in report.layers} == set(packed)
    for name, layer in packed.items():
        assert torch.equal(layer.weight, model.get_submodule(name).quantized_weight())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])  # exporting changes nothing


# Every pair of a quantizer and a kind of inputs, each in one of the networks.
@pytest.mark.parametrize(
    ("quantizer", "inputs", "network"),
    [
        (*pair, ["resnet", "vit", "llama"][number % 3])
        for number, pair in enumerate(itertools.product(QUANTIZERS, INPUTS))
    ],
)
def test_transformers_reads_the_trained_network(network, quantizer, inputs, tmp_path):
    model = quantized(NETWORKS[network](), QUANTIZERS[quantizer](), INPUTS[inputs](), inner)
    x = inputs_of(model)
    report = export(model, tmp_path / "out", "packed", example=x)
    assert report.logits_difference == 0
    assert all(layer.exact for layer in report.layers)
    assert report.reader == "fogzo.export.load_"
    served = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(served), logits(model))


def test_inputs_that_are_companded_are_served_so(tmp_path):
    inputs = fogzo.bbq(2, granularity="tensor")
    model = quantized(NETWORKS["mlp"](), fogzo.bbq(2), inputs, inner)
    x = inputs_of(model)
    assert export(model, tmp_path / "out", example=x).logits_difference == 0
    assert torch.equal(logits(load_(plain("mlp"), tmp_path / "out"), x), logits(model, x))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for layer in config["quantization_config"]["modules"].values():  # as folders were before
        del layer["input"]["companding"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert not torch.equal(logits(load_(plain("mlp"), tmp_path / "out"), x), logits(model, x))


def test_encoders_that_read_weights_by_themselves_quantize_inputs_too(tmp_path):
    def build():
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return nn.TransformerEncoder(layer, 1).eval()

    model = seeded(build)
    with pytest.warns(UserWarning, match="MultiheadAttention"):
        fogzo.quantize_(model, fogzo.lsq(4), lambda _, name: "linear" in name, fogzo.lsq(2))
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), fogzo.calibrate_(model):
        model(x)
    export(model, tmp_path / "out", verify=False)
    assert torch.equal(logits(load_(build(), tmp_path / "out"), x), logits(model, x))


@pytest.mark.parametrize("inputs", [None, fogzo.lsq(4)])
def test_tied_embedding_and_head_are_written_once(inputs, tmp_path):
    model = tied_llama()
    fogzo.quantize_(model, fogzo.lsq(2), lambda *_: True, activations=inputs)
    x = inputs_of(model)
    if inputs is not None:
        with torch.no_grad(), fogzo.calibrate_(model):
            model(x)
    model.eval()
    assert export(model, tmp_path / "out", example=x).logits_difference == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["modules"]["lm_head"]["tied_to"] == "model.embed_tokens"

    loaded = load_(tied_llama(), tmp_path / "out")
    assert loaded.lm_head.codes is loaded.model.embed_tokens.codes
    served = type(model).from_pretrained(tmp_path / "out").eval()
    assert served.lm_head.codes is served.model.embed_tokens.codes
    assert torch.equal(logits(served, x), logits(model, x))


@pytest.mark.parametrize("build", [bert, llama, tied_llama])
def test_what_was_loaded_is_saved_as_it_was_packed(build, tmp_path):
    model = fogzo.quantize_(build(), fogzo.lsq(2, levels="integer"), lambda *_: True).eval()
    export(model, tmp_path / "out", verify=False)
    config = model.config.to_dict()
    loaded = load_(type(model)(model.config), tmp_path / "out").eval()
    for number, each in enumerate((loaded, type(model).from_pretrained(tmp_path / "out"))):
        each.save_pretrained(tmp_path / str(number), max_shard_size=("1GB", "1KB")[number])
        assert len([*(tmp_path / str(number)).glob("*.safetensors")]) > number
        again = type(model).from_pretrained(tmp_path / str(number)).eval()
        assert torch.equal(logits(again), logits(model))
        again = load_(build(), tmp_path / str(number)).eval()
        assert torch.equal(logits(again), logits(model))
    assert model.config.to_dict() == config  # which the new model began with


def test_what_is_tied_beside_packed_weights_stays_tied(tmp_path):
    model = bert()
    fogzo.quantize_(model, fogzo.lsq(2, levels="integer"), lambda *_: True)
    assert export(model, tmp_path / "out").logits_difference == 0
    served = type(model).from_pretrained(tmp_path / "out").eval()
    assert served.cls.predictions.decoder.codes is served.bert.embeddings.word_embeddings.codes
    assert served.cls.predictions.decoder.bias is served.cls.predictions.bias
    assert torch.equal(logits(served), logits(model))


def test_tied_weights_in_float_stay_tied(tmp_path):
    model = tied_llama()
    fogzo.quantize_(model, fogzo.lsq(2), lambda module, name: "layers" in name)
    x = inputs_of(model)
    assert export(model.eval(), tmp_path / "out", example=x).logits_difference == 0
    served = type(model).from_pretrained(tmp_path / "out").eval()
    assert served.lm_head.weight is served.model.embed_tokens.weight
    assert torch.equal(logits(served, x), logits(model, x))


def test_a_layer_with_two_names_is_written_once(tmp_path):
    def build():
        layer = nn.Linear(8, 8)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = fogzo.quantize_(seeded(build), fogzo.lsq(2), lambda *_: True)
    x = torch.randn(3, 8)
    report = export(model, tmp_path / "out", example=x)
    assert [layer.name for layer in report.layers] == ["0"]
    loaded = load_(build(), tmp_path / "out")
    assert loaded[0] is loaded[2]
    assert torch.equal(loaded(x), model(x))


class Scaled(nn.Linear):
    """A layer with a scale of its own, by the name that packed layers give theirs."""

    def __init__(self, learned):
        super().__init__(8, 8)
        scales = torch.rand(8)
        if learned:
            self.scales = nn.Parameter(scales)
        else:
            self.register_buffer("scales", scales)

    def forward(self, x):
        return super().forward(x) * self.scales


@pytest.mark.parametrize("learned", [True, False])
def test_names_that_a_layer_has_taken_are_refused(learned, tmp_path):
    model = fogzo.quantize_(nn.Sequential(Scaled(learned)), fogzo.lsq(2), inner)
    message = r"'0' as packed: its Scaled has 'scales' of its own.*self\.scales_"
    assert re.search(message, check(model, "packed")[0])
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", "packed", example=torch.randn(2, 8))
    report = export(model, tmp_path / "out", "float", example=torch.randn(2, 8))
    assert report.logits_difference == 0


def test_the_model_itself_may_be_the_layer(tmp_path):
    model = fogzo.quantize_(nn.Linear(8, 4), fogzo.ternary(), lambda *_: True)
    x = torch.randn(3, 8)
    assert export(model, tmp_path / "out", example=x).logits_difference == 0
    assert torch.equal(load_(nn.Linear(8, 4), tmp_path / "out")(x), model(x))


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_names_are_those_of_the_model_inside_a_wrapper(wrap, tmp_path):
    model = quantized(mlp(), fogzo.lsq(2))
    report = export(wrap(model), tmp_path / "out", verify=False)
    assert [layer.name for layer in report.layers] == ["1", "3", "5"]
    loaded = load_(mlp(), tmp_path / "out")
    x = inputs_of(model)
    assert torch.equal(logits(loaded, x), logits(model, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_other_dtypes(dtype, tmp_path):
    model = mlp().to(dtype)
    fogzo.quantize_(model, fogzo.lsq(2), inner)
    x = inputs_of(model).to(dtype)
    assert export(model, tmp_path / "out", example=x).logits_difference == 0
    loaded = load_(mlp().to(dtype), tmp_path / "out")
    assert loaded[1].scales.dtype == dtype
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("quantizer", "inputs"),
    [
        (dataclasses.replace(fogzo.ternary(), rotation=Hadamard()), 64),
        (fogzo.quest(2), 66),
        (fogzo.quest(1), 100),
        (fogzo.bbq(2), 6),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotated_rows_that_fill_no_whole_bytes(quantizer, inputs, dtype, tmp_path):
    def build():
        return seeded(lambda: nn.Sequential(nn.Linear(inputs, 64))).to(dtype)

    model = fogzo.quantize_(build(), quantizer, lambda *_: True)
    x = torch.randn(3, inputs, dtype=dtype)
    assert export(model, tmp_path / "out", example=x).logits_difference == 0
    loaded = load_(build(), tmp_path / "out")
    assert torch.equal(loaded[0].weight, model[0].quantized_weight())
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("quantizer", "bits"), [(fogzo.lsq(2), 2), (fogzo.ternary(), 1.6), (fogzo.sign(), 1)]
)
def test_files_are_as_small_as_their_levels(quantizer, bits, tmp_path):
    model = fogzo.quantize_(llama(160), quantizer)
    report = export(model, tmp_path / "out", verify=False)
    loaded = load_(llama(160), tmp_path / "out")
    sizes = [
        (m.codes.nbytes + m.scales.nbytes, 4 * m.in_features * m.out_features)
        for m in loaded.modules()
        if isinstance(m, PackedLayer)
    ]
    packed, in_float = map(sum, zip(*sizes, strict=True))
    assert bits / 32 <= packed / in_float < bits / 32 * 1.2 < 0.17
    # What is in memory is in the file, and nothing else but the names.
    in_memory = sum(tensor.nbytes for tensor in loaded.state_dict().values())
    on_disk = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert len(on_disk) == in_memory + 8 + int.from_bytes(on_disk[:8], "little")
    assert report.float_bytes - in_float + packed == in_memory


def test_packed_layers_hold_their_scales_through_casts_and_copies(tmp_path):
    model = quantized(mlp(), fogzo.lsq(2), fogzo.lsq(4))
    export(model, tmp_path / "out", verify=False)
    x = inputs_of(model)
    loaded = load_(mlp(), tmp_path / "out").eval()
    expected = logits(model, x)
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(logits(copied, x), expected)
    half = loaded.bfloat16()
    assert half[1].weight.dtype == torch.bfloat16
    assert half[1].scales.dtype == half[1].input_step.dtype == torch.float32
    assert torch.equal(half[1].weight, model[1].quantized_weight().bfloat16())
    assert torch.equal(half.float()[1].weight, model[1].quantized_weight())
    assert "packed, 4 levels" in repr(loaded[1])


def test_packed_layers_become_plain_ones_on_request(tmp_path):
    model = fogzo.quantize_(tied_llama(), fogzo.lsq(2), lambda *_: True)
    export(model, tmp_path / "packed", verify=False)
    x = inputs_of(model)
    served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert type(nn.Parameter(served.lm_head.weight)) is nn.Parameter
    plain = unpack_(served)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert not any("Packed" in type(module).__name__ for module in plain.modules())
    assert torch.equal(logits(plain, x), logits(model, x))
    plain.save_pretrained(tmp_path / "float")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert torch.equal(logits(again, x), logits(model, x))
    with pytest.raises(ValueError, match=r"nothing in this model is packed: fogzo\.export\.load_"):
        unpack_(plain)
    export(quantized(mlp(), fogzo.lsq(2), fogzo.lsq(4)), tmp_path / "inputs", verify=False)
    served = load_(mlp(), tmp_path / "inputs")
    with pytest.raises(ValueError, match=r"the inputs of .* are quantized.*activations=\"drop\""):
        unpack_(served)
    assert isinstance(served[1], PackedLayer)


def test_on_the_meta_device_nothing_is_made_twice(tmp_path):
    model = quantized(mlp(), fogzo.lsq(2))
    export(model, tmp_path / "out", verify=False)
    with torch.device("meta"):
        empty = mlp()
    loaded = load_(empty, tmp_path / "out")
    x = inputs_of(model)
    assert torch.equal(logits(loaded, x), logits(model, x))


def test_on_the_meta_device_a_16_bit_model_becomes_of_the_plain_models_dtype(tmp_path):
    model = quantized(mlp().bfloat16(), fogzo.lsq(4))
    export(model, tmp_path / "out", verify=False)
    x = inputs_of(model)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            empty = mlp().to(dtype)
        loaded = load_(empty, tmp_path / "out")
        kept = load_(mlp().to(dtype), tmp_path / "out")
        assert {tensor.dtype for tensor in loaded.parameters()} == {dtype}
        assert torch.equal(logits(loaded, x.to(dtype)), logits(kept, x.to(dtype)))


@pytest.mark.parametrize("quantized_too", [False, True])
def test_on_the_meta_device_tied_weights_stay_tied(quantized_too, tmp_path):
    def build():
        model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16))
        model[2].weight = model[0].weight
        return model

    model = fogzo.quantize_(build(), fogzo.lsq(2), lambda _, name: quantized_too or name == "1")
    export(model, tmp_path / "out", verify=False)
    with torch.device("meta"):
        loaded = build()
    loaded = load_(loaded, tmp_path / "out").to("cpu").double()
    kind = "codes" if quantized_too else "weight"
    assert getattr(loaded[2], kind) is getattr(loaded[0], kind)
    x = torch.arange(16)
    assert torch.equal(logits(loaded.float(), x), logits(model, x))


def test_what_no_file_holds_cannot_stay_on_the_meta_device(tmp_path):
    model = quantized(llama(), fogzo.lsq(2))
    export(model, tmp_path / "out", verify=False)
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match=r"rotary_emb\.inv_freq', .*load_\(LlamaForCausalLM\("):
        load_(empty, tmp_path / "out")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32)), "no layer '3'"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), "has shape \\[8, 64\\]"),
        (lambda: nn.Sequential(*mlp(), nn.LayerNorm(10)), "of another network"),
        (lambda: quantized(mlp(), fogzo.lsq(2)), "before fogzo.quantize_"),
    ],
)
def test_other_networks_are_refused(build, message, tmp_path):
    export(quantized(mlp(), fogzo.lsq(2)), tmp_path / "out", verify=False)
    with pytest.raises(ValueError, match=message):
        load_(build(), tmp_path / "out")


def test_other_folders_are_refused(tmp_path):
    model = quantized(mlp(), fogzo.lsq(2))
    with pytest.raises(ValueError, match="no exported folder"):
        load_(mlp(), tmp_path)
    export(model, tmp_path / "float", "float", verify=False)
    with pytest.raises(ValueError, match='format="packed"'):
        load_(mlp(), tmp_path / "float")
    export(model, tmp_path / "packed", verify=False)
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 2, and this fogzo reads 1"):
        load_(mlp(), tmp_path / "packed")
    (tmp_path / "packed" / "model.safetensors").unlink()
    config["quantization_config"]["format_version"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no model"):
        load_(mlp(), tmp_path / "packed")


class TiedEnds(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        if tied:
            self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_two_tensors_are_not_loaded_into_one_parameter(device, tmp_path):
    model = fogzo.quantize_(TiedEnds(False), fogzo.lsq(4), lambda _, name: name == "inner")
    export(model, tmp_path / "out", verify=False)
    with torch.device(device):
        tied, untied = TiedEnds(True), TiedEnds(False)
    with pytest.raises(ValueError, match=r"another network \('first\.weight' and 'last\.weight'"):
        load_(tied, tmp_path / "out")
    x = torch.randn(3, 8)
    assert torch.equal(logits(load_(untied, tmp_path / "out"), x), logits(model, x))
    with torch.no_grad():
        model.last.weight.copy_(model.first.weight)  # which one parameter holds as well
    export(model, tmp_path / "equal", verify=False)
    loaded = load_(TiedEnds(True), tmp_path / "equal")
    assert torch.equal(logits(loaded, x), logits(model, x))


class Wrapper(nn.Module):
    """Holds a model of transformers, whose head it may share."""

    def __init__(self, shares_head):
        super().__init__()
        if shares_head:
            self.own = nn.Linear(64, 96, bias=False)
        self.net = llama()
        if shares_head:
            self.net.lm_head.weight = self.own.weight

    def forward(self, tokens):
        return self.net(tokens).logits


@pytest.mark.parametrize("shares_head", [False, True])
def test_a_model_of_transformers_in_another_is_saved_as_it_was_packed(shares_head, tmp_path):
    model = fogzo.quantize_(
        Wrapper(shares_head).eval(), fogzo.lsq(2), lambda _, name: "embed" not in name
    )
    x = inputs_of(model.net)
    export(model, tmp_path / "out", verify=False)
    loaded = load_(Wrapper(shares_head), tmp_path / "out").eval()
    assert torch.equal(logits(loaded, x), logits(model, x))
    loaded.net.save_pretrained(tmp_path / "part")
    served = type(model.net).from_pretrained(tmp_path / "part").eval()
    assert torch.equal(logits(served, x), logits(model, x))
