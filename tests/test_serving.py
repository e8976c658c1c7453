"""What docs/exporting.md and docs/serving.md say of readers is what was measured."""

import json
from pathlib import Path

import pytest
import torch

from fogzo.quantizers import uniform

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def served():
    results = json.loads((ROOT / "benchmarks/export/results.json").read_text(encoding="utf-8"))
    return {case["name"]: case for case in results["sections"]["export"]["cases"]}


@pytest.fixture(scope="module")
def elsewhere():
    return json.loads((ROOT / "experiments/serving/results.json").read_text(encoding="utf-8"))


def facts(served, name):
    (case,) = (case for own, case in served.items() if own.startswith(name))
    return case["facts"]


def speed(served, name, kind):
    (case,) = (case for own, case in served.items() if own.startswith(name))
    return case["ratios"][f"{kind}, speed over float"]


def test_exact_files_are_exact_and_smaller(served):
    for name, case in served.items():
        assert case["skipped"] is None
        off = case["facts"]["logits_difference"]
        if name.startswith(("float", "packed", "compressed", "gguf")):
            assert off == 0
        elif "inputs" not in name:
            assert off < 2e-6
        if "float" not in name:
            base = "onnx: float" if name.startswith("onnx") else "float"
            assert case["facts"]["bytes"] < 0.2 * served[base]["facts"]["bytes"]


def test_weights_that_are_unpacked_whenever_they_are_used_save_memory_and_cost_time(served):
    for name in ("packed: lsq(2)", "packed: ternary"):
        in_float = served["float"]["facts"]["resident_bytes"]
        assert facts(served, name)["resident_bytes"] < 0.4 * in_float
        assert speed(served, name, "token")["high"] < 1


def test_what_transformers_unpacks_takes_the_memory_of_the_float_network(served):
    in_float = served["float"]["facts"]["resident_bytes"]
    for name in ("compressed-tensors", "gguf"):
        assert facts(served, name)["resident_bytes"] > 0.9 * in_float


def test_exact_weights_are_faster_in_onnxruntime_alone_and_for_single_tokens_alone(served):
    exact = {name: case for name, case in served.items() if "inputs" not in name}
    faster = {
        kind: {name for name, case in exact.items() if quickened(case, kind)}
        for kind in ("prompt", "token")
    }
    assert faster["prompt"] == set()
    assert faster["token"] == {"onnx: lsq(2) in 2 bits", "onnx: lsq(4) in 4 bits"}
    (rounded,) = (case for name, case in served.items() if name.endswith("rounded to int8"))
    assert quickened(rounded, "prompt") and quickened(rounded, "token")
    assert 1e-4 < rounded["facts"]["logits_difference"] < 3e-2


def quickened(case, kind):
    return case["ratios"][f"{kind}, speed over float"]["low"] > 1


def test_llama_cpp_differs_by_its_rounded_inputs_alone(elsewhere):
    cases = {case["name"]: case for case in elsewhere["llama.cpp"]}
    assert cases["F32"]["error"] < 1e-5
    for name, case in cases.items():
        if name != "F32":
            assert 1e-3 < case["error"] < 5e-2
            assert case["top1"] > 0.9
            assert case["bytes"] < cases["F32"]["bytes"] / 3
        if "error_with_rounded_inputs" in case:
            assert case["error_with_rounded_inputs"] < 1e-4
    faster = {
        kind: {name for name, case in cases.items() if case[kind] < cases["F32"][kind]}
        for kind in ("prompt_seconds", "token_seconds")
    }
    assert set(cases) - faster["token_seconds"] == {"F32", "Q2_0"}
    assert set(cases) - faster["prompt_seconds"] == {"F32", "TQ1_0", "Q1_0", "Q2_0"}


def test_openvino_is_exact_where_it_is_told_to_be(elsewhere):
    for case in elsewhere["openvino"]:
        assert case["full"]["error"] < 2e-6
        assert case["full"]["error"] < case["default"]["error"] < 5e-2


def test_rounded_steps_move_little(elsewhere):
    for case in elsewhere["rounded"]:
        assert case["step_rounding"] <= {"float16": 2**-11, "bfloat16": 2**-8}[case["dtype"]]
        assert case["error"] < 1e-2
        assert abs(case["loss_change"]) < 1e-2


def test_integer_levels_give_up_a_quarter_in_squared_error():
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    weight = torch.exp(-x.square() / 2)
    errors = {}
    for levels in ("half", "integer"):
        grid = uniform(2, levels)
        rounded = grid.round(x / grid.gaussian_step_size) * grid.gaussian_step_size
        errors[levels] = float((weight * (rounded - x).square()).sum() / weight.sum())
    assert errors["integer"] / errors["half"] == pytest.approx(1.25, abs=0.02)
