"""fogzo export: from a run to the folder that serves its network."""

import json
from dataclasses import replace

import pytest
import torch
from texts import PROSE, save_tokenizer, tokenizer_of
from transformers import AutoTokenizer

from fogzo.export import load_
from fogzo_lab.cli.main import main
from fogzo_lab.training.evaluate import EvalConfig, evaluate_run
from fogzo_lab.training.model_config import QuantizerConfig
from fogzo_lab.training.models import build_model
from fogzo_lab.training.run_folder import read_config
from fogzo_lab.training.tasks import load_task


def command(capsys, *arguments):
    code = 0
    try:
        main(list(map(str, arguments)))
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    main(
        [
            *("train", "digits-mlp", "--output-dir", str(folder), "--max-steps", "20"),
            *("--checkpoint-every", "10", "--ema-decay", "0.9", "--quantizer.preset", "lsq"),
            *("--quantizer.levels", "integer", "--quantizer.scale-dtype", "float16"),
            *("--activations.preset", "lsq"),
        ]
    )
    return folder


def served(run, folder):
    """The network in float, with what was exported in its layers."""
    config = read_config(run)
    task = load_task(config)
    in_float = replace(config, quantizer=QuantizerConfig(), activations=QuantizerConfig())
    plain = build_model(in_float, task.shapes)
    return task, load_(plain, folder).eval()


def test_the_served_network_scores_what_the_run_scored(run, capsys):
    code, out, err = command(capsys, "export", run)
    assert code == 0, err
    assert "packed export" in out
    assert "logits differ by 0 of the largest" in out
    task, model = served(run, run / "export" / "packed")
    expected = evaluate_run(EvalConfig(run=run, device="cpu"))  # of the averaged weights
    images, labels = task.prepare(
        task.splits["test"].batch(torch.arange(len(task.splits["test"]))),
        torch.device("cpu"),
        training=False,
    )
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(expected["test_accuracy"])
    assert model[1].scales.dtype == torch.float16


def test_json_and_a_folder_of_ones_own(run, tmp_path, capsys):
    code, out, err = command(capsys, "export", run, "--output", tmp_path / "out", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads((tmp_path / "out" / "export.json").read_text())
    assert (report["format"], report["logits_difference"]) == ("packed", 0)
    assert [layer["exact"] for layer in report["layers"]] == [True, True]


def test_an_earlier_checkpoint(run, tmp_path, capsys, caplog):
    for name in ("step-000010", "step-000020"):
        path = run / "checkpoints" / name
        assert command(capsys, "export", path, "--output", tmp_path / name)[0] == 0
        assert caplog.text.count("exporting the weights of step 10 of 20") == 1
    command(capsys, "export", run, "--output", tmp_path / "newest")
    earlier, later, newest = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("step-000010", "step-000020", "newest")
    )
    assert earlier != later == newest


def test_a_checkpoint_by_its_name_within_its_folder(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(run / "checkpoints")
    code, _, err = command(capsys, "export", "step-000010", "--output", tmp_path / "out")
    assert code == 0, err


def test_other_options_reach_the_exporter(run, tmp_path, capsys):
    code, _, err = command(capsys, "export", run, "--format", "float")
    assert code == 2
    assert "cannot write '1' as float: its inputs are quantized" in err
    assert ": --activations drop exports the weights alone (logits will differ)" in err
    assert ", or --format packed or onnx (and 1 more: fogzo.export.check)\n" in err
    code, out, _ = command(
        capsys,
        *("export", run, "--format", "float", "--activations", "drop", "--no-verify"),
        *("--output", tmp_path / "out"),
    )
    assert code == 0
    assert "not verified" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "gguf"], "LlamaForCausalLM only, got Sequential: --format packed or onnx\n"),
        (["--format", "zip"], "format must be one of packed, float"),
        (["--variant", "tq1_0"], "packed has no variant 'tq1_0', expected none: leave variant out"),
        (["--variant", "small"], "variant must be one of tq2_0"),
    ],
)
def test_mistakes_are_one_line(run, arguments, message, capsys):
    code, out, err = command(capsys, "export", run, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch's compiler
def test_ternary_weights_and_inputs_of_8_bits(tmp_path, capsys):
    # W1.58A8: the recipe's own bits are no option of ternary, and nobody has to say so.
    code, _, err = command(
        capsys,
        *("train", "digits-deit", "--output-dir", tmp_path / "run", "--max-steps", "1"),
        *("--model.width", "16", "--model.depth", "1", "--model.heads", "2"),
        *("--quantizer.preset", "ternary", "--activations.preset=abs_max"),
        *("--activations.granularity", "token"),
    )
    assert code == 0, err
    code, out, err = command(capsys, "export", tmp_path / "run", "--format", "bitnet", "--json")
    assert code == 0, err
    report = json.loads(out)
    # Its reader divides by reciprocals of the steps.
    assert all(layer["step_rounding"] <= 2**-23 for layer in report["layers"])
    assert report["logits_difference"] < 5e-3
    code, _, err = command(
        capsys, "train", "digits-mlp", "--quantizer.preset", "ternary", "--quantizer.bits", "2"
    )
    assert code == 2
    assert "takes no bits, got 2: --quantizer.bits None" in err


def test_the_tokenizer_of_a_run_goes_into_its_file(tmp_path, capsys):
    name = save_tokenizer(tmp_path / "words", eos_token="<|end|>")
    (tmp_path / "text.txt").write_text(PROSE, encoding="utf-8")
    code, _, err = command(
        capsys,
        *("train", "pydoc-llama", "--output-dir", tmp_path / "run", "--max-steps", "1"),
        *("--model.width", "32", "--model.depth", "1", "--model.heads", "2", "--batch-size", "2"),
        *("--data.dataset", tmp_path / "text.txt", "--data.context", "16"),
        *("--data.tokenizer", name, "--quantizer.bits", "4", "--quantizer.scale-dtype", "float16"),
    )
    assert code == 0, err
    export = ("export", tmp_path / "run", "--format", "gguf")
    code, out, err = command(capsys, *export)
    assert code == 0, err
    assert "logits differ by 0 of the largest" in out
    read = AutoTokenizer.from_pretrained(tmp_path / "run/export/gguf", gguf_file="model.gguf")
    assert read("Line 7")["input_ids"] == tokenizer_of(name)("Line 7")["input_ids"]
    assert read.eos_token == "<|end|>"
    code, out, err = command(capsys, *export, "--tokenizer", "none", "--output", tmp_path / "bare")
    assert code == 0, err
    with_words, without = (
        (folder / "model.gguf").stat().st_size
        for folder in (tmp_path / "run/export/gguf", tmp_path / "bare")
    )
    assert without < with_words - 1000


def test_a_tokenizer_that_cannot_be_read_is_named(run, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    for name, said in ((damaged, "could not load the tokenizer"), (tmp_path / "gone", "no folder")):
        code, out, err = command(capsys, "export", run, "--tokenizer", name)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"{said} '{name}'" in err
        assert err.endswith(", or --tokenizer none\n")


def test_a_float_run_is_refused(tmp_path, capsys):
    main(
        [
            *("train", "digits-mlp", "--output-dir", str(tmp_path), "--max-steps", "1"),
            *("--quantizer.preset", "none", "--estimator", "ste"),
        ]
    )
    code, _, err = command(capsys, "export", tmp_path)
    assert code == 2
    assert "was trained in float, and there are no codes to export" in err
