"""The sections of a benchmark, by name: each yields its cases as they are measured."""

from collections.abc import Callable, Iterator

import torch

from fogzo_lab.bench.cases import Case
from fogzo_lab.bench.config import BenchConfig
from fogzo_lab.bench.sections import compiled, export, layers, memory, probes, scaling, steps

SECTIONS: dict[str, Callable[[BenchConfig, torch.device], Iterator[Case]]] = {
    "steps": steps.run,
    "memory": memory.run,
    "layers": layers.run,
    "compiled": compiled.run,
    "probes": probes.run,
    "scaling": scaling.run,
    "export": export.run,
}

__all__ = ["SECTIONS"]
