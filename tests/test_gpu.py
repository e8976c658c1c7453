"""The script for machines with a GPU, in miniature on this one."""

import json

import gpu
import pytest

from forked import Python

IN_MINIATURE = ("--device", "cpu", "--miniature", "--workers", "1")


def pieces(folder):
    return json.loads((folder / "results.json").read_text())["pieces"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A miniature whose bench had no time at first: an interpreter takes longer to start."""
    folder = tmp_path_factory.mktemp("gpu")
    given = ["--output-dir", str(folder), *IN_MINIATURE]
    gpu.main([*given, "--only", "bench", "--minutes", "0.02"])
    assert pieces(folder)["bench"]["outcome"] == "out of time"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "start", lambda command: Python(*command[1:]))
        gpu.main([*given, "--resume"])
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
    gpu.main(["--output-dir", str(done), *IN_MINIATURE, "--resume"])
    assert (done / "results.json").read_text() == before


def test_without_a_gpu_it_says_what_would_run(tmp_path):
    with pytest.raises(SystemExit, match="--miniature"):
        gpu.main(["--output-dir", str(tmp_path), "--device", "cpu"])
