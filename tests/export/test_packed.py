import copy
import itertools
import json
import pickle

import pytest
import torch
import transformers
from small_networks import NETWORKS, example, is_no_embedding, llama, logits, quantized, seeded
from torch import nn

import fogzo
import fogzo.export.transformers
from fogzo.export import export, load_
from fogzo.export.packed import PackedLayer

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
# Every pair of a network, a quantizer and a kind of inputs, in 36 of 144 combinations.
PAIRS = [
    (list(NETWORKS)[(i + j) % 4], quantizer, inputs)
    for (i, quantizer), (j, inputs) in itertools.product(enumerate(QUANTIZERS), enumerate(INPUTS))
]


def plain(network):
    """The architecture alone, with other weights than the one that was exported."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return NETWORKS[network]().eval()


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.disable_progress_bar()


@pytest.mark.parametrize(("network", "quantizer", "inputs"), PAIRS)
def test_the_served_model_is_the_trained_one(network, quantizer, inputs, tmp_path):
    model = quantized(network, QUANTIZERS[quantizer](), INPUTS[inputs]())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = example(network)
    report = export(model, tmp_path / "out", "packed", example=x)
    assert report.logits_difference == 0
    assert all(layer.exact for layer in report.layers)
    assert report.reader == "fogzo.export.load_"

    loaded = load_(plain(network), tmp_path / "out")
    assert torch.equal(logits(loaded, x), logits(model, x))
    packed = {name: m for name, m in loaded.named_modules() if isinstance(m, PackedLayer)}
    assert {layer.name for layer in report.layers} == set(packed)
    for name, layer in packed.items():
        own = model.get_submodule(name)
        assert torch.equal(layer.weight, own.quantized_weight())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])  # exporting changes nothing

    if network != "mlp":
        served = type(model).from_pretrained(tmp_path / "out").eval()
        assert torch.equal(logits(served, x), logits(model, x))


@pytest.mark.parametrize("inputs", [None, fogzo.lsq(4)])
def test_tied_embedding_and_head_are_written_once(inputs, tmp_path):
    model = seeded(lambda: llama(tied=True))
    fogzo.quantize_(model, fogzo.lsq(2), lambda *_: True, activations=inputs)
    x = example("llama")
    if inputs is not None:
        with torch.no_grad(), fogzo.calibrate_(model):
            model(x)
    model.eval()
    assert export(model, tmp_path / "out", example=x).logits_difference == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["modules"]["lm_head"]["tied_to"] == "model.embed_tokens"

    loaded = load_(llama(tied=True), tmp_path / "out")
    assert loaded.lm_head.codes is loaded.model.embed_tokens.codes
    served = type(model).from_pretrained(tmp_path / "out").eval()
    assert served.lm_head.codes is served.model.embed_tokens.codes
    assert torch.equal(logits(served, x), logits(model, x))


def test_tied_weights_in_float_stay_tied(tmp_path):
    model = seeded(lambda: llama(tied=True))
    fogzo.quantize_(model, fogzo.lsq(2), lambda module, name: "layers" in name)
    x = example("llama")
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


def test_the_model_itself_may_be_the_layer(tmp_path):
    model = fogzo.quantize_(nn.Linear(8, 4), fogzo.ternary(), lambda *_: True)
    x = torch.randn(3, 8)
    assert export(model, tmp_path / "out", example=x).logits_difference == 0
    assert torch.equal(load_(nn.Linear(8, 4), tmp_path / "out")(x), model(x))


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_names_are_those_of_the_model_inside_a_wrapper(wrap, tmp_path):
    model = quantized("mlp", fogzo.lsq(2))
    report = export(wrap(model), tmp_path / "out", verify=False)
    assert [layer.name for layer in report.layers] == ["1", "3", "5"]
    loaded = load_(NETWORKS["mlp"](), tmp_path / "out")
    x = example("mlp")
    assert torch.equal(logits(loaded, x), logits(model, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_other_dtypes(dtype, tmp_path):
    model = seeded(NETWORKS["mlp"]).to(dtype)
    fogzo.quantize_(model, fogzo.lsq(2), is_no_embedding)
    x = example("mlp").to(dtype)
    assert export(model, tmp_path / "out", example=x).logits_difference == 0
    loaded = load_(NETWORKS["mlp"]().to(dtype), tmp_path / "out")
    assert loaded[1].scales.dtype == dtype
    assert torch.equal(loaded(x), model(x))


def test_files_are_as_small_as_their_levels(tmp_path):
    for quantizer, bits in ((fogzo.lsq(2), 2), (fogzo.ternary(), 1.6), (fogzo.sign(), 1)):
        model = fogzo.quantize_(llama(width=160), quantizer)
        report = export(model, tmp_path / "out", verify=False)
        loaded = load_(llama(width=160), tmp_path / "out")
        sizes = [
            (m.codes.nbytes + m.scales.nbytes, 4 * m.in_features * m.out_features)
            for m in loaded.modules()
            if isinstance(m, PackedLayer)
        ]
        packed, in_float = map(sum, zip(*sizes, strict=True))
        assert bits / 32 <= packed / in_float < bits / 32 * 1.2
        in_memory = sum(t.nbytes for t in {*loaded.parameters(), *loaded.buffers()})
        assert report.bytes == pytest.approx(in_memory, rel=0.1)
        assert report.float_bytes - in_float + packed == pytest.approx(in_memory, rel=0.01)


def test_packed_layers_hold_their_scales_through_casts_and_copies(tmp_path):
    model = quantized("mlp", fogzo.lsq(2), fogzo.lsq(4))
    export(model, tmp_path / "out", verify=False)
    x = example("mlp")
    loaded = load_(NETWORKS["mlp"](), tmp_path / "out").eval()
    expected = logits(model, x)
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(logits(copied, x), expected)
    half = loaded.bfloat16()
    assert half[1].weight.dtype == torch.bfloat16
    assert half[1].scales.dtype == half[1].input_step.dtype == torch.float32
    assert torch.equal(half[1].weight, model[1].quantized_weight().bfloat16())
    assert torch.equal(half.float()[1].weight, model[1].quantized_weight())
    assert "packed, 4 levels" in repr(loaded[1])


def test_on_the_meta_device_nothing_is_made_twice(tmp_path):
    model = quantized("mlp", fogzo.lsq(2))
    export(model, tmp_path / "out", verify=False)
    with torch.device("meta"):
        empty = NETWORKS["mlp"]()
    loaded = load_(empty, tmp_path / "out")
    x = example("mlp")
    assert torch.equal(logits(loaded, x), logits(model, x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32)), "no layer '3'"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), "has shape \\[8, 64\\]"),
        (lambda: nn.Sequential(*NETWORKS["mlp"](), nn.LayerNorm(10)), "of another network"),
        (lambda: quantized("mlp", fogzo.lsq(2)), "before fogzo.quantize_"),
    ],
)
def test_other_networks_are_refused(build, message, tmp_path):
    export(quantized("mlp", fogzo.lsq(2)), tmp_path / "out", verify=False)
    with pytest.raises(ValueError, match=message):
        load_(build(), tmp_path / "out")


def test_other_folders_are_refused(tmp_path):
    model = quantized("mlp", fogzo.lsq(2))
    with pytest.raises(ValueError, match="no exported folder"):
        load_(NETWORKS["mlp"](), tmp_path)
    export(model, tmp_path / "float", "float", verify=False)
    with pytest.raises(ValueError, match='format="packed"'):
        load_(NETWORKS["mlp"](), tmp_path / "float")
    export(model, tmp_path / "packed", verify=False)
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 2, and this fogzo reads 1"):
        load_(NETWORKS["mlp"](), tmp_path / "packed")
    (tmp_path / "packed" / "model.safetensors").unlink()
    config["quantization_config"]["format_version"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no model"):
        load_(NETWORKS["mlp"](), tmp_path / "packed")
