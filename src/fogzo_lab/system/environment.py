"""The environment of a measurement: hardware, versions, date."""

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fogzo


def version_of(library: str) -> str:
    """The installed version of a library, or "none"."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def library_versions() -> dict[str, str]:
    """Of the libraries besides torch that make the networks and the data of any run."""
    return {library: version_of(library) for library in ("transformers", "kornia")}


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
