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
    padded = torch.nn.functional.pad(digits.int(), (0, -digits.shape[1] % count))
    weights = torch.tensor([base**place for place in range(count)], device=digits.device)
    packed = (padded.unflatten(1, (-1, count)) * weights).sum(-1)
    return packed.to(torch.uint8)


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
    places = torch.arange(bits, device=values.device)
    stream = (values.int().unsqueeze(-1) >> places & 1).flatten(1)
    padded = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32))
    # In 64 bits, as the highest bit of a word is the sign of an int32.
    weights = torch.ones(32, dtype=torch.int64, device=values.device) << torch.arange(
        32, device=values.device
    )
    words = (padded.unflatten(1, (-1, 32)) * weights).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_bits(words: Tensor, bits: int, size: int) -> Tensor:
    """The inverse of `pack_bits`: int32 values of shape (rows, size).

    >>> unpack_bits(torch.tensor([[801]], dtype=torch.int32), 4, 3)
    tensor([[1, 2, 3]], dtype=torch.int32)
    """
    stream = (words.unsqueeze(-1) >> torch.arange(32, device=words.device) & 1).flatten(1)
    places = torch.arange(bits, device=words.device)
    values = stream[:, : size * bits].unflatten(1, (-1, bits)) << places
    return values.sum(-1).to(torch.int32)
