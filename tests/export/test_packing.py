import pytest
import torch

from fogzo.export.packing import (
    digits_per_byte,
    pack_bits,
    pack_digits,
    unpack_bits,
    unpack_digits,
)

SIZES = [1, 7, 40, 65]


def random_integers(high, size, rows=5):
    generator = torch.Generator().manual_seed(high * 1000 + size)
    return torch.randint(0, high, (rows, size), generator=generator)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("base", [2, 3, 4, 5, 8, 16, 256])
def test_digits_come_back(base, size):
    digits = random_integers(base, size)
    packed = pack_digits(digits, base)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, -(-size // digits_per_byte(base)))
    assert torch.equal(unpack_digits(packed, base, size).long(), digits)


def test_five_ternary_digits_take_a_byte():
    assert pack_digits(torch.full((1, 5), 2), 3).item() == 3**5 - 1


@pytest.mark.parametrize("base", [1, 257])
def test_other_bases_are_refused(base):
    with pytest.raises(ValueError, match="base 2 to 256"):
        pack_digits(torch.zeros(1, 1), base)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_streams_of_bits_come_back(bits, size):
    values = random_integers(2**bits, size)
    words = pack_bits(values, bits)
    assert words.dtype == torch.int32
    assert words.shape == (5, -(-size * bits // 32))
    assert torch.equal(unpack_bits(words, bits, size).long(), values)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_stream_is_that_of_compressed_tensors(bits, size):
    helpers = pytest.importorskip("compressed_tensors.compressors")
    values = random_integers(2**bits, size)
    signed = (values - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_bits(values, bits), helpers.pack_to_int32(signed, bits))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what transformers imports here
def test_four_rows_of_bitnet_are_base_4_digits():
    from transformers.integrations.bitnet import pack_weights

    values = random_integers(3, 6, rows=8)
    expected = pack_weights((values - 1).float())
    rows = values.reshape(4, -1).T  # row r, r + outputs / 4, ... in one byte
    assert torch.equal(pack_digits(rows, 4).reshape(2, 6), expected)
