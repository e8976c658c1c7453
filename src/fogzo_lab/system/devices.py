"""Devices by name, and those of this machine."""

import os
from typing import Annotated

import torch

from fogzo_lab.options import Example, Rule


def _is_named(name: str) -> bool:
    if name == "auto":
        return True
    try:
        return torch.device(name).type != "meta"  # holds no numbers
    except RuntimeError:
        return False


# Apple's GPUs have no numbers in 64 bits, in which losses, step sizes and slopes are summed up.
_WITHOUT_FLOAT64 = "mps"


def _has_float64(name: str) -> bool:
    return name == "auto" or torch.device(name).type != _WITHOUT_FLOAT64


Device = Annotated[
    str,
    Rule(_is_named, "auto, or a device such as cpu, cuda or cuda:0"),
    Rule(_has_float64, "a device with float64, which sums of losses need and mps does not have"),
    Example("cpu"),
]
"""The name of a device that torch knows, on this machine or another."""


def available_devices() -> list[str]:
    """The names of this machine's devices that can train, the CPU first."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None, "an accelerator is available"
    kind = accelerator.type
    if kind == _WITHOUT_FLOAT64:
        return ["cpu"]
    return ["cpu", kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given, so that a clock sees all of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def drawing_gpus() -> list[torch.device]:
    """The GPUs whose random streams can be read, which are none where the driver is too old.

    torch then counts GPUs all the same, and fails when it is asked for their streams.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(count)]


def find_device(name: str) -> torch.device:
    """The device of a name: for ``auto`` a GPU if there is one, for ``cuda`` that of this rank.

    Nothing is allocated.

    Raises:
        ValueError: If this machine does not have it.
    """
    available = available_devices()
    if name == "auto":
        name = "cuda" if "cuda" in available else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type not in available or (device.index and str(device) not in available):
        reason = ""
        if device.type == "cuda" and not torch.backends.cuda.is_built():
            reason = " (this torch is built without CUDA)"
        elif device.type == _WITHOUT_FLOAT64:
            reason = " (it has no float64, which sums of losses need)"
        raise ValueError(
            f"cannot compute on {str(device)!r}{reason}, here is {', '.join(available)}: "
            f"--device {available[0]}"
        )
    return device
