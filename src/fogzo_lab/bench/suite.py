"""Running the sections of a benchmark and recording their environment."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from fogzo_lab.bench.config import BenchConfig
from fogzo_lab.bench.sections import SECTIONS
from fogzo_lab.system.environment import environment
from fogzo_lab.training.parallel import join_ranks
from fogzo_lab.training.state import own_random_streams

Results = dict[str, Any]
"""The content of results.json."""


def run_suite(
    config: BenchConfig, on_case: Callable[[int, int, str], None] | None = None
) -> Results:
    """Measure every section that the config names.

    Args:
        config: The sections and their limits.
        on_case: Called after every case with (sections done, sections in all, the case's name).

    Raises:
        ValueError: If there is no such device.
    """
    load, sections = _load_average(), {}
    with join_ranks(config.device) as ranks, own_random_streams(0), _threads(config.threads):
        for done, name in enumerate(config.sections):
            began = time.perf_counter()
            cases = []
            for case in SECTIONS[name](config, ranks.device):
                cases.append(asdict(case))
                if on_case is not None:
                    on_case(done, len(config.sections), f"{name}: {case.name}")
            sections[name] = {"seconds": time.perf_counter() - began, "cases": cases}
    if on_case is not None:
        on_case(len(config.sections), len(config.sections), "sections")
    return {
        "environment": environment(),
        "suite": config.suite,
        "threads": config.threads,
        "device": str(ranks.device),
        "malloc": {key: os.environ[key] for key in sorted(os.environ) if key.startswith("MALLOC_")},
        "rounds": config.limits.rounds,
        "seconds_a_comparison": config.limits.seconds,
        "load_average": [load, _load_average()],
        "sections": sections,
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load_average() -> float | None:
    """The load average of the last minute: other programs disturb the measurement."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
