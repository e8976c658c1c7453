"""The environment of a measurement: hardware, versions, date."""

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fogzo


def library_versions() -> dict[str, str]:
    """Of the libraries besides torch that make a run's networks, data and methods."""
    found = {}
    for library in ("transformers", "torchao", "kornia"):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "none"
    return found


def environment() -> dict[str, str | int]:
    """Facts to publish with a number; none names a machine or a person."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "fogzo": fogzo.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
