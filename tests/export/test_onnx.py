from collections import Counter

import pytest
import torch
from networks import inner, inputs_of, llama, logits, quantized, relative, resnet, vit
from torch import nn

import fogzo
from fogzo.export import export, onnx

onnxruntime = pytest.importorskip("onnxruntime", reason="runs the file")
ir = pytest.importorskip("onnx_ir", reason="writes the file")
pytest.importorskip("onnxscript", reason="torch traces with it")

pytestmark = pytest.mark.filterwarnings(
    # Of torch's exporter.
    "ignore:.*(isinstance|LeafSpec|treespec|copyreg|ONNX|onnx).*",
)

WEIGHTS = {
    "half2": fogzo.lsq(2),
    "int2-channel": fogzo.lsq(2, levels="integer", granularity="channel"),
    "int4-g16": fogzo.lsq(4, granularity=16),
    "half4": fogzo.lsq(4, levels="half"),
    "int8": fogzo.fixed(8),
    "ternary": fogzo.ternary(granularity=32),
    "sign": fogzo.sign(),
}


def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False), nn.ReLU(), nn.Linear(32, 8)
        ).eval()


def convolutions():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Unflatten(1, (4, 16)),
            nn.Conv1d(4, 32, 3),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.ConvTranspose1d(32, 16, 3),
            nn.Conv1d(16, 32, 3, groups=2),
            nn.Flatten(),
            nn.Linear(448, 8),
        ).eval()


def every_layer(module, name):
    return not isinstance(module, nn.Embedding)


def exported(model, folder, example=None, **options):
    example = inputs_of(model) if example is None else example
    return export(model, folder / "out", "onnx", example=example, **options)


def operators(folder):
    return Counter(node.op_type for node in ir.load(folder / "out" / onnx.FILE).graph)


@pytest.mark.parametrize("quantizer", WEIGHTS.values(), ids=WEIGHTS)
def test_linear_layers_are_matmul_nbits(quantizer, tmp_path):
    if quantizer.granularity == 32:
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    else:
        model = mlp()
    report = exported(quantized(model, quantizer, filter_fn=every_layer), tmp_path)
    assert all(layer.exact for layer in report.layers)
    assert report.logits_difference < 2e-6
    assert operators(tmp_path)["MatMulNBits"] == len(report.layers)


@pytest.mark.parametrize("name", ["int2-channel", "int4-g16", "int8"])
def test_the_standard_operator(name, tmp_path):
    model = quantized(mlp(), WEIGHTS[name], filter_fn=every_layer)
    report = exported(model, tmp_path, variant="qdq")
    assert all(layer.exact for layer in report.layers)
    assert report.logits_difference < 2e-6
    # Also in a session without the option that keeps inputs in float32.
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / onnx.FILE))
    found = session.run(None, {session.get_inputs()[0].name: inputs_of(model).numpy()})[0]
    assert relative(torch.from_numpy(found), logits(model)) < 2e-6
    assert operators(tmp_path)["DequantizeLinear"] == 3
    assert not operators(tmp_path)["MatMulNBits"]


@pytest.mark.parametrize("quantizer", [fogzo.lsq(2), fogzo.fixed(8, granularity="channel")])
def test_convolutions(quantizer, tmp_path):
    report = exported(quantized(convolutions(), quantizer, filter_fn=every_layer), tmp_path)
    assert all(layer.exact for layer in report.layers)
    assert report.logits_difference < 2e-6
    assert operators(tmp_path)["DequantizeLinear"] == 3
    assert operators(tmp_path)["MatMulNBits"] == 1


def test_convolutions_in_groups(tmp_path):
    model = nn.Sequential(
        nn.Unflatten(1, (16, 4)), nn.Conv1d(16, 32, 2), nn.ConvTranspose1d(32, 16, 2)
    ).eval()
    report = exported(
        quantized(model, fogzo.lsq(4, granularity=16), filter_fn=every_layer), tmp_path
    )
    assert all(layer.exact for layer in report.layers)
    assert report.logits_difference < 2e-6


@pytest.mark.parametrize("make", [llama, vit, resnet])
def test_transformers(make, tmp_path):
    model = quantized(make(), fogzo.lsq(2, granularity="channel"), filter_fn=inner)
    report = exported(model, tmp_path)
    assert all(layer.exact for layer in report.layers)
    assert report.logits_difference < 2e-6
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / onnx.FILE))
    (declared,) = session.get_inputs()
    longer = torch.cat([inputs_of(model)] * 2)  # and of other sizes than it was traced with
    if make is llama:
        longer = torch.cat([longer, longer[:, :5]], 1)
    found = torch.from_numpy(session.run(None, {declared.name: longer.numpy()})[0])
    torch.testing.assert_close(found, logits(model, longer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("activations", "pairs"),
    [
        (fogzo.lsq(8), 3),
        (fogzo.lsq(4), 3),
        (fogzo.lsq(2), 2),  # half levels before the first layer, unsigned ones after a ReLU
        (fogzo.abs_max(8, granularity="token"), 0),
        (fogzo.quest(4), 0),
    ],
)
def test_quantized_inputs(activations, pairs, tmp_path):
    model = quantized(mlp(), fogzo.lsq(4), activations, filter_fn=every_layer)
    report = exported(model, tmp_path)
    assert report.logits_difference < 2e-6
    assert operators(tmp_path)["QuantizeLinear"] == pairs


def test_a_layer_of_two_names(tmp_path):
    layer = nn.Linear(64, 64)
    model = quantized(nn.Sequential(layer, nn.ReLU(), layer).eval(), fogzo.lsq(2))
    report = exported(model, tmp_path)
    assert report.logits_difference < 2e-6
    assert operators(tmp_path)["MatMulNBits"] == 2


def test_an_example_of_one_input_leaves_the_batch_free(tmp_path):
    model = quantized(mlp(), fogzo.lsq(2), filter_fn=every_layer)
    report = exported(model, tmp_path, example=inputs_of(model)[:1])
    assert report.logits_difference < 2e-6
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / onnx.FILE))
    assert isinstance(session.get_inputs()[0].shape[0], str)


def test_no_example(tmp_path):
    with pytest.raises(ValueError, match=r"what a Sequential takes: .*example=x"):
        export(quantized(mlp(), fogzo.lsq(2), filter_fn=every_layer), tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


def test_half_precision_is_refused(tmp_path):
    model = quantized(mlp().bfloat16(), fogzo.lsq(2), filter_fn=every_layer)
    with pytest.raises(ValueError, match=r"written in float32: model.float\(\)"):
        exported(model, tmp_path, example=inputs_of(model).bfloat16())
    assert not list(tmp_path.iterdir())
