"""What the tests of checkpoints share: comparing states bit for bit, and starting processes."""

import os
import struct
import subprocess
import sys

import torch


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def same(a, b):
    """Bit for bit, type for type."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return [*map(typed, a)] == [*map(typed, b)] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return struct.pack(">d", a) == struct.pack(">d", b) if isinstance(a, float) else a == b


def typed(key):
    return type(key), key


def state_of(step):
    weight = torch.full((64,), float(step))
    return {"step": step, "model": {"weight": weight, "bias": weight[:3]}, "lr": 1 / step}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def launch(file, *arguments):
    """Start a test file as a program."""
    return subprocess.Popen(
        [sys.executable, file, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    """Wait for programs, which must succeed."""
    try:
        errors = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "".join(errors)
