"""Comparisons that are ended from outside: nothing goes on, and the next one goes on from there."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from in_this_process import compare_in_this_process

from fogzo_lab.cli import commands
from fogzo_lab.cli.main import main
from forked import Python

OPTIONS = ("--rows", "ste", "fogzo", "--learning-rates", "0.003", "--num-seeds", "2")
OPTIONS += ("--max-steps", "100", "--log-every", "5", "--no-equal-time", "--workers", "1")


def command(folder):
    return ["compare", "digits-mlp", "--output-dir", str(folder), *OPTIONS]


def times_of(folder, name):
    return {path: path.stat().st_mtime_ns for path in folder.glob(f"runs/*/{name}")}


def wait_for_a_run(process, folder, finished=0):
    """Until a run is being trained and so many are finished; returns the processes at work."""
    before = times_of(folder, "metrics.jsonl")
    while (
        times_of(folder, "metrics.jsonl") == before
        or len(times_of(folder, "result.json")) <= finished
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    workers = process.workers()
    assert workers
    return workers


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def results_of(folder):
    """Those that do not depend on how fast the machine was."""
    results = json.loads((folder / "results.json").read_text())
    for row in results["rows"]:
        del row["seconds"]
        for part in (*row["seeds"], *row["curve"]):
            del part["seconds"]
    return {name: results[name] for name in ("rows", "differences", "grid")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        compare_in_this_process(patch)
        main(command(folder))
    return folder


def test_whatever_ends_a_comparison_the_next_one_goes_on_from_there(undisturbed, tmp_path):
    for number, finished, code, says in (
        (signal.SIGTERM, -1, 143, "fogzo: ended by SIGTERM; finished runs are kept"),
        (signal.SIGKILL, 0, -signal.SIGKILL, ""),
    ):
        process = Python("-m", "fogzo_lab.cli.main", *command(tmp_path), new_session=True)
        workers = wait_for_a_run(process, tmp_path, finished)
        process.send_signal(number)
        began = time.monotonic()
        _, err = process.communicate(timeout=20)
        assert process.returncode == code
        assert err.startswith(says)
        assert len(err.splitlines()) == bool(says)
        while any(map(is_alive, workers)):
            assert time.monotonic() - began < 20
            time.sleep(0.01)
        written = times_of(tmp_path, "*")
        time.sleep(0.2)
        assert times_of(tmp_path, "*") == written
        assert not (tmp_path / "results.json").exists()

    marked = {p for p in times_of(tmp_path, "result.json") if '"run"' in p.read_text()}
    before = times_of(tmp_path, "result.json")
    process = Python("-m", "fogzo_lab.cli.main", *command(tmp_path), new_session=True)
    workers = wait_for_a_run(process, tmp_path)
    (trainer,) = workers
    trainer.kill()  # as the system does where memory runs out
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "its process died (killed by SIGKILL); it runs again" in err
    assert len(err.splitlines()) == 1
    assert all(times_of(tmp_path, "result.json")[path] == before[path] for path in marked)
    assert results_of(tmp_path) == results_of(undisturbed)


@pytest.mark.parametrize(
    ("number", "line"),
    [(signal.SIGINT, "fogzo: interrupted"), (signal.SIGTERM, "fogzo: ended by SIGTERM")],
)
def test_what_an_interrupted_command_adds_is_in_its_one_line(number, line, monkeypatch, capsys):
    def interrupted(*_):
        try:
            signal.raise_signal(number)
        except (KeyboardInterrupt, SystemExit) as error:
            error.add_note("there is a checkpoint")
            raise

    monkeypatch.setattr(commands, "train", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["train", "digits-mlp", "--max-steps", "1"])
    assert end.value.code == 128 + number
    assert capsys.readouterr().err == f"{line}; there is a checkpoint\n"


def test_a_terminal_that_cannot_show_everything_is_told_what_it_can(undisturbed, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    main(command(undisturbed))
    assert b" +- " in printed.getvalue()
    sys.stdout.write("é")
    sys.stdout.flush()
    assert printed.getvalue().endswith(b"?")


def test_output_that_nobody_reads_ends_a_command_quietly(undisturbed, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        with pytest.raises(SystemExit) as end:
            main(command(undisturbed))
        assert end.value.code == 141
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        monkeypatch.undo()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_torch_is_imported_is_one_line(number, tmp_path):
    command = [sys.executable, "-m", "fogzo_lab.cli.main", "train", "digits-mlp"]
    command += ["--output-dir", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    watched = psutil.Process(process.pid)
    while not any("libtorch" in mapped.path for mapped in watched.memory_maps()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (128 + number, "fogzo: interrupted\n")
