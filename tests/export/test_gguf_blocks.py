import numpy as np
import pytest

from fogzo.export import gguf_blocks
from fogzo.export.gguf_blocks import BLOCK_TYPES

gguf = pytest.importorskip("gguf", reason="gguf-py reads the blocks back")

READ_BY_GGUF = [t for t in BLOCK_TYPES if t.name not in ("Q1_0", "Q2_0")]


def random_blocks(block_type, rows=5):
    rng = np.random.default_rng(0)
    integers = rng.choice(np.array(block_type.levels), size=(rows, 3 * block_type.size))
    scales = np.abs(rng.normal(size=(rows, 3)) / 50).astype(np.float16).astype(np.float32)
    return integers, scales


@pytest.mark.parametrize("block_type", READ_BY_GGUF, ids=lambda t: f"{t.name}{t.levels}")
def test_gguf_reads_the_trained_weights(block_type):
    integers, scales = random_blocks(block_type)
    packed = block_type.pack(integers, scales)
    read = gguf.dequantize(packed, gguf.GGMLQuantizationType[block_type.name])
    assert (read == integers * scales.repeat(block_type.size, 1)).all()


@pytest.mark.parametrize("block_type", READ_BY_GGUF, ids=lambda t: f"{t.name}{t.levels}")
def test_one_scale_per_row(block_type):
    integers, scales = random_blocks(block_type)
    repeated = block_type.pack(integers, scales[:, :1].repeat(3, 1))
    assert (block_type.pack(integers, scales[:, :1]) == repeated).all()


@pytest.mark.parametrize("block_type", BLOCK_TYPES, ids=lambda t: f"{t.name}{t.levels}")
def test_the_size_is_the_one_that_gguf_knows(block_type):
    if block_type.name != "Q2_0":
        known = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block_type.name]]
        assert (block_type.size, block_type.num_bytes) == known
    packed = block_type.pack(*random_blocks(block_type))
    assert packed.shape == (5, 3 * block_type.num_bytes)


def test_golden_bytes_of_the_types_that_gguf_cannot_read():
    # From quantize_row_q1_0_ref and quantize_row_q2_0_ref of llama.cpp (ggml 0.25.3), which are
    # exact on these weights.
    scale = np.array([[0.15625]])
    signs = np.where(np.arange(128) * 7 % 5 % 2, -1, 1)[None]
    assert gguf_blocks.Q1_0.pack(signs, scale).tobytes().hex() == (
        "0031e79c73ce39e79c73ce39e79c73ce39e7"
    )
    trits = (np.arange(64) * 7 % 11 % 3 - 1)[None]
    assert gguf_blocks.Q2_0.pack(trits, scale).tobytes().hex() == (
        "003144881911624684981121664488191162"
    )
    # -q times a negative scale.
    assert gguf_blocks.Q2_0_NEGATIVE.pack(-trits, scale).tobytes().hex() == (
        "00b144881911624684981121664488191162"
    )


def test_a_level_that_the_type_lacks():
    with pytest.raises(ValueError, match=r"Q2_0 stores the integers \[-1, 0, 1, 2\], got \[-2\]"):
        gguf_blocks.Q2_0.pack(np.full((1, 64), -2), np.ones((1, 1)))
    with pytest.raises(ValueError, match=r"Q2_K stores the integers \[-3, -1, 1, 3\], got \[0\]"):
        gguf_blocks.Q2_K_ODD.pack(np.zeros((1, 256), np.int8), np.ones((1, 1)))


def test_rows_that_are_no_whole_blocks():
    with pytest.raises(ValueError, match=r"blocks of 256 weights, and rows of 192"):
        gguf_blocks.TQ2_0.pack(np.zeros((1, 192), np.int8), np.ones((1, 1)))


@pytest.mark.parametrize("scale", [0.1, 1e-9, 1e6, 0.0, -1.0])
def test_a_scale_that_is_no_positive_float16(scale):
    with pytest.raises(ValueError, match="TQ2_0 stores positive float16 scales, got"):
        gguf_blocks.TQ2_0.pack(np.zeros((1, 256), np.int8), np.array([[scale]]))


def test_both_numbers_of_a_block_must_be_float16():
    # Q2_K stores the step, twice the scale of odd integers, and overflows first.
    with pytest.raises(ValueError, match="float16"):
        gguf_blocks.Q2_K_ODD.pack(np.ones((1, 256), np.int8), np.array([[60000.0]]))
