"""What the README, the example and the tables claim is run."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_code_runs_from_top_to_bottom(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert 0 < float(capsys.readouterr().out) < 3  # the printed agreement


def test_the_readme_tables_are_the_committed_results():
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "tables.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_names_its_two_commands_first():
    commands = re.findall(r"^    (make \w+)", README, re.MULTILINE)
    assert commands[:2] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{command.split()[1]}:" in makefile for command in commands)


def test_the_plain_loop_trains():
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / "plain_loop.py", "--steps", "60"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("accuracy")[1]) > 0.5  # chance is .25


@pytest.fixture(scope="module")
def step_cost():
    spec = importlib.util.spec_from_file_location("step_cost", ROOT / "benchmarks/step_cost.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_cost"] = module
    spec.loader.exec_module(module)
    return module


def test_the_probes_need_one_copy_of_the_weights_and_one_layer_at_most(step_cost):
    case = step_cost.mlp("wide", (256, 512, 512, 10), batch=4, repeats=1)
    result = step_cost.measure(case)
    assert result["extra_peak_mib"] > 0.5 * result["weights_mib"]  # the copy is really counted
    assert result["extra_peak_mib"] < result["weights_mib"] + 3 * result["largest_layer_mib"]


@pytest.mark.parametrize("name", ["step_cost", "step_cost_2_threads"])
def test_the_committed_cost_meets_its_bounds(name):
    report = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
    assert report["import_seconds"] < 0.3
    for case in report["cases"]:
        small = case["quantized_weights"] < 1_000_000
        assert case["extra_peak_mib"] <= case["weights_mib"] + 3 * case["largest_layer_mib"]
        if case["case"] == "MLP 784-1024-256-10, batch 128":
            continue  # misses the bound, as the README says
        assert case["fogzo_over_floor"] <= (1.35 if small else 1.10), case["case"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_committed_mnist_result_is_what_prototypes_found(optimizer):
    path = ROOT / "experiments" / f"mnist-mlp-{optimizer}" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in results["rows"] if row["budget"] == "steps"}
    assert {"ste", "ste-unmasked", "placebo", "control-variate", "fogzo"} <= set(rows)
    gaps = {d["name"]: d for d in results["differences"] if d["budget"] == "steps"}
    assert gaps["ste"]["train_loss"]["high"] < 0 < gaps["ste"]["test_accuracy"]["low"]
    # .66 to .72 there, where the initial weights were others
    assert 0.64 < rows["fogzo"]["train_loss"]["mean"] < 0.78
    assert gaps["ste-unmasked"]["test_accuracy"]["high"] < 0  # what the README tells to try first
