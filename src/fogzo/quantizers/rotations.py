"""Rotations: an orthonormal change of basis along the input, before rounding."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fogzo.quantizers.checks import is_int


@dataclass(frozen=True)
class Hadamard:
    """Block-diagonal orthonormal Hadamard transform of the last dimension.

    It spreads outliers over a block, so that rounding meets nearly Gaussian values (QuEST). It is
    symmetric and its own inverse.

    Attributes:
        block: Largest block size, a power of two. Where it does not divide the input size, the
            largest power of two that does is used instead: 96 inputs are rotated in blocks of 32.
    """

    block: int = 128

    def __post_init__(self) -> None:
        if not is_int(self.block) or self.block < 2 or self.block & (self.block - 1):
            raise ValueError(
                f"a Hadamard block must be a power of two, 2 or more, got {self.block!r}: "
                "for example Hadamard(block=128)"
            )

    def block_for(self, size: int) -> int:
        """The block size used for an input of ``size``.

        Raises:
            ValueError: If ``size`` is odd, so that no block divides it.
        """
        block = 1  # not by bits, which the compiler does not have of a size that may change
        while 2 * block <= self.block and size % (2 * block) == 0:
            block *= 2
        if block < 2:
            raise ValueError(
                f"a Hadamard rotation needs an even input size, got {size}: leave this layer out "
                "with filter_fn, or quantize it with dataclasses.replace(quantizer, rotation=None)"
            )
        return block

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate ``x`` of shape (..., size); applying it twice gives ``x`` back.

        >>> Hadamard()(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
        tensor([[1.4142, 0.0000],
                [0.7071, 0.7071]])
        """
        block = self.block_for(x.shape[-1])
        if torch.compiler.is_compiling() or not _multiplies_exactly(x):
            return _butterfly(x, block)
        # A mode may make tensors of its own kind (fake ones), which no other call could use.
        plain = torch._C._len_torch_dispatch_stack() == 0
        matrix = (_cached_matrix if plain else hadamard_matrix)(block, x.dtype, x.device)
        # Autocast would round the latent weights to bfloat16 inside this product. It does not know
        # the meta device, where models are built before their weights are loaded.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return (x.unflatten(-1, (-1, block)) @ matrix).flatten(-2)


def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's orthonormal Hadamard matrix of a power-of-two size."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def _multiplies_exactly(x: Tensor) -> bool:
    """Whether products of float32 are: in TF32 or bfloat16 they would move weights to other codes.

    `torch.set_float32_matmul_precision` allows these, on GPUs and on some CPUs.
    """
    if x.dtype != torch.float32:
        return True
    backend = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return precision in ("none", "ieee")


def _butterfly(x: Tensor, block: int) -> Tensor:
    """The rotation by sums and differences, which are slower than a product and never rounded."""
    x, half = x.unflatten(-1, (-1, block)), 1
    while half < block:
        first, second = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x, half = torch.stack([first + second, first - second], -2).flatten(-3), 2 * half
    return (x / block**0.5).flatten(-2)


@lru_cache(maxsize=32)
def _cached_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A matrix first asked for in inference mode could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        return hadamard_matrix(size, dtype, device)
