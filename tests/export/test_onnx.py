from collections import Counter, UserDict

import pytest
import torch
from networks import inner, inputs_of, llama, logits, quantized, relative, resnet, seeded, vit
from torch import nn

import fogzo
from fogzo.export import export, onnx
from fogzo.quantizers import Grid, Quantizer, learned_scale
from fogzo.quantizers.companding import Bell

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


def linear_layers(quantizers, activations=None, relu=True):
    """A layer of each quantizer, and maybe of each kind of inputs."""
    count = len(quantizers)
    layers = [nn.Linear(64, 64, bias=number != 1) for number in range(count)]
    between = nn.ReLU if relu else nn.Identity
    model = seeded(lambda: nn.Sequential(*(m for layer in layers for m in (layer, between()))))
    for number, quantizer in enumerate(quantizers):
        fogzo.quantize_(
            model,
            quantizer,
            lambda module, name, number=number: name == str(2 * number),
            None if activations is None else activations[number],
        )
    if activations is not None:
        with torch.no_grad(), fogzo.calibrate_(model):
            model(inputs_of(model))
    return model


def mlp():
    return linear_layers([fogzo.lsq(2)])


def convolutions():
    return seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (4, 16)),
            nn.Conv1d(4, 32, 3),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.ConvTranspose1d(32, 16, 3),
            nn.Conv1d(16, 32, 3, groups=2),
            nn.Flatten(),
            nn.Linear(448, 8),
        )
    )


def exported(model, folder, example=None, **options):
    example = inputs_of(model) if example is None else example
    return export(model, folder / "out", "onnx", example=example, **options)


def operators(folder):
    return Counter(node.op_type for node in ir.load(folder / "out" / onnx.FILE).graph)


def test_linear_layers_are_matmul_nbits(tmp_path):
    report = exported(linear_layers(WEIGHTS.values()), tmp_path)
    assert all(layer.exact for layer in report.layers)
    assert report.logits_difference < 2e-6
    assert operators(tmp_path)["MatMulNBits"] == len(report.layers) == len(WEIGHTS)


def test_the_standard_operator(tmp_path):
    model = linear_layers([WEIGHTS[name] for name in ("int2-channel", "int4-g16", "int8")])
    report = exported(model, tmp_path, variant="qdq")
    assert all(layer.exact for layer in report.layers)
    assert report.logits_difference < 2e-6
    # Also in a session without the option that keeps inputs in float32.
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / onnx.FILE))
    found = session.run(None, {session.get_inputs()[0].name: inputs_of(model).numpy()})[0]
    assert relative(torch.from_numpy(found), logits(model)) < 2e-6
    assert operators(tmp_path)["DequantizeLinear"] == 3
    assert not operators(tmp_path)["MatMulNBits"]


def test_convolutions(tmp_path):
    model = convolutions()
    for quantizer, names in ((fogzo.lsq(2), "147"), (fogzo.fixed(8, granularity="channel"), "5")):
        fogzo.quantize_(model, quantizer, lambda module, name, names=names: name in tuple(names))
    report = exported(model, tmp_path)
    assert all(layer.exact for layer in report.layers)
    assert report.logits_difference < 2e-6
    assert operators(tmp_path)["DequantizeLinear"] == 3
    assert operators(tmp_path)["MatMulNBits"] == 1


def test_convolutions_in_groups(tmp_path):
    model = nn.Sequential(
        nn.Unflatten(1, (16, 4)), nn.Conv1d(16, 32, 2), nn.ConvTranspose1d(32, 16, 2)
    ).eval()
    report = exported(quantized(model, fogzo.lsq(4, granularity=16), filter_fn=inner), tmp_path)
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


def test_quantized_inputs(tmp_path):
    kinds = [
        fogzo.lsq(8),
        fogzo.lsq(4),
        fogzo.lsq(2),  # half levels
        fogzo.abs_max(8, granularity="token"),
        fogzo.quest(4),
    ]
    report = exported(linear_layers([fogzo.lsq(4)] * 5, kinds, relu=False), tmp_path)
    assert report.logits_difference < 2e-6
    assert operators(tmp_path)["QuantizeLinear"] == 2


def test_inputs_that_no_integer_operator_knows(tmp_path):
    kinds = [
        Quantizer(Grid("int10", -512, 511), learned_scale("max")),
        Quantizer(fogzo.lsq(4, levels="integer").grid, learned_scale("max"), companding=Bell()),
    ]
    report = exported(linear_layers([fogzo.lsq(4)] * 2, kinds, relu=False), tmp_path)
    assert report.logits_difference < 2e-6
    assert operators(tmp_path)["QuantizeLinear"] == 0


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)
        self.down.weight = self.up.weight
        self.aside = nn.Linear(64, 64)

    def forward(self, x):
        return self.down(self.up(x).relu())


def test_tied_layers_and_a_layer_that_is_not_used(tmp_path):
    model = quantized(Tied().eval(), fogzo.lsq(2), filter_fn=lambda module, name: name != "aside")
    x = torch.randn(1, 64, requires_grad=True)
    assert exported(model, tmp_path, example=x).logits_difference < 2e-6
    assert operators(tmp_path)["MatMulNBits"] == 2
    model = quantized(Tied().eval(), fogzo.lsq(2))
    with pytest.raises(ValueError, match=r"does not use 'aside' in eval mode.*model.aside = None"):
        exported(model, tmp_path, example=x)


def test_inputs_that_are_never_negative(tmp_path):
    report = exported(linear_layers([fogzo.lsq(4)] * 3, [fogzo.lsq(2)] * 3), tmp_path)
    assert report.logits_difference < 2e-6
    assert operators(tmp_path)["QuantizeLinear"] == 2  # of unsigned levels, after a ReLU


class ReadsItsWeight(nn.Module):
    """A linear layer whose weight is used a second time, in a way of its own."""

    def __init__(self, use):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.use = use

    def forward(self, x):
        return self.use(self.layer(x).relu(), self.layer.weight, self.layer.bias)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, weight, bias: nn.functional.linear(x, weight.t()),  # a tied decoder
        lambda x, weight, bias: x @ weight,
        lambda x, weight, bias: torch.addmm(bias, x, weight),
        lambda x, weight, bias: torch.addmm(bias, x, weight.t(), alpha=3, beta=0.5),
        lambda x, weight, bias: x @ (weight.t() + 1),
        lambda x, weight, bias: weight.t() @ x,
    ],
    ids=["linear-t", "matmul", "addmm", "alpha", "sum", "left"],
)
def test_a_weight_that_is_used_otherwise_too(use, tmp_path):
    model = fogzo.quantize_(seeded(lambda: ReadsItsWeight(use)), fogzo.lsq(2), inner)
    x = torch.randn(16, 16)
    export(model, tmp_path / "out", "onnx", example=x)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / onnx.FILE), options)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    expected = fogzo.dequantize_(model)(x).detach()
    assert relative(torch.from_numpy(found), expected) < 1e-5


def test_a_layer_of_two_names(tmp_path):
    layer = nn.Linear(64, 64)
    model = quantized(nn.Sequential(layer, nn.ReLU(), layer).eval(), fogzo.lsq(2))
    report = exported(model, tmp_path)
    assert report.logits_difference < 2e-6
    assert operators(tmp_path)["MatMulNBits"] == 2


def test_an_example_of_one_input_leaves_the_batch_free(tmp_path):
    model = mlp()
    example = UserDict(input=inputs_of(model)[:1])  # as tokenizers return it
    report = exported(model, tmp_path, example=example)
    assert report.logits_difference < 2e-6
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / onnx.FILE))
    assert isinstance(session.get_inputs()[0].shape[0], str)


def test_arguments_that_are_no_tensors(tmp_path):
    class Model(nn.Sequential):
        def forward(self, x, negated=False):
            return -super().forward(x) if negated else super().forward(x)

    model = fogzo.quantize_(Model(nn.Linear(16, 16), nn.Linear(16, 4)), fogzo.lsq(2))
    assert exported(model, tmp_path, example=(torch.randn(3, 16), True)).logits_difference < 2e-6


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x, state):
        return self.head(self.cell(x, state)[0])


class TwoStates(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, x, states):
        first, second = states
        return self.head(x) + first * second


def one_image():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(0), nn.Linear(144, 4))


@pytest.mark.parametrize(
    ("build", "example"),
    [
        (Recurrent, (torch.ones(4, 5, 8), torch.zeros(1, 4, 16))),
        (TwoStates, (torch.ones(4, 16), (torch.ones(4, 4), torch.ones(4, 4)))),
        (one_image, torch.ones(1, 8, 8)),
    ],
)
def test_a_first_dimension_of_one_that_is_no_batch(build, example, tmp_path):
    model = quantized(build().eval(), fogzo.lsq(2), filter_fn=inner)
    assert exported(model, tmp_path, example=example).logits_difference < 2e-6


class ReturnsFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        features = self.body(x)
        return {"features": features, "none": None, "logits": self.head(features.relu())}


def test_logits_that_are_not_the_first_output(tmp_path):
    model = fogzo.quantize_(seeded(ReturnsFeatures), fogzo.lsq(2), lambda module, name: True)
    report = export(model, tmp_path / "out", "onnx", example=torch.randn(2, 16))
    assert report.logits_difference < 2e-6


@pytest.mark.parametrize("verify", [True, False])
def test_an_autocast_block_around_the_export_changes_nothing(verify, tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        export(mlp(), tmp_path / "out", "onnx", example=torch.randn(2, 64), verify=verify)
    assert "Cast" not in operators(tmp_path)


def test_what_torch_cannot_trace_is_explained(tmp_path):
    class Branches(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    model = fogzo.quantize_(Branches(16, 16), fogzo.lsq(2), inner)
    with pytest.raises(ValueError, match=r"torch.onnx cannot trace .* format=\"packed\""):
        exported(model, tmp_path, example=torch.ones(2, 16))
    with pytest.raises(ValueError, match=r"does not answer to the example \(RuntimeError"):
        exported(model, tmp_path, example=torch.ones(2, 7))
    assert not list(tmp_path.iterdir())


def test_no_example(tmp_path):
    with pytest.raises(ValueError, match=r"what a Sequential takes: .*example=x"):
        export(mlp(), tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


def test_half_precision_is_refused(tmp_path):
    model = mlp().bfloat16()
    with pytest.raises(ValueError, match=r"written in float32: model.float\(\)"):
        exported(model, tmp_path, example=inputs_of(model).bfloat16())
    assert not list(tmp_path.iterdir())
