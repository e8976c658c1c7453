"""Signals and worker processes: how they end."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from fogzo_lab.system.signals import Terminated, held_back, raised

# What workers run must be importable in them, which test modules are not.
PROGRAM = """
import logging, multiprocessing, os, pathlib, signal, sys, time
from fogzo_lab.system import signals
from fogzo_lab.executors.calls import Call
from fogzo_lab.executors.local import Workers

here = pathlib.Path(__file__).parent

def write_for_ever(name, with_child):
    if with_child:
        multiprocessing.Process(target=write_for_ever, args=(name + "-child", False)).start()
    with (here / name).open("a") as file:
        while True:
            file.write(".")
            file.flush()
            time.sleep(0.001)

def double(number):
    time.sleep(0.05)
    return os.getpid(), 2 * number

def fail(number):
    raise KeyError(number)

class Unreadable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

def fail_oddly():
    raise Unreadable(1, 2)

def make_a_function():
    return lambda: None

def die(name, how_often):
    path = here / name
    times = int(path.read_text()) if path.exists() else 0
    if times < how_often:
        path.write_text(str(times + 1))
        os.kill(os.getpid(), signal.SIGKILL)
    return name

def results(*calls, count=2):
    with Workers(count) as workers:
        return list(workers.results([Call(c[0].__name__, c[0], c[1:]) for c in calls]))

if __name__ == "__main__":
    {main}
"""


@pytest.fixture
def program(tmp_path):
    """Run a program that has the functions above; returns the process, which ends with the test."""
    started = []

    def start(main):
        path = tmp_path / "program.py"
        path.write_text(PROGRAM.replace("{main}", main.strip().replace("\n", "\n    ")))
        process = subprocess.Popen(
            [sys.executable, path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def output(program):
    """Run such a program to its end; returns what it printed."""

    def run(main):
        process = program(main)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        return out

    return run


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


WRITING = """
with signals.raised(), Workers(2) as workers:
    calls = [Call("writing", write_for_ever, (name, True)) for name in "abcd"]
    for _ in workers.results(calls):
        pass
"""


@pytest.mark.parametrize(
    ("number", "to_group"),
    [
        (signal.SIGINT, True),  # as a terminal sends it
        (signal.SIGINT, False),
        (signal.SIGTERM, False),
        (signal.SIGTERM, True),  # as `timeout` sends it
        (signal.SIGHUP, True),
        (signal.SIGKILL, False),
    ],
)
def test_workers_die_with_their_parent_however_it_dies(program, tmp_path, number, to_group):
    process = program(WRITING)
    parent = psutil.Process(process.pid)
    while len(list(tmp_path.glob("?-child"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    children = parent.children(recursive=True)
    assert len(children) >= 4  # two workers and what each has started
    (os.killpg if to_group else os.kill)(process.pid, number)
    began = time.monotonic()
    _, err = process.communicate(timeout=5)
    while any(map(is_alive, children)):
        assert time.monotonic() - began < 2
        time.sleep(0.01)
    sizes = {path: path.stat().st_size for path in tmp_path.iterdir()}
    time.sleep(0.05)
    assert sizes == {path: path.stat().st_size for path in tmp_path.iterdir()}
    assert not (tmp_path / "c").exists()  # nobody has begun with the next call
    assert err.count("Traceback") == (number == signal.SIGINT)  # the parent's own


def test_workers_die_when_their_block_ends_by_an_exception(output):
    printed = output("""
try:
    with Workers(3) as workers:
        calls = [Call("", write_for_ever, (name, False)) for name in "ab"]
        for _ in workers.results([Call("", double, (1,)), *calls]):
            0 / 0
except ZeroDivisionError:
    print(multiprocessing.active_children())
""")
    assert printed == "[]\n"


def test_calls_are_computed_in_as_many_processes_as_asked_for_and_these_are_kept(output):
    printed = output("""
with Workers(2, prepare=time.tzset) as workers:
    for _ in range(2):
        calls = [Call("", double, (number,)) for number in range(6)]
        found = list(workers.results(calls))
        print(sorted(value for _, value in found), *sorted(set(pid for pid, _ in found)))
    print(list(workers.results([])))
print(multiprocessing.active_children())
""")
    first, second, nothing, left = printed.splitlines()
    assert first == second
    assert first.startswith("[0, 2, 4, 6, 8, 10] ")
    assert len(set(first.rpartition("] ")[2].split())) == 2
    assert nothing == left == "[]"


def test_a_call_whose_process_dies_is_computed_again_once(program):
    process = program("""
logging.basicConfig(format="%(message)s")
print(sorted(results((die, "a", 1), (die, "b", 0), (die, "c", 1))))
try:
    results((die, "d", 2))
except ChildProcessError as error:
    print(error)
""")
    out, err = process.communicate(timeout=60)
    again, error = out.splitlines()
    assert again == "['a', 'b', 'c']"
    assert error.startswith("die: its process died twice, now killed by SIGKILL")
    assert "--workers" in error
    assert err == 3 * "die: its process died (killed by SIGKILL); it runs again\n"


def test_what_a_call_raises_is_raised_with_the_workers_traceback(output):
    printed = output("""
try:
    results((fail, 7))
except KeyError as error:
    print(error, "in fail" in error.__notes__[0])
for function, said in ((make_a_function, "make_a_function.<locals>"), (fail_oddly, "1 and 2")):
    try:
        results((function,))
    except RuntimeError as error:
        print(said in str(error))
""")
    assert printed.splitlines() == ["7 True", "True", "True"]


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, SystemExit)],
)
def test_a_signal_that_is_held_back_strikes_at_the_end_of_the_block(number, error):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    done = []
    with pytest.raises(error) as raised_error, raised():
        with held_back():
            signal.raise_signal(number)
            done.append("the block")
        done.append("what follows")
    assert done == ["the block"]
    if error is not KeyboardInterrupt:
        assert raised_error.value.code == 128 + number
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_a_second_interrupt_strikes_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        done.append("after the first")
        time.sleep(0.6)
        signal.raise_signal(signal.SIGINT)
        done.append("after the second")
    assert done == ["after the first"]


def test_a_signal_that_the_process_is_to_ignore_stays_ignored():
    # As nohup has it.
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raised(), held_back():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, old)
