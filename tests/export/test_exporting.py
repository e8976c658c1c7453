import json
import logging
import os
import re
from types import SimpleNamespace

import pytest
import torch
from networks import (
    NETWORKS,
    inner,
    inner_linear,
    inputs_of,
    llama,
    logits,
    mixtral,
    mlp,
    quantized,
    tied_llama,
    vit,
)
from safetensors.torch import load_file, load_model
from torch import nn

import fogzo
from fogzo.export import check, export, exporting, formats, load_
from fogzo.export.format_table import FORMATS
from fogzo.export.verify import ReadBack, answer, difference, example_of
from forked import Python, finish


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
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    finish(Python(tmp_path / "program.py", *folders))
    (tmp_path / "program.py").unlink()
    assert state(tmp_path / "old") == before
    names = sorted(path.name for path in tmp_path.iterdir())
    prefixes = (".new.fogzo-export-", ".old.fogzo-export-", "old")
    assert len(names) == 3 and all(map(str.startswith, names, prefixes))
    for folder in folders:
        export(model, folder, verify=False)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}


@pytest.mark.parametrize("moves", [0, 1])
def test_a_folder_that_cannot_be_replaced_is_put_back(moves, tmp_path, monkeypatch):
    model = quantized(mlp(), fogzo.lsq(2))
    export(model, tmp_path / "out", verify=False)
    before, real, calls = state(tmp_path / "out"), os.replace, []

    def replace(source, target):
        calls.append(source)
        if len(calls) == moves + 1:
            raise OSError("busy")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="busy"):
        export(model, tmp_path / "out", "float", verify=False)
    assert state(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_a_killed_export_moved_away_comes_back(fake, tmp_path):
    model = quantized(mlp(), fogzo.lsq(2))
    left = tmp_path / ".out.fogzo-export-12345678"
    export(model, left / "old", verify=False)
    (left / "new").mkdir()
    before = state(left / "old")

    def write(source, folder):
        raise OSError("disk full")

    fake(write=write)
    with pytest.raises(OSError, match="disk full"):
        export(model, tmp_path / "out")
    assert state(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_beside_it_are_left_alone(tmp_path):
    model = quantized(mlp(), fogzo.lsq(2))
    others = [tmp_path / f"out{end}" for end in (".old", ".partial", "2")]
    for other in (*others, tmp_path / ".out", tmp_path / ".out2.fogzo-export-12345678"):
        other.mkdir()
        (other / "thesis.txt").write_text("years of work")
    names = {path.name for path in tmp_path.iterdir()}
    for format in ("packed", "float"):
        export(model, tmp_path / "out", format, verify=False)
        assert {path.name for path in tmp_path.iterdir()} == names | {"out"}
    assert all(state(other) == {"thesis.txt": b"years of work"} for other in others)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_it_may_be_read_by_whom_new_folders_may(tmp_path):
    (tmp_path / "other").mkdir()
    export(quantized(mlp(), fogzo.lsq(2)), tmp_path / "out", verify=False)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


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


def test_an_input_that_nothing_reaches_is_given_a_step_as_the_error_says(tmp_path):
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)
    fogzo.quantize_(model, fogzo.lsq(2), lambda *_: True, activations=fogzo.lsq(2))
    model(torch.randn(4, 8))
    with pytest.raises(ValueError, match="the input of 'unused' has no step size yet") as error:
        export(model, tmp_path / "out")
    exec(re.search(r"model\.get_submodule.*", str(error.value))[0])
    with pytest.warns(UserWarning, match="the forward of 'unused' never ran"):
        export(model, tmp_path / "out")


class Masking(nn.Module):
    """Draws in eval mode too, as ViTMAE does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x * torch.rand_like(x).gt(0.5))


def test_models_that_draw_random_numbers_are_compared_at_the_same_ones(tmp_path):
    model = fogzo.quantize_(Masking(), fogzo.lsq(2), lambda *_: True)
    stream = torch.get_rng_state()
    report = export(model, tmp_path / "out", example=torch.ones(4, 8))
    assert report.logits_difference == 0
    assert torch.equal(torch.get_rng_state(), stream)


NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


def damaged(change, quantizer, activations=None):
    """A model whose first layer something was done to after it was trained."""
    model = quantized(mlp(), quantizer, activations)
    with torch.no_grad():
        change(model[1])
    return model


def refused(model, format, message, tmp_path):
    (problem,) = check(model, format)
    assert problem.startswith(f"cannot write '1' as {format}: {message}")
    assert "model.load_state_dict(earlier)" in problem
    with pytest.raises(ValueError, match=re.escape(problem)):
        export(model, tmp_path / "out", format, verify=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("format", ["packed", "float", "onnx"])
def test_numbers_that_are_not_finite_are_refused(format, value, tmp_path):
    model = damaged(lambda layer: layer.weight[3].fill_(value), fogzo.lsq(2))
    refused(model, format, "64 of its 2,048 weights are not finite", tmp_path)
    model = damaged(lambda layer: layer.weight_step.fill_(value), fogzo.lsq(2))
    refused(model, format, "1 of its 1 step sizes are not finite", tmp_path)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_step_sizes_of_inputs_that_are_not_finite_are_refused(value, tmp_path):
    model = damaged(lambda layer: layer.input_step.fill_(value), fogzo.lsq(2), fogzo.lsq(4))
    refused(model, "packed", "the step size of its input is not finite", tmp_path)
    with torch.no_grad(), fogzo.calibrate_(model):
        model(inputs_of(model))
    assert check(model, "packed") == []


@pytest.mark.parametrize("quantizer", [fogzo.ternary(), fogzo.quest(2), fogzo.abs_max(4)])
def test_weights_that_are_not_finite_are_refused_by_every_scale(quantizer, tmp_path):
    model = damaged(lambda layer: layer.weight[3, 4].fill_(float("nan")), quantizer)
    refused(model, "packed", "1 of its 2,048 weights are not finite", tmp_path)


def test_steps_that_their_dtype_would_make_finite_are_refused(tmp_path):
    quantizer = fogzo.lsq(2, granularity="channel", scale_dtype=torch.float16)
    model = damaged(lambda layer: layer.weight_step[:3].fill_(float("inf")), quantizer)
    refused(model, "packed", "3 of its 32 step sizes are not finite", tmp_path)
    fogzo.measure_step_sizes_(model)
    assert check(model, "packed") == []


@pytest.mark.parametrize("verify", [True, False])
def test_a_network_in_its_float_phase_is_refused(verify, tmp_path):
    model = quantized(mlp(), fogzo.lsq(2))
    switch = fogzo.methods.quantize_from(model, 0.5, total_steps=2)
    message = "cannot write '1' as packed: it is in float until its quantization begins"
    assert len(check(model, "packed")) == 3
    with pytest.raises(ValueError, match=rf"{message}.*call switch.advance_\(\) of fogzo.methods"):
        export(model, tmp_path / "out", verify=verify)
    assert not list(tmp_path.iterdir())
    switch.advance_()
    assert check(model, "packed") == []
    export(model, tmp_path / "out", verify=verify)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda found: found.fill_(float("nan")), r"shape \(8, 10\), not all finite"),
        (lambda found: found[:, 1:], r"shape \(8, 9\), finite"),
    ],
)
def test_answers_that_are_not_finite_are_refused_unless_the_models_are(wrong, says, fake, tmp_path):
    model = quantized(mlp(), fogzo.lsq(2))
    x = inputs_of(model)

    def read_back(source, folder):
        weights = {n: layer.weight.dequantize() for n, layer in source.layers.items()}
        return ReadBack("a reader", weights, lambda example: wrong(answer(model, example)))

    fake(read_back=read_back)
    with pytest.raises(RuntimeError, match=rf"a reader answers .* {says}, expected .* finite as"):
        export(model, tmp_path / "out", example=x)
    assert not list(tmp_path.iterdir())
    export(model, tmp_path / "out", example=x * float("nan"))


def test_other_answers_from_the_same_weights_are_warned_of(fake, tmp_path, caplog):
    model = quantized(mlp(), fogzo.lsq(2))
    x = inputs_of(model)

    for factor, warned in ((1.01, False), (0.8, True)):

        def read_back(source, folder, factor=factor):
            weights = {n: layer.weight.dequantize() for n, layer in source.layers.items()}
            return ReadBack("a reader", weights, lambda example: factor * answer(model, example))

        fake(read_back=read_back)
        export(model, tmp_path / "out", example=x)
        assert ("a difference of 20% of the largest logit" in caplog.text) == warned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "packd"}, "no format 'packd': did you mean 'packed'"),
        ({"format": "zip"}, "choose from packed, float"),
        ({"activations": "none"}, "activations must be 'keep' or 'drop', got 'none'"),
        ({"round_steps": "yes"}, "round_steps must be of type bool"),
        ({"variant": "small"}, "packed has no variant 'small', expected none"),
        ({"tokenizer": "gpt2"}, "must be one of transformers, got 'gpt2'"),
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


@pytest.mark.parametrize("format", ["float", "mlx"])
@pytest.mark.parametrize("make", [vit, tied_llama, mixtral])
def test_tensors_are_named_as_on_the_hub(make, format, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "plain")
    quantized(model, fogzo.lsq(2, scale_dtype=torch.float16))
    report = export(model, tmp_path / "out", format)
    assert all(layer.exact for layer in report.layers)
    expected, found = (
        set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("plain", "out")
    )
    assert {name for name in found if not name.endswith((".scales", ".biases"))} == expected
    if format == "mlx":
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
        layers = {name for name, value in config.items() if isinstance(value, dict)}
        assert layers == {name.removesuffix(".scales") for name in found if ".scales" in name}


@pytest.mark.parametrize("format", ["packed", "float", "compressed-tensors"])
def test_readers_take_the_dtype_of_the_quantized_weights(format, tmp_path):
    model = llama()
    model.model.embed_tokens.bfloat16()
    if format != "compressed-tensors":  # which would not round the first one's products to it
        model.model.layers[0].self_attn.q_proj.bfloat16()
    report = export(quantized(model, fogzo.lsq(2)), tmp_path / "out", format)
    assert all(layer.exact for layer in report.layers)
    assert type(model).from_pretrained(tmp_path / "out").dtype == torch.float32


def test_tied_float_folders_hold_tied_weights_once(tmp_path):
    model = fogzo.quantize_(tied_llama(), fogzo.lsq(2), lambda *_: True).eval()
    x = inputs_of(model)
    assert export(model, tmp_path / "out", "float", example=x).logits_difference == 0
    served = type(model).from_pretrained(tmp_path / "out").eval()
    assert served.lm_head.weight is served.model.embed_tokens.weight
    assert torch.equal(logits(served, x), logits(model, x))


@pytest.mark.parametrize("format", ["packed", "float"])
def test_what_is_compiled_in_parts_is_exported_as_the_plain_network(format, tmp_path):
    block, head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 4)
    fogzo.quantize_(nn.Sequential(block, head), fogzo.lsq(2), lambda *_: True)
    parts = [torch.compile(part, backend="eager") for part in (block, head)]
    model = nn.Sequential(*parts)
    report = export(model, tmp_path / "out", format, example=torch.randn(3, 8))
    assert report.logits_difference == 0
    assert [layer.name for layer in report.layers] == ["0.0", "0.1", "1"]
    assert [*model] == parts


def test_dropped_inputs_are_a_difference_that_is_reported(tmp_path):
    model = quantized(mlp(), fogzo.lsq(2), fogzo.lsq(2))
    with pytest.raises(ValueError, match='activations="drop" exports the weights alone'):
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

    class Named(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            return {"hidden": x, self.name: 2 * x}

    class Text(nn.Module):
        def forward(self, x):
            return "no"

    assert torch.equal(answer(Pair(), x), x)
    assert torch.equal(answer(Named("logits"), x), 2 * x)
    assert torch.equal(answer(Named("more"), x), x)  # as models of transformers without a head
    with pytest.raises(ValueError, match="the model answers with str"):
        answer(Text(), x)


class Tokens(nn.Embedding):
    """Says what it takes as models of transformers do."""

    main_input_name = "input_ids"
    config = SimpleNamespace(vocab_size=8)

    def forward(self, input_ids):
        return super().forward(input_ids)


class Translation(Tokens):
    def forward(self, input_ids, decoder_input_ids):
        return super().forward(input_ids) + super().forward(decoder_input_ids)


class Boxes(Tokens):
    def forward(self, input_ids, boxes):
        return super().forward(input_ids)


class Wide(nn.Conv2d):
    main_input_name = "pixel_values"
    config = SimpleNamespace(num_channels=3, image_size=[4, 6])


def test_examples_are_what_a_model_says_that_it_takes():
    assert example_of(Tokens(8, 2)).shape == (1, 16)
    assert [*example_of(Translation(8, 2))] == ["input_ids", "decoder_input_ids"]
    assert example_of(Boxes(8, 2)) is None
    assert example_of(Wide(3, 2, 1)).shape == (1, 3, 4, 6)


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


@pytest.mark.parametrize("format", ["packed", "float"])
def test_what_a_forward_pass_left_in_the_model_is_no_obstacle(format, tmp_path):
    class Keeps(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            self.penalty, self.steps = y.pow(2).mean(), {"all": [y]}
            return y

    model = fogzo.quantize_(Keeps(nn.Linear(8, 8)), fogzo.lsq(4), inner)
    x = torch.randn(3, 8)
    model(x)
    penalty = model.penalty
    assert export(model, tmp_path / "out", format, example=x).logits_difference == 0
    penalty.backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("tied", [False, True])
def test_float_folders_are_verified_as_the_report_says(tied, tmp_path):
    def build():
        model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False))
        if tied:
            model[2].weight = model[0].weight
        return model

    model = fogzo.quantize_(build(), fogzo.lsq(4), lambda _, name: name == "1")
    x = torch.arange(16)
    report = export(model, tmp_path / "out", "float", example=x)
    assert report.logits_difference == 0
    served, path = build(), tmp_path / "out" / "model.safetensors"
    if tied:
        assert report.reader == "safetensors.torch.load_model"
        load_model(served, path)
    else:
        assert report.reader == "torch load_state_dict"
        served.load_state_dict(load_file(path))
    assert torch.equal(served(x), model(x))


class Masked(nn.Linear):
    def forward(self, x):
        return super().forward(x).masked_fill(torch.arange(8) > 6, -torch.inf)


def test_infinite_answers_are_compared_too(fake, tmp_path):
    model = fogzo.quantize_(Masked(8, 8), fogzo.lsq(4), inner)
    x = torch.randn(2, 8)
    assert export(model, tmp_path / "out", example=x).logits_difference == 0
    assert "NaN" not in (tmp_path / "out" / "export.json").read_text()
    for wrong in (lambda y: y.clamp(min=-1e9), torch.neg, lambda y: torch.full_like(y, -torch.inf)):

        def read_back(source, folder, wrong=wrong):
            weights = {n: layer.weight.dequantize() for n, layer in source.layers.items()}
            return ReadBack("a reader", weights, lambda example: wrong(answer(model, example)))

        fake(read_back=read_back)
        with pytest.raises(RuntimeError, match="a reader answers to the example"):
            export(model, tmp_path / "out", example=x)


def test_answers_that_are_no_numbers_are_not_compared(tmp_path):
    model = quantized(mlp(), fogzo.lsq(2))
    report = export(model, tmp_path / "out", example=inputs_of(model) * float("nan"))
    assert report.logits_difference is None


def test_swapped_and_missing_arguments_are_explained(tmp_path):
    model = quantized(mlp(), fogzo.lsq(2))
    for call in (
        lambda: export(tmp_path, model),
        lambda: export(model, None),
        lambda: load_(mlp(), None),
    ):
        with pytest.raises(ValueError, match=r"(?s)folder must be of type str .*, got .*, \"out\""):
            call()
    for call in (
        lambda: export(model.state_dict(), tmp_path / "out"),
        lambda: check(model.state_dict(), "packed"),
        lambda: load_(tmp_path, model),
    ):
        with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got .*\(model, "):
            call()
    for example in (torch.ones(2, 7), "hello", (1, 2, 3)):
        model = quantized(mlp(), fogzo.lsq(2))
        with pytest.raises(ValueError, match="the model does not answer to the example"):
            export(model, tmp_path / "out", example=example)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["packed", "compressed-tensors", "mlx"])
@pytest.mark.parametrize(
    ("dtype", "scale_dtype"),
    [(torch.float32, None), (torch.float32, torch.float16), (torch.bfloat16, None)],
)
def test_bits_per_weight_are_those_of_the_file(format, dtype, scale_dtype, tmp_path):
    quantizer = fogzo.lsq(2, levels="integer", granularity=32, scale_dtype=scale_dtype)
    model = fogzo.quantize_(llama().to(dtype), quantizer, inner_linear)
    report = export(model, tmp_path / "out", format, round_steps=True, verify=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for layer in report.layers:
        own = {k: t for k, t in tensors.items() if k.startswith(f"{layer.name}.")}
        held = sum(tensor.nbytes for name, tensor in own.items() if not name.endswith("_shape"))
        assert layer.bits == 8 * held / model.get_submodule(layer.name).weight.numel()


@pytest.mark.parametrize("format", ["packed", "float", "compressed-tensors", "mlx"])
def test_a_generation_config_that_transformers_does_not_save_is_told_before(format, tmp_path):
    quantizer = fogzo.lsq(2, levels="integer", scale_dtype=torch.float16)
    model = fogzo.quantize_(llama(), quantizer, inner_linear)
    model.generation_config.temperature = 0.5  # and greedy still
    message = r"refuses to save .*do_sample.*GenerationConfig\.from_model_config"
    (problem,) = check(model, format)
    assert re.search(message, problem)
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", format)
    assert check(model, "gguf", allow_wider=True) == check(model, "onnx") == []
    own = model.generation_config.from_model_config(model.config)
    model.generation_config = own
    assert check(model, format) == []
    export(model, tmp_path / "out", format, verify=False)


@pytest.mark.parametrize("format", ["packed", "float"])
def test_tensors_that_no_file_holds_are_told_before(format, tmp_path):
    for tensor in (torch.eye(3).to_sparse(), torch.ones(3, dtype=torch.complex128)):
        model = quantized(mlp(), fogzo.lsq(2))
        model.register_buffer("mixing", tensor)
        message = r"'mixing' of .* is a tensor of torch\.(sparse_coo|complex128), .*persistent"
        (problem,) = check(model, format)
        assert re.search(message, problem)
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "out", format)
        model.register_buffer("mixing", tensor, persistent=False)
        export(model, tmp_path / "out", format)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_files_are_named(name, tmp_path):
    export(quantized(mlp(), fogzo.lsq(2)), tmp_path / "out", verify=False)
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged .*export the model again"):
        load_(mlp(), tmp_path / "out")


def test_the_home_folder_has_its_short_name(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    export(quantized(mlp(), fogzo.lsq(2)), "~/out", verify=False)
    assert load_(mlp(), "~/out") and (tmp_path / "out" / "export.json").is_file()


def test_what_was_put_into_an_export_is_not_deleted(tmp_path):
    model = quantized(mlp(), fogzo.lsq(2))
    report = export(model, tmp_path / "out", verify=False)
    assert report.files == ("config.json", "model.safetensors")
    (tmp_path / "out" / "eval").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"also holds 'README\.md', 'eval', .*move them elsewhere"):
        export(model, tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    (tmp_path / "out" / "README.md").rename(tmp_path / "README.md")
    (tmp_path / "out" / "eval").rename(tmp_path / "eval")
    export(model, tmp_path / "out", verify=False)


@pytest.mark.parametrize("text", ['{"version": 3}', "[1, 2]", "not JSON"])
def test_a_report_of_another_program_is_no_export(text, tmp_path):
    (tmp_path / "export.json").write_text(text)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something that no export wrote"):
        export(quantized(mlp(), fogzo.lsq(2)), tmp_path, verify=False)
    assert {path.name for path in tmp_path.iterdir()} == {"export.json", "thesis.txt"}


def test_what_cannot_be_replaced_as_a_whole_is_refused(tmp_path, monkeypatch):
    model = quantized(mlp(), fogzo.lsq(2))
    monkeypatch.chdir(tmp_path)
    for folder in (".", "", tmp_path):
        with pytest.raises(ValueError, match=r"is the current folder, .*: name one in it"):
            export(model, folder, verify=False)
    with pytest.raises(ValueError, match="is a mount point"):
        export(model, tmp_path.anchor, verify=False)
    export(model, tmp_path / "export", verify=False)
    assert os.listdir() == ["export"]


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")
def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    for _ in range(2):
        export(quantized(mlp(), fogzo.lsq(2)), tmp_path / "out", verify=False)
        assert (tmp_path / "out").is_symlink()
    assert load_(mlp(), tmp_path / "real")
