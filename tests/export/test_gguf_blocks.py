import numpy as np
import pytest

from fogzo.export import gguf_blocks
from fogzo.export.gguf_blocks import block_type, q2_k

gguf = pytest.importorskip("gguf", reason="gguf-py reads the blocks back")

BLOCK_TYPES = [
    gguf_blocks.Q1_0,
    gguf_blocks.TQ1_0,
    gguf_blocks.TQ2_0,
    gguf_blocks.Q2_0,
    gguf_blocks.Q2_0_NEGATIVE,
    q2_k(range(-2, 2)),
    q2_k(range(-3, 4, 2)),
    q2_k(range(4)),
    gguf_blocks.Q3_K,
    gguf_blocks.Q4_0,
    gguf_blocks.Q5_0,
    gguf_blocks.Q8_0,
]
READ_BY_GGUF = [t for t in BLOCK_TYPES if t.name not in ("Q1_0", "Q2_0")]


def random_blocks(kind, rows=5):
    rng = np.random.default_rng(0)
    integers = rng.choice(np.array(kind.levels), size=(rows, 3 * kind.size))
    scales = np.abs(rng.normal(size=(rows, 3)) / 50).astype(np.float16).astype(np.float32)
    return integers, scales


@pytest.mark.parametrize("kind", READ_BY_GGUF, ids=lambda t: f"{t.name}{t.levels}")
def test_gguf_reads_the_trained_weights(kind):
    integers, scales = random_blocks(kind)
    packed = kind.pack(integers, scales)
    read = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind.name])
    assert (read == integers * scales.repeat(kind.size, 1)).all()


@pytest.mark.parametrize("kind", READ_BY_GGUF, ids=lambda t: f"{t.name}{t.levels}")
def test_one_scale_per_row(kind):
    integers, scales = random_blocks(kind)
    repeated = kind.pack(integers, scales[:, :1].repeat(3, 1))
    assert (kind.pack(integers, scales[:, :1]) == repeated).all()


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda t: f"{t.name}{t.levels}")
def test_the_size_is_the_one_that_gguf_knows(kind):
    if kind.name != "Q2_0":
        known = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
        assert (kind.size, kind.num_bytes) == known
        assert kind.type_id == gguf.GGMLQuantizationType[kind.name]
    packed = kind.pack(*random_blocks(kind))
    assert packed.shape == (5, 3 * kind.num_bytes)


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
        q2_k(range(-3, 4, 2)).pack(np.zeros((1, 256), np.int8), np.ones((1, 1)))


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
        q2_k(range(-3, 4, 2)).pack(np.ones((1, 256), np.int8), np.array([[60000.0]]))


def test_the_type_is_found_by_its_name_and_levels():
    assert block_type("Q2_0", range(-1, 2)) is gguf_blocks.Q2_0
    assert block_type("Q2_0", range(-2, 2)) is gguf_blocks.Q2_0_NEGATIVE
    assert block_type("Q2_K", range(-1, 2, 2)).levels == range(-1, 6, 2)
    with pytest.raises(ValueError, match=r"no type 'Q2_0' of GGUF holds the integers \[-3, -1"):
        block_type("Q2_0", range(-3, 4, 2))
    with pytest.raises(ValueError, match=r"no type 'Q9' .* TQ2_0, .* Q2_K"):
        block_type("Q9", range(2))
