"""Peak memory, from torch's own allocator."""

import os
from collections.abc import Callable

import torch

from fogzo_lab.bench.cases import NotHereError


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The peak number of bytes of tensors on a device while a function runs.

    Tensors that existed before do not count.

    Raises:
        NotHereError: If torch does not report it for the device.
    """
    if device.type == "cpu":
        return _peak_of_events(function)
    module = torch.get_device_module(device)
    if not hasattr(module, "max_memory_allocated"):
        raise NotHereError(f"torch does not report the peak memory of {device.type}")
    module.synchronize(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    function()
    module.synchronize(device)
    return int(module.max_memory_allocated(device)) - int(before)


def _peak_of_events(function: Callable[[], object]) -> int:
    """The peak on a CPU, which has no such statistics: from the profiler's log of allocations."""
    # Otherwise it would write a line to the terminal whenever it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        alive += change
        peak = max(peak, alive)
    return peak
