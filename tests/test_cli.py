"""The commands as a user runs them; in a process of its own where that makes a difference."""

import json
import subprocess
import sys

import pytest
import torch
from in_this_process import compare_in_this_process

from fogzo_lab.cli import commands, display
from fogzo_lab.cli.main import main
from forked import Python


@pytest.fixture
def here(capsys):
    """Run a command in this process; returns its exit code and what it prints."""

    def run(*arguments):
        code = 0
        try:
            main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def test_train_writes_its_folder_and_prints_plain_lines(tmp_path):
    process = Python(
        *("-m", "fogzo_lab.cli.main"),
        *("train", "digits-mlp", "--output-dir", tmp_path / "run", "--seed", 3),
        *("--max-steps", 20, "--learning-rate", 0.01, "--estimator", "placebo"),
        *("--quantizer.preset", "lsq", "--quantizer.granularity", "channel"),
    )
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "\x1b" not in out  # no terminal codes where there is no terminal
    assert "training 20/20 loss" in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["seed"], config["max_steps"], config["learning_rate"]) == (3, 20, 0.01)
    assert config["quantizer"]["preset"] == "lsq"
    html = (tmp_path / "run" / "report.html").read_text()
    assert '<svg role="img" aria-label="Loss"' in html
    assert (tmp_path / "run" / "checkpoints" / "step-000020" / "manifest.json").exists()


def test_numbers_have_no_powers_of_ten():
    said = [display._duration(seconds) for seconds in (0.5, 119, 121)]
    assert said == ["0.5 s", "119 s", "2 min"]
    assert display.step_text({"step": 1080, "seconds": 1.0, "loss": 2.0}).endswith("1,080 steps/s")


def test_a_path_is_printed_as_it_is(capsys):
    path = f"runs/{'a' * 200}[lr=0.1][/b]:warning:"
    scores = {"test_loss": 1.0, "test_accuracy": 1.0}
    display.train_result({"steps": 1, "seconds": 1.0, "extra_forwards": 2} | scores, path)
    display.eval_result({"run": path[-20:], "step": 1} | scores)
    report, table = capsys.readouterr().out.split(f"report: {path}\n")
    assert "2 extra forward passes" in report
    assert path[-20:] in table


def test_compare_prints_one_table_and_writes_one_report(here, tmp_path, monkeypatch):
    compare_in_this_process(monkeypatch)
    code, out, err = here(
        *("compare", "digits-mlp", "--output-dir", tmp_path, "--max-steps", 5, "--num-seeds", 2),
        *("--rows", "ste", "fogzo", "--learning-rates", 0.003, "--workers", 1),
    )
    assert code == 0, err
    assert "FOGZO minus row" in out
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
def test_a_mistake_is_one_message_and_exit_code_2(arguments, says, here, tmp_path):
    code, _, err = here(*arguments, "--output-dir", tmp_path / "run")
    assert code == 2
    assert says in err
    assert "Traceback" not in err


def test_a_mistake_ends_the_process_with_code_2():
    done = Python("-m", "fogzo_lab.cli.main", "train", "digit-mlp")
    _, told = done.communicate()
    assert told == "fogzo: no recipe 'digit-mlp': did you mean digits-mlp?\n"
    assert done.returncode == 2


def test_a_diverging_run_ends_without_a_traceback(here, tmp_path):
    code, _, err = here(
        *("train", "digits-mlp", "--output-dir", tmp_path, "--learning-rate", 1e30),
        *("--optimizer", "sgd", "--max-steps", 50, "--quantizer.preset", "none"),
    )
    assert code == 2
    assert "smaller --learning-rate" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("train", "--accumulation 2"),
        ("compare", "fewer --workers"),
        ("eval", "Use a smaller --batch-size"),
        ("bench", "CUDA_VISIBLE_DEVICES="),
    ],
)
def test_a_gpu_that_is_full_is_one_message(here, monkeypatch, command, advice):
    def fill(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setitem(commands.COMMANDS, command, fill)
    code, _, err = here(command, "digits-mlp")
    assert code == 2
    assert err.startswith("fogzo: CUDA out of memory. Tried to allocate 9 GiB. ")
    assert advice in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [(), ("--help",), ("train",), ("compare", "-h")])
def test_help_lists_commands_and_recipes(here, arguments):
    code, out, _ = here(*arguments)
    assert code == 0
    assert "digits-mlp" in out


def test_help_of_a_recipe_lists_its_options(here):
    code, out, _ = here("train", "digits-mlp", "--help")
    assert code == 0
    assert "--kappa" in out


def test_without_its_extra_the_command_says_how_to_install_it():
    code = "import sys; sys.modules['tyro'] = None; import fogzo_lab.cli.main as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "fogzo: the commands need tyro: pip install 'fogzo[lab]'"
