"""The noise u of one step's samples: drawn from seeds, and kept where memory allows."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

from fogzo.buffers import Buffers
from fogzo.collectives import is_sharded, shard_like
from fogzo.weights import QuantizedWeight

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
    size = sum(w.param.numel() * working_dtype(w.param).itemsize for w in weights)
    return not lean and num_samples * size <= _MOST_KEPT


class Noise:
    """Standardised noise of every sample and weight, by each weight's smoothing law.

    What it returns is to be left alone, as it may be what the next call returns.

    Args:
        weights: What it is for.
        seed: Every sample and weight has a seed of its own that follows from it.
        buffers: Where what is drawn is kept, as much memory as the weights take a sample; without
            them it is drawn again for each use. Of sharded weights nothing is kept.
    """

    def __init__(
        self, weights: Sequence[QuantizedWeight], seed: int, buffers: Buffers | None = None
    ) -> None:
        self._weights = weights
        self._seed = seed
        self._seeds: dict[int, int] = {}
        self._buffers = buffers
        self._drawn: dict[tuple[int, int], Tensor] = {}
        self._generators: dict[torch.device, Generator] = {}

    def sign(self, sample: int) -> float:
        """The fair coin s_i."""
        return 1.0 if self._seed_of(sample) & 1 else -1.0

    def of(self, sample: int, index: int) -> Tensor:
        """u_i of (this rank's part of) one weight, the same whenever it is called."""
        param = self._weights[index].param
        dtype = working_dtype(param)
        if self._buffers is None or is_sharded(param):
            u = torch.empty(param.shape, dtype=dtype, device=param.device)
            # All ranks draw all of it, so that they agree on one direction.
            return shard_like(self._fill_(u, sample, index), param)
        if (sample, index) not in self._drawn:
            key, contiguous = (id(param), sample), torch.contiguous_format
            u = self._buffers.empty(key, param, dtype, contiguous)
            self._drawn[sample, index] = self._fill_(u, sample, index)
        return self._drawn[sample, index]

    def _fill_(self, out: Tensor, sample: int, index: int) -> Tensor:
        generator = self._generators.get(out.device)
        if generator is None:
            generator = self._generators[out.device] = Generator(out.device)
        # Without the coin's bit.
        generator.manual_seed(mix_seed(self._seed_of(sample) >> 1, index))
        return self._weights[index].surrogate.perturbation.sample_(out, generator)

    def _seed_of(self, sample: int) -> int:
        if sample not in self._seeds:
            self._seeds[sample] = mix_seed(self._seed, sample)
        return self._seeds[sample]
