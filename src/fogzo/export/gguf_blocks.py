"""GGUF blocks from integers and their scales: the bytes that llama.cpp reads, nothing rounded.

The quantizers of llama.cpp and gguf-py choose a scale of their own for every block, and so quantize
a trained low-bit weight a second time: Q4_0 of a weight of two bits is off by 6% (in norm). These
blocks hold the trained integers and scales instead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int16]


@dataclass(frozen=True)
class BlockType:
    """A way to store a block of consecutive weights of a row with one float16 scale.

    Attributes:
        name: What GGUF calls the type of the tensor.
        type_id: Its number in the file.
        size: Weights per block.
        num_bytes: Bytes per block.
        levels: The integers that a weight may be, in units of the scale.
        factor: The larger of the float16 numbers of a block is the scale times this.
    """

    name: str
    type_id: int
    size: int
    num_bytes: int
    levels: range
    _pack: Callable[[Integers, NDArray[np.float16]], list[Bytes]]
    factor: float = 1.0

    @property
    def bits(self) -> float:
        """Bits per weight, scales included.

        >>> q2_k(range(-2, 2)).bits
        2.625
        """
        return 8 * self.num_bytes / self.size

    def pack(self, integers: NDArray[np.integer], scales: NDArray[np.floating]) -> Bytes:
        """The bytes of weights ``integers * scales``, of shape (rows, bytes per row).

        Args:
            integers: Integers among `levels`, of shape (rows, inputs).
            scales: Positive scales of shape (rows, blocks per row), or (rows, 1) for one per row.

        Raises:
            ValueError: If the inputs are no multiple of the block, an integer is not among the
                levels, or a scale is no float16.

        >>> TQ2_0.pack(np.ones((1, 256), np.int8), np.array([[0.5]])).tobytes().hex()[-8:]
        'aaaa0038'
        """
        rows, inputs = integers.shape
        if inputs % self.size:
            raise ValueError(
                f"{self.name} stores blocks of {self.size} weights, and rows of {inputs} are no "
                "multiple of that"
            )
        if not np.isin(integers, self.levels).all():
            raise ValueError(
                f"{self.name} stores the integers {list(self.levels)}, got "
                f"{np.setdiff1d(integers, self.levels)[:5].tolist()} among others"
            )
        scales = np.broadcast_to(scales, (rows, inputs // self.size)).reshape(-1, 1)
        with np.errstate(over="ignore"):
            halves = scales.astype(np.float16)
            largest = (scales * self.factor).astype(np.float16)
        exact = (halves == scales) & (largest == scales * self.factor) & (scales > 0)
        if not exact.all():
            raise ValueError(
                f"{self.name} stores positive float16 scales, got {scales[~exact][:3].tolist()}"
            )
        blocks = integers.astype(np.int16).reshape(-1, self.size)
        packed = np.concatenate(self._pack(blocks, halves), axis=1)
        return packed.reshape(rows, -1)


def _bytes(values: NDArray[np.generic]) -> Bytes:
    """Rows of numbers as their bytes in memory order, little-endian."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


def _fields(values: Integers, bits: int, stride: int, span: int) -> Bytes:
    """Bytes of several weights each: those that lie ``stride`` apart, the first lowest.

    Each ``span`` consecutive weights become the same number of bytes divided by the weights per
    byte, in their order.
    """
    per_byte = 8 // bits
    parts = values.reshape(len(values), -1, span // (per_byte * stride), per_byte, stride)
    shifts = (bits * np.arange(per_byte)).reshape(-1, 1)
    return (parts << shifts).sum(3).astype(np.uint8).reshape(len(values), -1)


def _q1_0(q: Integers, d: NDArray[np.float16]) -> list[Bytes]:
    return [_bytes(d), _fields((q + 1) // 2, 1, 1, 128)]


def _q2_0(q: Integers, d: NDArray[np.float16]) -> list[Bytes]:
    return [_bytes(d), _fields(q + 1, 2, 1, 64)]


def _q2_0_negative(q: Integers, d: NDArray[np.float16]) -> list[Bytes]:
    return _q2_0(-q, -d)


def _q4_0(q: Integers, d: NDArray[np.float16]) -> list[Bytes]:
    return [_bytes(d), _fields(q + 8, 4, 16, 32)]


def _q5_0(q: Integers, d: NDArray[np.float16]) -> list[Bytes]:
    u = q + 16
    return [_bytes(d), _fields(u >> 4, 1, 1, 32), _fields(u & 15, 4, 16, 32)]


def _q8_0(q: Integers, d: NDArray[np.float16]) -> list[Bytes]:
    return [_bytes(d), _bytes(q.astype(np.int8))]


def _trits(u: Integers, count: int) -> Bytes:
    """Five trits per byte (four of them if there are only four), ``count`` weights apart.

    llama.cpp reads the k-th one as the integer part of 3 * (byte * 3^k mod 256) / 256.
    """
    digits = u.reshape(len(u), -1, count)
    powers = 3 ** (4 - np.arange(digits.shape[1]).reshape(-1, 1))
    return (((digits * powers).sum(1) * 256 + 242) // 243).astype(np.uint8)


def _tq1_0(q: Integers, d: NDArray[np.float16]) -> list[Bytes]:
    u = q + 1
    return [_trits(u[:, :160], 32), _trits(u[:, 160:240], 16), _trits(u[:, 240:], 4), _bytes(d)]


def _tq2_0(q: Integers, d: NDArray[np.float16]) -> list[Bytes]:
    return [_fields(q + 1, 2, 32, 128), _bytes(d)]


def _q3_k(q: Integers, d: NDArray[np.float16]) -> list[Bytes]:
    # All sub-scales are 1: 33 - 32, whose four low bits are 1 and two high bits 2.
    u = q + 4
    scales = np.tile(np.repeat(np.array([0x11, 0xAA], np.uint8), [8, 4]), (len(q), 1))
    return [_fields(u >> 2, 1, 32, 256), _fields(u & 3, 2, 32, 128), scales, _bytes(d)]


def q2_k(levels: range) -> BlockType:
    """Q2_K holds four evenly spaced levels with any zero: a weight is ``d * a * u - dmin * b``.

    Args:
        levels: Four integers, the first of them 0 to -15.

    >>> q2_k(range(-3, 4, 2)).pack(np.full((1, 256), 3), np.array([[0.5]]))[0, :20:16].tolist()
    [49, 255]
    """

    def pack(q: Integers, d: NDArray[np.float16]) -> list[Bytes]:
        # The factors a and b are the same in all sixteen bytes of the sub-scales.
        factors = np.full((len(q), 16), 1 | -levels.start << 4, np.uint8)
        codes = _fields((q - levels.start) // levels.step, 2, 32, 128)
        return [factors, codes, _bytes(d * np.float16(levels.step)), _bytes(d)]

    return BlockType("Q2_K", 10, 256, 84, levels, pack, factor=levels.step)


_TRITS = range(-1, 2)

Q1_0 = BlockType("Q1_0", 41, 128, 18, range(-1, 2, 2), _q1_0)
TQ1_0 = BlockType("TQ1_0", 34, 256, 54, _TRITS, _tq1_0)
TQ2_0 = BlockType("TQ2_0", 35, 256, 66, _TRITS, _tq2_0)
Q2_0 = BlockType("Q2_0", 42, 64, 18, range(-1, 3), _q2_0)
# With a negative scale its levels end at -2 and not at 2.
Q2_0_NEGATIVE = BlockType("Q2_0", 42, 64, 18, range(-2, 2), _q2_0_negative)
Q3_K = BlockType("Q3_K", 11, 256, 110, range(-4, 4), _q3_k)
Q4_0 = BlockType("Q4_0", 2, 32, 18, range(-8, 8), _q4_0)
Q5_0 = BlockType("Q5_0", 6, 32, 22, range(-16, 16), _q5_0)
Q8_0 = BlockType("Q8_0", 8, 32, 34, range(-128, 128), _q8_0)

_BLOCK_TYPES = (Q1_0, TQ1_0, TQ2_0, Q2_0, Q2_0_NEGATIVE, Q3_K, Q4_0, Q5_0, Q8_0)


def block_type(name: str, levels: range) -> BlockType:
    """The blocks of the type of that name that hold these integers.

    Raises:
        ValueError: If there is no such type, or it does not hold them.

    >>> block_type("Q2_0", range(-2, 2)) is Q2_0_NEGATIVE
    True
    """
    if name == "Q2_K" and len(levels) <= 4:
        return q2_k(range(levels.start, levels.start + 4 * levels.step, levels.step))
    for candidate in _BLOCK_TYPES:
        if candidate.name == name and set(levels) <= set(candidate.levels):
            return candidate
    names = dict.fromkeys(candidate.name for candidate in (*_BLOCK_TYPES, q2_k(range(4))))
    raise ValueError(
        f"no type {name!r} of GGUF holds the integers {list(levels)}: the types are "
        f"{', '.join(names)}"
    )
