"""The Hadamard rotation: orthonormal, its own inverse, and safe in every mode."""

import pytest
import torch
from torch import Generator
from torch._subclasses.fake_tensor import FakeTensorMode

import fogzo
from fogzo.quantizers import Hadamard
from fogzo.quantizers.rotations import _cached_matrix, _multiplies_exactly


def _draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("size", [2, 6, 32, 96, 128, 200, 384])
def test_it_is_orthonormal_and_its_own_inverse(size):
    matrix = Hadamard()(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix, matrix.T)
    x = _draw(3, size)
    assert torch.allclose(Hadamard()(Hadamard()(x)), x, atol=1e-12)
    assert torch.allclose(Hadamard()(x).norm(dim=1), x.norm(dim=1))


def test_it_is_sylvesters_matrix_in_each_block():
    matrix = Hadamard(block=4)(torch.eye(8, dtype=torch.float64))
    h4 = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.equal(matrix, torch.block_diag(h4, h4).double())


@pytest.mark.parametrize(
    "size, block", [(1024, 128), (128, 128), (96, 32), (64, 64), (10, 2), (200, 8), (384, 128)]
)
def test_the_block_is_the_largest_power_of_two_that_divides(size, block):
    assert Hadamard().block_for(size) == block
    matrix = Hadamard()(torch.eye(size, dtype=torch.float64))
    assert (matrix != 0).sum(1).tolist() == [block] * size


@pytest.mark.parametrize("size", [1, 3, 97])
def test_an_odd_size_is_refused_with_a_way_out(size):
    with pytest.raises(ValueError, match=rf"got {size}: leave this layer out with filter_fn"):
        Hadamard()(torch.ones(2, size))


@pytest.mark.parametrize("block", [0, 1, -2, 3, 96])
def test_a_block_that_is_no_power_of_two_is_refused(block):
    with pytest.raises(ValueError, match=r"power of two.*Hadamard\(block=128\)"):
        Hadamard(block)


def test_leading_dimensions_are_batches():
    x = _draw(2, 3, 64)
    assert torch.allclose(Hadamard()(x)[1, 2], Hadamard()(x[1, 2]))


def test_autocast_does_not_round_it():
    x = _draw(4, 128, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = Hadamard()(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, Hadamard()(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_products_of_lower_precision_are_not_taken(compiled):
    x, rotate = _draw(4, 256, dtype=torch.float32), Hadamard()
    exact = rotate(x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # TF32, or bfloat16 on some CPUs
    try:
        assert not _multiplies_exactly(x)
        if compiled:
            torch.compiler.reset()
            rotate = torch.compile(rotate, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(rotate(x), exact, rtol=0, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert _multiplies_exactly(x)


def test_a_first_use_by_fake_tensors_does_not_spoil_real_ones():
    _cached_matrix.cache_clear()
    with FakeTensorMode():
        Hadamard()(torch.empty(4, 64))
    assert Hadamard()(_draw(4, 64, dtype=torch.float32)).isfinite().all()


def test_a_first_use_in_inference_mode_does_not_spoil_training():
    _cached_matrix.cache_clear()
    quantizer = fogzo.quest(2)
    weight = _draw(4, 64, dtype=torch.float32)
    with torch.inference_mode():
        before = quantizer(weight.clone())
    weight.requires_grad_()
    after = quantizer(weight)
    after.square().sum().backward()
    assert torch.equal(before, after.detach()) and weight.grad.isfinite().all()


def test_its_gradient_is_the_rotated_gradient():
    x, grad = _draw(3, 96).requires_grad_(), _draw(3, 96, seed=1)
    Hadamard()(x).backward(grad)
    assert torch.allclose(x.grad, Hadamard()(grad))


@pytest.mark.parametrize("output_dim, shape", [(0, (6, 32)), (1, (32, 6)), (1, (4, 6, 2, 3))])
def test_the_quantizer_rotates_along_the_inputs_of_any_layout(output_dim, shape):
    quantizer, x = fogzo.quest(2), _draw(*shape)
    once = quantizer.rotate(x, output_dim)
    assert once.shape == x.shape and not torch.allclose(once, x)
    assert torch.allclose(quantizer.rotate(once, output_dim), x, atol=1e-12)
    # An output channel keeps its own inputs, so its norm stays.
    rest = [dim for dim in range(len(shape)) if dim != output_dim]
    assert torch.allclose(once.square().sum(rest), x.square().sum(rest))


@pytest.mark.parametrize("quantizer", [fogzo.quest(2), fogzo.bbq(2)], ids=["quest", "bbq"])
def test_codes_of_transposed_weights_dequantize_exactly(quantizer):
    w = _draw(64, 128).float()  # so large that products depend on the order of memory
    step = quantizer.initial_step_size(w, 1)
    codes, used = quantizer.codes(w, step, 1), quantizer.current_step_size(w, step, 1)
    assert torch.equal(quantizer.dequantize(codes, used, 1), quantizer(w, step, 1))


def test_without_rotation_rotate_is_the_identity():
    x = _draw(2, 3)
    assert fogzo.lsq(2).rotate(x) is x
