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
        global _seen
        self._torch = torch.get_rng_state()
        self._accelerators = [
            (torch.get_device_module(device), device, _accelerator_state(device))
            for device in devices
            if device.type != "cpu"
        ]
        self._python = random.getstate()
        self._words, self._numpy = _numpy_words(), _seen[1]
        if not self._words or self._words != _seen[0]:
            numpy_random: Any = sys.modules.get("numpy.random")
            state: Any = numpy_random.get_state() if numpy_random else None
            if self._words and state[3]:
                self._words = b""  # they do not tell of half a normal pair that is left over
            self._numpy = state
            _seen = self._words, state

    @property
    def device_types(self) -> list[str]:
        """The types of devices whose streams these are."""
        return sorted({"cpu", *(device.type for _, device, _ in self._accelerators)})

    def restore(self) -> None:
        """Put every stream back; NumPy's only if it has moved, as it costs a small network."""
        torch.set_rng_state(self._torch)
        for module, device, state in self._accelerators:
            module.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None and (not self._words or _numpy_words() != self._words):
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
        made._torch = _stream(state["torch"])
        for name, stream in state["accelerators"]:
            device = torch.device(name)
            module = torch.get_device_module(device)
            if (device.index or 0) < module.device_count():
                made._accelerators.append((module, device, _stream(stream)))
        version, words, half_a_pair = state["python"]
        made._python = (version, tuple(words), half_a_pair)
        made._numpy = tuple(state["numpy"]) if isinstance(state["numpy"], list) else state["numpy"]
        made._words = b""
        return made


_seen: tuple[bytes, NumpyState | None] = (b"", None)  # the words of NumPy's stream, and its state


def _numpy_words() -> bytes:
    """The words in memory of NumPy's global stream; empty if they do not tell where it stands.

    Reading its state costs as much as a small network's layer, reading its 625 words does not.
    """
    numpy_random: Any = sys.modules.get("numpy.random")
    generator = numpy_random.get_bit_generator() if numpy_random else None
    if generator is None or type(generator) is not numpy_random.MT19937:
        return b""
    return ctypes.string_at(generator.ctypes.state_address, 4 * 625)


def _stream(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8, device="cpu")  # whatever device is the default


def _accelerator_state(device: torch.device) -> torch.Tensor:
    return torch.get_device_module(device).get_rng_state(device)
