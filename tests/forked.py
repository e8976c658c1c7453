"""Real processes of real programs that begin where importing torch has ended.

Each is forked from a server that has imported what most programs need, which takes longer than
what most tests then do. A test of the start itself (signals while torch is imported, the installed
command, torchrun) launches an interpreter of its own.
"""

import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import weakref
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import psutil

from fogzo_lab.executors import local

_SERVER = multiprocessing.get_context("forkserver")
_IMPORTED = [
    "fogzo_lab.cli.commands",
    "torch._dynamo",  # which comes with the first optimizer
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.models.vit.modeling_vit",
    "transformers.models.resnet.modeling_resnet",
]


def start_server():
    """Have the server run, for `multiprocessing`'s method "forkserver"."""
    # Not when this file is imported: the programs do that too, and have servers of their own.
    _SERVER.set_forkserver_preload(_IMPORTED)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


class Python:
    """``python ARGUMENTS`` as `subprocess.Popen` would run it, with one thread.

    Args:
        arguments: A file and its arguments, or ``-m``, a module and its arguments.
        environment: Variables that it has besides.
        new_session: Whether it leads a process group of its own.

    Processes that compute for it (`fogzo_lab.executors.local`) are forked from the server too, so
    that they are no children of it, nor of its group; test_processes.py has real ones.
    """

    def __init__(self, *arguments, environment=None, new_session=False):
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        given = (list(map(str, arguments)), environment or {}, new_session, self._outputs)
        self._process = _SERVER.Process(target=_run, args=given)
        start_server()
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def workers(self):
        """The processes that compute for it, where no other program has been forked meanwhile."""
        server = psutil.Process(forkserver._forkserver._forkserver_pid)
        return [process for process in server.children() if process.pid != self.pid]

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=100):
        self._process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} s"
        return self.returncode

    def communicate(self, timeout=100):
        self.wait(timeout)
        return [path.read_text() if path.exists() else "" for path in self._outputs]


def finish(*processes, timeout=180):
    """Wait for programs, which must succeed."""
    try:
        errors = [process.communicate(timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "".join(errors)


def _run(arguments, environment, new_session, outputs):
    if new_session:
        os.setsid()
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    # A forked process knows the server's address, and yet would start another.
    forkserver._forkserver.ensure_running = lambda: None
    local._SPAWN = _SERVER
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
