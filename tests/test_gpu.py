"""The script for machines with a GPU, in miniature on this one."""

import json
import subprocess
import sys
import sysconfig
from types import SimpleNamespace

import gpu
import gpu_pieces
import pytest

from fogzo_lab.bench.config import SECTION_NAMES
from fogzo_lab.bench.views import tables
from forked import Python

IN_MINIATURE = ("--device", "cpu", "--miniature", "--workers", "1")


def pieces(folder):
    return json.loads((folder / "results.json").read_text())["pieces"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A miniature whose bench had no time at first: an interpreter takes longer to start."""
    folder = tmp_path_factory.mktemp("gpu")
    given = ["--output-dir", str(folder), *IN_MINIATURE]
    with pytest.raises(SystemExit, match="not finished: bench;"):
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
    assert list(found["bench"]["found"]["seconds_of_sections"]) == ["steps"]
    (table, *_) = tables(json.loads((done / "bench" / "steps.json").read_text()))
    assert table.rows
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


def test_what_was_finished_in_miniature_is_not_finished_in_full(done, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text((done / "results.json").read_text())
    monkeypatch.setattr("fogzo_lab.system.devices.find_device", lambda _: SimpleNamespace(type="x"))
    monkeypatch.setattr(gpu, "run_piece", lambda *_: {"outcome": "failed"})
    with pytest.raises(SystemExit, match="not finished: tests, bench, llama, deit"):
        gpu.main(["--output-dir", str(tmp_path), "--resume"])


def test_what_failed_or_other_code_has_finished_runs_again(done, tmp_path, monkeypatch):
    results = json.loads((done / "results.json").read_text())
    results["pieces"]["llama"]["made_by"]["torch"] = "1.0"
    results["pieces"]["tests"]["outcome"] = "failed"
    (tmp_path / "results.json").write_text(json.dumps(results))
    ran = []
    monkeypatch.setattr(
        gpu, "run_piece", lambda name, *_: ran.append(name) or {"outcome": "failed"}
    )
    given = ["--output-dir", str(tmp_path), *IN_MINIATURE, "--resume"]
    with pytest.raises(SystemExit, match="not finished: tests, llama; the same"):
        gpu.main(given)
    assert ran == ["tests", "llama"]


def test_tests_that_failed_are_not_finished(tmp_path, monkeypatch):
    def start(command):
        (tmp_path / "tests" / "piece.json").write_text(json.dumps({"failed": ["contract::test"]}))
        return subprocess.Popen([sys.executable, "-S", "-c", ""])

    monkeypatch.setattr(gpu, "start", start)
    arguments = gpu.parse(["--output-dir", str(tmp_path)])
    found = gpu.run_piece("tests", arguments, "cpu", 60, 0.0)
    assert (found["outcome"], found["found"]) == ("failed", {"failed": ["contract::test"]})


# A machine with its own Python and torch, where fogzo is not installed


def test_an_interpreter_without_packages_is_told_all_that_it_needs():
    """Without site-packages there is not even torch."""
    done = subprocess.run(
        [sys.executable, "-S", gpu.__file__, "--only", "deit", "--only", "tests"],
        capture_output=True,
        text=True,
        env={},
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "deit, tests need packages" in line
    for name in ("torch", "tyro", "transformers", "kornia", "datasets", "pillow", "pytest"):
        assert f" '{name}>=" in line.partition("-m pip install")[2]


def test_fogzo_need_not_be_installed(tmp_path):
    # Folders of PYTHONPATH are searched, but what is installed by a path file in them is not.
    bare = {"PYTHONPATH": sysconfig.get_path("purelib")}
    command = [sys.executable, "-S", gpu.__file__, "--device", "cpu", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=bare)
    assert "there is no GPU here" in done.stderr


def test_what_it_starts_finds_fogzo_too(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    program = (
        "import sys; assert 'elsewhere' in str(sys.path); from importlib.util import find_spec"
    )
    program += "; assert find_spec('fogzo_lab')"
    assert gpu.start([sys.executable, "-S", "-c", program]).wait() == 0


# The pieces


@pytest.fixture
def setting(tmp_path):
    """Make settings in one folder."""
    return lambda **given: gpu_pieces.Setting(
        **{"folder": tmp_path, "device": "cpu", "miniature": False, "workers": 1, "resume": True}
        | given
    )


@pytest.fixture
def measured(monkeypatch):
    """The sections that were measured, of which probes are interrupted at first."""
    names = []

    def run_suite(config):
        (name,) = config.only
        names.append(name)
        if names.count("probes") == 1 and name == "probes":
            raise KeyboardInterrupt
        return {"suite": config.suite, "sections": {name: {"seconds": len(names), "cases": []}}}

    monkeypatch.setattr(gpu_pieces, "run_suite", run_suite)
    return names


def test_the_benchmark_goes_on_from_its_finished_sections(setting, measured):
    with pytest.raises(KeyboardInterrupt):
        gpu_pieces.bench(setting())
    before = ["steps", "memory", "layers", "compiled"]
    assert measured == [*before, "probes"]
    found = gpu_pieces.bench(setting())["seconds_of_sections"]
    assert measured == [*before, "probes", "probes", "scaling"]
    assert list(found) == [*before, "probes", "scaling"] == list(SECTION_NAMES[:-1])
    assert list(found.values()) == [1, 2, 3, 4, 6, 7]


def test_without_resume_every_section_is_measured_anew(setting, measured, tmp_path):
    (tmp_path / "scaling.json").write_text("of an earlier try")
    with pytest.raises(KeyboardInterrupt):
        gpu_pieces.bench(setting(resume=False))
    assert measured == ["steps", "memory", "layers", "compiled", "probes"]
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == sorted(measured[:-1])
    gpu_pieces.bench(setting(miniature=True))
    assert measured[-1] == "steps"  # which is there in full, not in miniature


@pytest.mark.parametrize("piece", ["llama", "deit"])
def test_a_run_ends_within_half_a_piece_where_four_share_20_steps_a_second(
    setting, monkeypatch, piece
):
    monkeypatch.setattr(gpu_pieces, "compared", lambda base, setting: base.max_steps)
    assert gpu_pieces.PIECES[piece](setting()) * 4 / 20 <= 60 * gpu.MINUTES_PER_PIECE / 2


@pytest.mark.parametrize("code", [2, 3, 4, 5, -9])
def test_a_pytest_that_does_not_end_is_no_result(setting, tmp_path, monkeypatch, code):
    (tmp_path / "tests.xml").write_text('<testsuite tests="9" failures="0"/>')
    monkeypatch.setattr(
        gpu_pieces,
        "subprocess",
        SimpleNamespace(run=lambda *_, **__: SimpleNamespace(returncode=code)),
    )
    with pytest.raises(RuntimeError, match=f"pytest ended with {code}"):
        gpu_pieces.tests(setting())
    assert not (tmp_path / "tests.xml").exists()
