"""Small integers in bytes: digits of base n, and dense streams of bits."""

import torch
from torch import Tensor


def digits_per_byte(base: int) -> int:
    """How many digits of a base fit into one byte.

    >>> [digits_per_byte(base) for base in (2, 3, 4, 16, 256)]
    [8, 5, 4, 2, 1]
    """
    if not 2 <= base <= 256:
        raise ValueError(
            f"a byte holds digits of base 2 to 256, got base {base}: pack_digits(u, 3)"
        )
    count = 1
    while base ** (count + 1) <= 256:
        count += 1
    return count


def pack_digits(digits: Tensor, base: int) -> Tensor:
    """Rows of digits below `base` as rows of bytes, the first digit the lowest; zeros fill up.

    For 2, 4, 16 and 256 these are plain little-endian bits.

    Args:
        digits: Integers of shape (rows, size).
        base: 2 to 256.

    Returns:
        uint8, of shape (rows, size / digits_per_byte(base), rounded up).

    >>> pack_digits(torch.tensor([[1, 2, 0, 1, 2, 2]]), 3)
    tensor([[196,   2]], dtype=torch.uint8)
    """
    count = digits_per_byte(base)
    padded = torch.nn.functional.pad(digits.to(torch.uint8), (0, -digits.shape[1] % count))
    places = padded.unflatten(1, (-1, count)).unbind(-1)
    packed = places[-1].clone()
    for digit in reversed(places[:-1]):
        packed.mul_(base).add_(digit)
    return packed


def digit_table(base: int, device: torch.device | None = None) -> Tensor:
    """The digits of every byte, of shape (256, digits_per_byte(base)), uint8."""
    powers = [base**place for place in range(digits_per_byte(base))]
    places = torch.tensor(powers, device=device)
    return (torch.arange(256, device=device).unsqueeze(1) // places % base).to(torch.uint8)


def unpack_digits(packed: Tensor, base: int, size: int) -> Tensor:
    """The inverse of `pack_digits`: uint8 digits of shape (rows, size).

    >>> unpack_digits(torch.tensor([[196, 2]], dtype=torch.uint8), 3, 6)
    tensor([[1, 2, 0, 1, 2, 2]], dtype=torch.uint8)
    """
    return digit_table(base, packed.device)[packed.int()].flatten(1)[:, :size]


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Rows of `bits`-bit integers as rows of 32-bit words, value i at bits ``i * bits`` and up.

    The stream is little-endian and dense: a value may begin in one word and end in the next. Read
    as uint32 it is MLX's, as int32 that of compressed-tensors.

    Args:
        values: Integers from 0 to ``2**bits - 1``, of shape (rows, size).
        bits: 1 to 8.

    Returns:
        int32, of shape (rows, size * bits / 32, rounded up).

    >>> pack_bits(torch.tensor([[1, 2, 3]]), 4)
    tensor([[801]], dtype=torch.int32)
    """
    # Eight values take as many bytes as they have bits, and a number of 64 bits holds any eight.
    padded = torch.nn.functional.pad(values.to(torch.uint8), (0, -values.shape[1] % 32))
    eights = padded.unflatten(1, (-1, 8))
    packed = eights[..., 0].long()
    for place in range(1, 8):
        packed |= eights[..., place].long() << place * bits
    stream = packed.view(torch.uint8).unflatten(1, (-1, 8))[..., :bits].flatten(1)
    size = -(-values.shape[1] * bits // 32)
    return stream[:, : 4 * size].contiguous().view(torch.int32)


def unpack_bits(words: Tensor, bits: int, size: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 values of shape (rows, size).

    >>> unpack_bits(torch.tensor([[801]], dtype=torch.int32), 4, 3)
    tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    stream = words.contiguous().view(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % bits))
    eights = torch.nn.functional.pad(stream.unflatten(1, (-1, bits)), (0, 8 - bits))
    packed = eights.view(torch.int64).squeeze(-1)
    values = torch.empty(*packed.shape, 8, dtype=torch.uint8, device=words.device)
    for place in range(8):
        values[..., place] = packed >> place * bits & 2**bits - 1
    return values.flatten(1)[:, :size]
