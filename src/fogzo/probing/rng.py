"""Random streams: captured and put back, never reseeded.

A closure may draw from torch (dropout), from Python's ``random`` (LayerDrop) or from NumPy
(SpecAugment masks). Every probe must see the same draws, and the loop must not notice the probes.
"""

import ctypes
import json
import random
import sys
from collections.abc import Iterable
from typing import Any

import torch

NumpyState = Any


class RngState:
    """The state of every global random stream that a closure may draw from.

    Args:
        devices: Accelerators whose streams matter too.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._torch = torch.get_rng_state()
        self._accelerators = [
            (torch.get_device_module(device), device, _accelerator_state(device))
            for device in devices
            if device.type != "cpu"
        ]
        self._python = random.getstate()
        self._numpy = numpy_state()

    def restore(self, numpy: bool = True) -> None:
        """Put every stream back; NumPy's only if asked, as it costs more than a small network."""
        torch.set_rng_state(self._torch)
        for module, device, state in self._accelerators:
            module.set_rng_state(state, device)
        random.setstate(self._python)
        if numpy and self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)

    def state_dict(self) -> dict[str, Any]:
        """The same as lists, numbers and strings only, to keep in a file."""
        state = {
            "torch": self._torch,
            "accelerators": [(str(device), stream) for _, device, stream in self._accelerators],
            "python": self._python,
            "numpy": self._numpy,
        }
        return json.loads(json.dumps(state, default=lambda array: array.tolist()))

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "RngState":
        """The streams of a `state_dict`, without accelerators that this machine lacks."""
        made = cls()
        made._torch = torch.tensor(state["torch"], dtype=torch.uint8)
        for name, stream in state["accelerators"]:
            device = torch.device(name)
            module = torch.get_device_module(device)
            if (device.index or 0) < module.device_count():
                made._accelerators.append((module, device, torch.tensor(stream, dtype=torch.uint8)))
        version, words, half_a_pair = state["python"]
        made._python = (version, tuple(words), half_a_pair)
        made._numpy = tuple(state["numpy"]) if isinstance(state["numpy"], list) else state["numpy"]
        return made

    def same_numpy(self, other: "RngState | None" = None) -> bool:
        """Whether NumPy's stream stands where it does in another capture, or stands now."""
        if other is self:
            return True
        mine, theirs = self._numpy, other._numpy if other else numpy_state()
        if mine is theirs:
            return True
        if mine is None or theirs is None:
            return False
        return theirs[2:] == mine[2:] and bool((theirs[1] == mine[1]).all())


_seen: tuple[bytes, NumpyState] = (b"", None)  # NumPy's generator in memory, and its state


def numpy_state() -> NumpyState | None:
    """NumPy's global stream, or None if nobody has imported NumPy's generators."""
    global _seen
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is None:
        return None
    # Reading the state costs as much as a small network's layer. Comparing its 625 words in memory
    # does not, and tells whether the stream has moved, unless half of a normal pair is left over.
    generator = numpy_random.get_bit_generator()
    if type(generator) is not numpy_random.MT19937:
        return numpy_random.get_state()
    memory = ctypes.string_at(generator.ctypes.state_address, 4 * 625)
    if memory == _seen[0]:
        return _seen[1]
    state = numpy_random.get_state()
    has_half_a_pair = bool(state[3])
    _seen = (b"", None) if has_half_a_pair else (memory, state)
    return state


def _accelerator_state(device: torch.device) -> torch.Tensor:
    return torch.get_device_module(device).get_rng_state(device)
