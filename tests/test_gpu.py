"""The script for machines with a GPU, in miniature on this one."""

import json
from pathlib import Path

import pytest

from forked import Python

SCRIPT = Path(__file__).parents[1] / "experiments" / "gpu.py"


def run(folder, *options):
    """Exit code and error output."""
    process = Python(SCRIPT, "--output-dir", folder, "--device", "cpu", *options)
    _, err = process.communicate(timeout=240)
    return process.returncode, err


def pieces(folder):
    return json.loads((folder / "results.json").read_text())["pieces"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A miniature whose bench had no time at first."""
    folder = tmp_path_factory.mktemp("gpu")
    first = run(folder, "--miniature", "--workers", "1", "--only", "bench", "--minutes", "0.02")
    assert first[0] == 0, first
    assert pieces(folder)["bench"]["outcome"] == "out of time"
    last = run(folder, "--miniature", "--workers", "1", "--resume")
    assert last[0] == 0, last
    return folder


def test_every_piece_runs_and_a_piece_without_time_is_taken_up_again(done):
    found = pieces(done)
    assert {piece["outcome"] for piece in found.values()} == {"finished"}
    tests = found["tests"]["found"]
    assert tests["tests"] > 10
    assert tests["failed"] == []
    assert found["bench"]["found"]["sections"] == ["steps"]
    for name, metric in (("llama", "test_perplexity"), ("deit", "test_accuracy")):
        assert found[name]["found"]["metric"] == metric
        assert found[name]["found"]["fogzo"]["seeds"][0] is not None


def test_finished_pieces_are_left_alone(done):
    before = (done / "results.json").read_text()
    assert run(done, "--miniature", "--resume")[0] == 0
    assert (done / "results.json").read_text() == before


def test_without_a_gpu_it_says_what_would_run(tmp_path):
    code, err = run(tmp_path)
    assert code == 1
    assert "--miniature" in err
