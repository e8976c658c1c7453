import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from networks import NETWORKS, inner, inputs_of, llama, logits, mlp, quantized, tied_llama
from torch import nn

import fogzo
from fogzo.export import check, export, exporting, formats, load_
from fogzo.export.format_table import FORMATS
from fogzo.export.verify import ReadBack, answer, difference


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def fake(monkeypatch):
    """The packed format with a writer or reader of the test's own."""

    def install(**functions):
        real = exporting.import_module("fogzo.export.packed")
        module = SimpleNamespace(**{"write": real.write, "read_back": real.read_back, **functions})
        monkeypatch.setattr(exporting, "import_module", lambda name: module)

    return install


def test_the_report_is_also_a_file(tmp_path):
    model = quantized(mlp(), fogzo.ternary(scale_dtype=torch.float16))
    report = export(model, tmp_path / "out", example=inputs_of(model))
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    layer = report.layers[0]
    assert (layer.name, layer.stored, layer.exact, layer.step_rounding) == ("1", "1.6 bit", True, 0)
    assert layer.bits == pytest.approx(1.6 + 16 / (64 * 32))
    assert report.float_bytes == 4 * sum(p.numel() for p in mlp().parameters())
    on_disk = sum(
        len(data) for name, data in state(tmp_path / "out").items() if name[:6] != "export"
    )
    assert report.bytes == on_disk
    assert report.logits_difference == 0


@pytest.mark.parametrize("network", ["vit", "resnet", "llama"])
def test_models_of_transformers_need_no_example(network, tmp_path):
    report = export(quantized(NETWORKS[network](), fogzo.lsq(2)), tmp_path / "out")
    assert report.logits_difference == 0


def test_other_models_without_an_example_are_compared_by_weights_alone(tmp_path):
    report = export(quantized(mlp(), fogzo.lsq(2)), tmp_path / "out")
    assert report.logits_difference is None
    assert all(layer.exact for layer in report.layers)


def test_unverified_is_said_so(tmp_path):
    report = export(quantized(mlp(), fogzo.lsq(2)), tmp_path / "out", verify=False)
    assert [layer.exact for layer in report.layers] == [None] * 3
    assert report.reader is None
    assert report.note == "not verified"


def test_a_missing_reader_is_said_so(fake, tmp_path, caplog):
    def read_back(source, folder):
        raise ModuleNotFoundError("No module named 'reader'", name="reader")

    fake(read_back=read_back)
    report = export(quantized(mlp(), fogzo.lsq(2)), tmp_path / "out")
    assert report.note == "not verified, as its reader is not installed: pip install reader"
    assert report.note in caplog.text
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("wrong", ["weights", "writer"])
def test_what_goes_wrong_leaves_the_old_folder_as_it_was(wrong, fake, tmp_path):
    model = quantized(mlp(), fogzo.lsq(2))
    export(model, tmp_path / "out", verify=False)
    before = state(tmp_path / "out")

    def read_back(source, folder):
        weights = {n: layer.weight.dequantize() for n, layer in source.layers.items()}
        return ReadBack("a reader", weights | {"3": weights["3"] * (1 + 1e-6)})

    def write(source, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    fake(**({"read_back": read_back} if wrong == "weights" else {"write": write}))
    message = "a reader reads '3' from the packed files as other weights"
    error = RuntimeError if wrong == "weights" else OSError
    with pytest.raises(error, match=message if wrong == "weights" else "disk full"):
        export(model, tmp_path / "out")
    assert state(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows ends processes otherwise")
def test_a_killed_export_leaves_the_old_folder_or_none(tmp_path):
    model = quantized(mlp(), fogzo.lsq(2))
    export(model, tmp_path / "old", verify=False)
    before = state(tmp_path / "old")
    program = (
        "import os, signal, sys, fogzo; from torch import nn\n"
        "from fogzo.export import export, packed\n"
        "write = packed.write\n"
        "def killed(source, folder):\n"
        "    write(source, folder); os.kill(os.getpid(), signal.SIGKILL)\n"
        "packed.write = killed\n"
        "model = fogzo.quantize_(nn.Linear(8, 4), fogzo.lsq(2), lambda *_: True)\n"
        "for folder in sys.argv[1:]:\n"
        "    child = os.fork()\n"
        "    if not child: export(model, folder)\n"
        "    assert os.waitpid(child, 0)[1] == signal.SIGKILL\n"
    )
    folders = [str(tmp_path / name) for name in ("new", "old")]
    subprocess.run([sys.executable, "-c", program, *folders], check=True)
    assert state(tmp_path / "old") == before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"old", "old.partial", "new.partial"}
    for folder in folders:
        export(model, folder, verify=False)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}


def test_a_former_export_is_replaced_and_nothing_else(tmp_path):
    model = quantized(mlp(), fogzo.lsq(2))
    export(model, tmp_path / "out", "float", verify=False)
    export(model, tmp_path / "out", "packed", verify=False)
    assert load_(mlp(), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something that no export wrote"):
        export(model, tmp_path / "mine")
    with pytest.raises(ValueError, match="holds something that no export wrote"):
        export(model, tmp_path / "mine" / "thesis.txt")
    assert state(tmp_path / "mine") == {"thesis.txt": b"years of work"}
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty", verify=False)


def test_nothing_quantized_is_refused(tmp_path):
    for model in (nn.Linear(4, 4), fogzo.dequantize_(quantized(mlp(), fogzo.lsq(2)))):
        with pytest.raises(ValueError, match="nothing in this model is quantized"):
            export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_inputs_that_were_never_measured_are_refused(tmp_path):
    model = fogzo.quantize_(mlp(), fogzo.lsq(2), inner, activations=fogzo.lsq(2))
    with pytest.raises(ValueError, match="the input of '1' has no step size yet"):
        export(model, tmp_path / "out")
    assert check(model, "packed") == []  # before training it is no problem
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "packd"}, "no format 'packd': did you mean 'packed'"),
        ({"format": "zip"}, "choose from packed, float"),
        ({"activations": "none"}, "activations must be 'keep' or 'drop', got 'none'"),
        ({"round_steps": "yes"}, "round_steps must be of type bool"),
        ({"variant": "small"}, "packed has no variant 'small', expected none"),
    ],
)
def test_mistakes_are_explained(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(quantized(mlp(), fogzo.lsq(2)), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("quantizer", [fogzo.lsq(2), fogzo.quest(2)])
def test_float_folders_hold_the_same_weights(network, quantizer, tmp_path):
    model = quantized(NETWORKS[network](), quantizer, filter_fn=inner)
    x = inputs_of(model)
    report = export(model, tmp_path / "out", "float", example=x)
    assert report.logits_difference == 0
    assert all(layer.exact for layer in report.layers)
    if network != "mlp":
        served = type(model).from_pretrained(tmp_path / "out").eval()
        assert torch.equal(logits(served, x), logits(model, x))


def test_tied_float_folders_hold_tied_weights_once(tmp_path):
    model = fogzo.quantize_(tied_llama(), fogzo.lsq(2), lambda *_: True).eval()
    x = inputs_of(model)
    assert export(model, tmp_path / "out", "float", example=x).logits_difference == 0
    served = type(model).from_pretrained(tmp_path / "out").eval()
    assert served.lm_head.weight is served.model.embed_tokens.weight
    assert torch.equal(logits(served, x), logits(model, x))


def test_dropped_inputs_are_a_difference_that_is_reported(tmp_path):
    model = quantized(mlp(), fogzo.lsq(2), fogzo.lsq(2))
    with pytest.raises(ValueError, match="--activations drop exports the weights alone"):
        export(model, tmp_path / "out", "float")
    for format in ("float", "packed"):
        report = export(
            model, tmp_path / "out", format, activations="drop", example=inputs_of(model)
        )
        assert all(layer.exact for layer in report.layers)
        assert report.logits_difference > 0.01


def test_exporting_leaves_modes_gradients_and_log_alone(tmp_path, caplog):
    model = quantized(mlp(), fogzo.lsq(2), fogzo.lsq(2)).train()
    model[2].eval()
    model(inputs_of(model)).sum().backward()
    before = [module.training for module in model.modules()]
    grads = {name: p.grad for name, p in model.named_parameters()}
    with caplog.at_level(logging.WARNING):
        export(model, tmp_path / "out", example=inputs_of(model))
    assert [module.training for module in model.modules()] == before
    assert {name: p.grad for name, p in model.named_parameters()} == grads
    assert caplog.text == ""


def test_layers_that_the_model_goes_around_are_warned_of(tmp_path):
    class GoesAround(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.called(x) @ self.read.weight

    model = fogzo.quantize_(GoesAround(), fogzo.lsq(2), inner)
    model(torch.ones(1, 8))
    with pytest.warns(UserWarning, match="the forward of 'read' never ran"):
        report = export(model.eval(), tmp_path / "out", example=torch.ones(1, 8))
    assert report.logits_difference > 0


def test_answers_are_found_in_what_models_return():
    x = torch.ones(2, 3)
    assert torch.equal(answer(nn.Identity(), x), x)
    assert torch.equal(answer(nn.Identity(), (x,)), x)
    assert torch.equal(answer(nn.Identity(), {"input": x}), x)

    class Pair(nn.Module):
        def forward(self, x):
            return x, 2 * x

    class Text(nn.Module):
        def forward(self, x):
            return "no"

    assert torch.equal(answer(Pair(), x), x)
    with pytest.raises(ValueError, match="the model answers with str"):
        answer(Text(), x)


def test_differences_are_relative_to_the_largest_value():
    expected = torch.tensor([1.0, -4.0])
    assert difference(expected, expected.clone()) == 0
    assert difference(expected + torch.tensor([0.0, 1.0]), expected) == 0.25
    assert difference(torch.ones(3), expected) == float("inf")
    assert difference(torch.zeros(2), torch.zeros(2)) == 0


def test_every_format_is_listed_once():
    assert len(set(formats())) == len(formats())
    assert set(formats()) <= set(FORMATS)


def test_rounded_steps_keep_the_codes_and_are_reported(tmp_path):
    pytest.importorskip("gguf")
    model = fogzo.quantize_(llama(width=256), fogzo.lsq(2, granularity="channel")).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="its step sizes are no float16"):
        export(model, tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())
    report = export(model, tmp_path / "out", "gguf", round_steps=True)
    assert 0 < report.logits_difference < 2e-3
    assert all(0 < layer.step_rounding < 2**-11 for layer in report.layers)
    assert not any(layer.exact for layer in report.layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    held = fogzo.quantize_(
        llama(width=256), fogzo.lsq(2, granularity="channel", scale_dtype=torch.float16)
    )
    report = export(held, tmp_path / "out", "gguf", round_steps=True)
    assert all(layer.exact and layer.step_rounding == 0 for layer in report.layers)
    assert report.logits_difference == 0
