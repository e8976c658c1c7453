"""The noise u of one step's samples: drawn from seeds, and kept where memory allows.

On a CPU uniform noise stays what the generator gave, integers of 16 bits: half the memory, and half
of what is read and written, of floats.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from fogzo.collectives import is_sharded, shard_like
from fogzo.layers.weights import QuantizedWeight
from fogzo.probing.buffers import Buffers
from fogzo.quantizers.smoothing import random_odd_codes, words_of

_MOST_KEPT = 16 * 2**20  # bytes
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def mix_seed(*parts: int) -> int:
    """One well-mixed 64-bit seed from several integers (splitmix64's finaliser)."""
    state = 0
    for part in parts:
        state = (state + part + _GOLDEN) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def working_dtype(param: Tensor) -> torch.dtype:
    """In which a weight's perturbation is computed."""
    # bfloat16 would swallow sqrt(q) * eps * u next to the weight.
    return torch.float32 if param.dtype.itemsize < 4 else param.dtype


def _code_unit(weight: QuantizedWeight) -> float | None:
    """The unit of the integers that a weight's noise consists of; None if it is kept in floats."""
    return weight.surrogate.perturbation.code_unit if weight.param.is_cpu else None


def _itemsize(weight: QuantizedWeight) -> int:
    return working_dtype(weight.param).itemsize if _code_unit(weight) is None else 2


def is_kept(
    keep: bool | Literal["auto"], weights: Sequence[QuantizedWeight], num_samples: int, lean: bool
) -> bool:
    """Whether to keep the noise of a step; ``"auto"`` bounds its memory, and leaves lean lean.

    Raises:
        ValueError: If it is neither true, false nor "auto".
    """
    if isinstance(keep, bool):
        return keep
    if keep != "auto":
        raise ValueError(
            f'keep_noise must be True, False or "auto", got {keep!r}: keep_noise=False draws the '
            "noise again for its second use"
        )
    size = sum(w.param.numel() * _itemsize(w) for w in weights)
    return not lean and num_samples * size <= _MOST_KEPT


class Draw(NamedTuple):
    """Noise ``u = unit * values`` of one weight. Leave the values as they are: they may be kept."""

    values: Tensor
    unit: float


class Noise:
    """Standardised noise of every sample and weight, by each weight's smoothing law.

    Args:
        weights: What it is for.
        seed: Every sample and weight has a seed of its own that follows from it.
        buffers: Where what is drawn is kept; without them it is drawn again for each use. Of
            sharded weights nothing is kept.
    """

    def __init__(
        self, weights: Sequence[QuantizedWeight], seed: int, buffers: Buffers | None = None
    ) -> None:
        self._weights = weights
        self._seed = seed
        self._seeds: dict[int, int] = {}
        self._buffers = buffers
        self._drawn: dict[tuple[int, int], Draw] = {}
        self._generators: dict[torch.device, Generator] = {}

    def sign(self, sample: int) -> float:
        """The fair coin s_i."""
        return 1.0 if self._seed_of(sample) & 1 else -1.0

    def of(self, sample: int, index: int) -> Draw:
        """u_i of (this rank's part of) one weight, the same whenever it is called."""
        weight = self._weights[index]
        if is_sharded(weight.param):
            # All ranks draw all of it, so that they agree on one direction.
            values, unit = self._draw(sample, index)
            return Draw(shard_like(values, weight.param), unit)
        if self._buffers is None:
            return self._draw(sample, index)
        if (sample, index) not in self._drawn:
            self._drawn[sample, index] = self._draw(sample, index)
        return self._drawn[sample, index]

    def _draw(self, sample: int, index: int) -> Draw:
        weight = self._weights[index]
        param, law, unit = weight.param, weight.surrogate.perturbation, _code_unit(weight)
        generator = self._generator(param.device)
        # Without the coin's bit.
        generator.manual_seed(mix_seed(self._seed_of(sample) >> 1, index))
        if unit is None:
            out = self._empty(param, sample, param.shape, working_dtype(param))
            return Draw(law.sample_(out, generator), 1.0)
        words = self._empty(param, sample, (words_of(param),), torch.int64)
        codes = random_odd_codes(words, generator)[: param.numel()]
        return Draw(codes.view(param.shape), unit)

    def _empty(
        self, param: Tensor, sample: int, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        if self._buffers is None or is_sharded(param):
            return torch.empty(shape, dtype=dtype, device=param.device)
        return self._buffers.empty((id(param), sample), shape, dtype, param.device)

    def _generator(self, device: torch.device) -> Generator:
        if device not in self._generators:
            self._generators[device] = Generator(device)
        return self._generators[device]

    def _seed_of(self, sample: int) -> int:
        if sample not in self._seeds:
            self._seeds[sample] = mix_seed(self._seed, sample)
        return self._seeds[sample]
