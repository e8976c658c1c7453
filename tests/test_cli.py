"""The commands as a user runs them, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest


def fogzo(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fogzo_lab.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


def test_train_writes_its_folder_and_prints_plain_lines(tmp_path):
    done = fogzo(
        *("train", "digits-mlp", "--output-dir", tmp_path / "run", "--seed", 3),
        *("--max-steps", 20, "--learning-rate", 0.01, "--estimator", "placebo"),
        *("--quantizer.preset", "lsq", "--quantizer.granularity", "channel"),
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout  # no terminal codes where there is no terminal
    assert "training 20/20 loss" in done.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["seed"], config["max_steps"], config["learning_rate"]) == (3, 20, 0.01)
    assert config["quantizer"]["preset"] == "lsq"
    html = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in html
    assert (tmp_path / "run" / "checkpoints" / "step-000020" / "manifest.json").exists()


def test_compare_prints_one_table_and_writes_one_report(tmp_path):
    done = fogzo(
        *("compare", "digits-mlp", "--output-dir", tmp_path, "--max-steps", 5, "--num-seeds", 2),
        *("--rows", "ste", "fogzo", "--learning-rates", 0.003, "--workers", 1),
    )
    assert done.returncode == 0, done.stderr
    assert "FOGZO minus row" in done.stdout
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "digit-mlp"), "did you mean digits-mlp?"),
        (("tain", "digits-mlp"), "did you mean train?"),
        (("train", "digits-mlp", "--max-steps", "0"), "--max-steps"),
        (("train", "digits-mlp", "--data.dataset", "./nowhere"), "no folder"),
        (
            ("train", "digits-mlp", "--quantizer.surrogate", "identiy"),
            "surrogate identity",
        ),
        (("compare", "digits-mlp", "--estimator", "ste"), "--rows ste fogzo"),
        (("train", "digits-mlp", "--estimator", "stee"), "stee"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, says, tmp_path):
    done = fogzo(*arguments, "--output-dir", tmp_path / "run")
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_diverging_run_ends_without_a_traceback(tmp_path):
    done = fogzo(
        *("train", "digits-mlp", "--output-dir", tmp_path, "--learning-rate", 1e30),
        *("--optimizer", "sgd", "--max-steps", 50, "--quantizer.preset", "none"),
    )
    assert done.returncode == 2
    assert "smaller --learning-rate" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_commands_and_recipes():
    for arguments in ((), ("--help",), ("train",)):
        done = fogzo(*arguments)
        assert done.returncode == 0
        assert "digits-mlp" in done.stdout
    assert "--kappa" in fogzo("train", "digits-mlp", "--help").stdout


def test_without_its_extra_the_command_says_how_to_install_it():
    code = "import sys; sys.modules['tyro'] = None; import fogzo_lab.cli.main as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "fogzo: the commands need tyro: pip install 'fogzo[lab]'"
