"""Everything a user can get wrong on the command line: one short message, exit code 2."""

import resource
import sys

import datasets
import numpy
import pytest

from fogzo_lab.cli.main import main
from fogzo_lab.training.checkpoint import newest_checkpoint
from forked import Python, finish

SMALL_LLAMA = ("--model.width", "16", "--model.depth", "1", "--model.heads", "2")
SMALL_LLAMA += ("--data.context", "16", "--max-steps", "4", "--batch-size", "4")


@pytest.fixture
def says(capsys):
    """Run a command that must fail; returns its one message."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        assert end.value.code == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return printed.err

    return run


@pytest.fixture
def images(tmp_path):
    """A folder with a train and a test split of 6x6 images; returns a function that writes it."""

    def write(column="image", corrupt=False, label="label"):
        rng = numpy.random.default_rng(0)
        for split, count in (("train", 40), ("test", 10)):
            pictures = [rng.integers(0, 255, (6, 6), dtype=numpy.uint8) for _ in range(count)]
            rows = {column: pictures, label: [i % 3 for i in range(count)]}
            features = datasets.Features({column: datasets.Image(), label: datasets.Value("int64")})
            table = datasets.Dataset.from_dict(rows, features=features)
            if corrupt:
                broken = [{"bytes": b"\x89PNG no longer", "path": None}] * count
                plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
                table = datasets.Dataset.from_dict(
                    {column: broken, label: rows[label]},
                    features=datasets.Features({column: plain, label: datasets.Value("int64")}),
                )
            table.to_parquet(tmp_path / "images" / f"{split}-00000-of-00001.parquet")
        return tmp_path / "images"

    return write


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "digit-mlp"), "did you mean digits-mlp?"),
        (("train", "resnet-18"), "did you mean resnet18?"),
        (("tain", "digits-mlp"), "did you mean train?"),
        (("train", "digits-mlp", "--optimizer", "adamv"), "--optimizer adam"),
        (("train", "digits-mlp", "--optimizer", "lbfgs"), "--optimizer adamw"),
        (("train", "digits-mlp", "--optimizer", "muon", "--model.hidden"), "--optimizer adamw"),
        (("train", "digits-mlp", "--estimator", "ste", "--kappa", "0.3"), "is for fogzo, placebo,"),
        (
            ("train", "digits-mlp", "--quantizer.preset", "none", "--one-sided"),
            "changes nothing with --quantizer.preset none",
        ),
        (
            ("compare", "digits-mlp", "--rows", "ste", "placebo", "--probe-fraction", "0.5"),
            "changes nothing with ste placebo: leave --probe-fraction 0.5 out",
        ),
        (("train", "digits-mlp", "--max-steps", "0"), "--max-steps"),
        (("train", "digits-mlp", "--batch-size", "5000"), "--batch-size 1146"),
        (("train", "digits-mlp", "--accumulation", "7"), "--batch-size 63"),
        (("train", "digits-mlp", "--device", "gpu"), "--device cpu"),
        (("train", "digits-mlp", "--device", "cuda:99"), "cannot compute on 'cuda:99'"),
        (("train", "digits-mlp", "--device", "meta"), "--device cpu"),
        (("train", "digits-mlp", "--device", "mps"), "mps does not have, got 'mps': --device cpu"),
        (("train", "digits-mlp", "--model.hidden", "-5"), "got -5: --model.hidden 32"),
        (("train", "digits-mlp", "--model.hidden", "9" * 13), "cannot be built here"),
        (("train", "digits-mlp", "--data.image-size", "90000"), "--data.image-size 32"),
        (("train", "digits-mlp", "--activations.bits", "0"), "--activations.bits 2"),
        (("train", "digits-mlp", "--output-dir", ""), "--output-dir has an empty value"),
        (("train", "digits-deit", "--model.heads", "0"), "--model.heads 3"),
        (("train", "digits-deit", "--model.heads", "5"), "--model.heads 1"),
        (("train", "pydoc-llama", "--model.depth", "0"), "--model.depth 4"),
        (("compare", "digits-mlp", "--device", "cuda:99"), "cannot compute on 'cuda:99'"),
        (("compare", "digits-mlp", "--optimizer", "adamv"), "--optimizer adam"),
        (("compare", "digits-mlp", "--initial-weights", "./nowhere"), "no whole checkpoint"),
        (("eval", "./nowhere", "--activations.preset", "lsq"), "--quantizer.preset lsq"),
        (("eval", "./nowhere", "--batch-size", "-1"), "--batch-size 256"),
        (("train", "digits-mlp", "--data.dataset", "./nowhere"), "no folder"),
        (
            ("train", "digits-mlp", "--quantizer.surrogate", "identiy"),
            "surrogate identity",
        ),
        (("train", "digits-deit", "--model.patch-size", "3"), "--model.patch-size 1"),
        (("train", "pydoc-llama", "--data.dataset", "./nowhere.txt"), "nowhere.txt"),
        (("train", "pydoc-llama", "--data.tokenizer", "./nowhere"), "nowhere"),
        (("train", "pydoc-llama", "--model.vocab-size", "100"), "--model.vocab-size 256"),
        (("train", "pydoc-llama", "--data.context", "1000000"), "--data.context"),
        (("compare", "digits-mlp", "--estimator", "ste"), "--rows ste fogzo"),
        (("compare", "digits-mlp", "--overwrite"), "leave --overwrite out"),
        (
            ("compare", "digits-mlp", "--rows", "ste", "--quantizer.preset", "none"),
            "fogzo: ste would train in float",
        ),
        (("compare", "digits-mlp", "--trackers", "wandb"), "leave --trackers out"),
        (("compare", "digits-mlp", "--checkpoint-every", "9"), "leave --checkpoint-every out"),
        (("eval", "./nowhere"), "not a run folder"),
    ],
)
def test_a_wrong_option_names_the_right_one(says, tmp_path, arguments, message):
    folder = () if arguments[0] == "eval" else ("--output-dir", tmp_path / "run")
    assert message in says(*arguments, *folder)
    assert not (tmp_path / "run").exists()


def test_no_folder_is_ever_called_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    main(["train", "digits-mlp", "--output-dir=~/run", "--max-steps", "1"])
    main(["eval", "~/run"])
    main(["train", "digits-mlp", "--output-dir=~/b", "--initial-weights=~/run", "--max-steps=1"])
    # Libraries may keep caches there, in hidden folders.
    assert sorted(path.name for path in (tmp_path / "home").glob("[!.]*")) == ["b", "run"]
    assert not (tmp_path / "~").exists()


def test_images_that_cannot_be_used(says, images, tmp_path):
    command = ("train", "digits-mlp", "--output-dir", tmp_path / "run", "--data.dataset")
    said = says(*command, images(column="picture"))
    assert "picture" in said
    assert "rename" in said
    said = says(*command, images(label="kind"))
    assert "kind" in said
    said = says(*command, images(corrupt=True))
    assert "train" in said
    (tmp_path / "empty").mkdir()
    assert "empty" in says(*command, tmp_path / "empty")


def test_text_that_cannot_be_used(says, tmp_path):
    command = ("train", "pydoc-llama", *SMALL_LLAMA, "--output-dir", tmp_path / "run")
    (tmp_path / "empty.txt").touch()
    assert "empty" in says(*command, "--data.dataset", tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 500)
    assert "UTF-8" in says(*command, "--data.dataset", tmp_path / "latin.txt")
    (tmp_path / "rows.jsonl").write_text('{"body": "some words"}\n' * 100)
    assert "body" in says(*command, "--data.dataset", tmp_path / "rows.jsonl")


def test_a_run_is_neither_replaced_nor_resumed_as_another(says, tmp_path):
    command = ("train", "digits-mlp", "--output-dir", tmp_path, "--max-steps", 10)
    main([str(argument) for argument in command])
    assert "--resume" in says(*command)
    said = says(*command, "--resume", "--learning-rate", 0.5, "--model.hidden", 8)
    assert "learning-rate (0.003 there, 0.5 here)" in said
    assert newest_checkpoint(tmp_path).name == "step-000010"


def test_a_config_of_another_version_is_refused(says, tmp_path):
    command = ("train", "digits-mlp", "--output-dir", tmp_path, "--max-steps", 10)
    main([str(argument) for argument in command])
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"seed"', '"sead"'))
    assert "no field sead" in says(*command, "--resume")
    config.write_text("{")
    assert "not JSON" in says("eval", tmp_path)


def test_a_full_disk_keeps_what_was_trained(tmp_path):
    command = [__file__, "train", "digits-mlp", "--output-dir", tmp_path, "--max-steps", 30]
    command += ["--checkpoint-every", 10, "--model.hidden"]
    finish(Python(*command, 16))
    process = Python(*command, 2000, "--overwrite")
    _, told = process.communicate()
    assert process.returncode == 2
    assert "could not be written" in told
    assert "there is no earlier one" in told
    assert "run the same command with --overwrite" in told
    assert "Traceback" not in told
    assert not list(tmp_path.rglob("*.partial"))


if __name__ == "__main__":
    # No file may be longer: what a full disk looks like to a process.
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))
    main(sys.argv[1:])
