"""What the tests of checkpoints share: comparing states bit for bit."""

import struct

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
