"""The integer form of a quantized weight: integers times a scale, exactly as it was trained."""

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from fogzo.layers import QuantizedLayer
from fogzo.quantizers import Grid, Quantizer
from fogzo.quantizers.granularity import from_rows, to_rows


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight as ``integer * scale``, one rounding away from nothing else.

    Grids with a level at zero take their codes for integers. Grids with a threshold at zero (half
    grids, sign) take odd integers and half of their step: a half grid of b bits is every other
    number of a symmetric integer grid of b + 1 bits. The same weight is ``step * (u - zero)`` with
    ``u`` from 0 to ``num_levels - 1``.

    Attributes:
        integers: Of shape (outputs, inputs), the kernel positions of a convolution among the
            inputs; int8 where the grid fits it, in the rotated basis if there is a rotation.
        scale: Of shape (1, 1), (outputs, 1) or (outputs, groups): float32, or float64 for weights
            of float64. Half-precision steps are held exactly, as float32.
        low: The grid's smallest integer, whether or not the weight uses it.
        high: The grid's largest integer.
        stride: Distance between neighbouring integers: 1, or 2 where they are odd.
        quantizer: Which made it.
        shape: Of the weight.
        output_dim: Which dimension of the weight holds the outputs.
        dtype: Of the weight.
    """

    integers: Tensor
    scale: Tensor
    low: int
    high: int
    stride: int
    quantizer: Quantizer
    shape: torch.Size
    output_dim: int
    dtype: torch.dtype

    @property
    def num_levels(self) -> int:
        """How many levels the grid has."""
        return (self.high - self.low) // self.stride + 1

    @property
    def zero(self) -> float:
        """Which ``u`` stands for zero: 1 for ternary, 1.5 for a half grid of 2 bits."""
        return -self.low / self.stride

    @property
    def step(self) -> Tensor:
        """Distance between neighbouring levels in the weight's units, of ``scale``'s shape."""
        return self.scale * self.stride

    @property
    def bits(self) -> int:
        """Bits of the smallest two's complement integer that holds every integer of the grid.

        By the grid and not by this weight, which may happen not to use the outermost level.
        """
        return max((-self.low - 1).bit_length(), self.high.bit_length()) + 1

    @property
    def group_size(self) -> int | None:
        """How many consecutive inputs share a scale; None if all inputs of an output do."""
        size = self.quantizer.granularity
        return size if isinstance(size, int) else None

    @property
    def rotation_block(self) -> int:
        """Inputs that are rotated together, 0 without a rotation."""
        rotation = self.quantizer.rotation
        return 0 if rotation is None else rotation.block_for(self.integers.shape[1])

    def unsigned(self) -> Tensor:
        """``u`` from 0 to ``num_levels - 1``, of shape (outputs, inputs): uint8 where it fits."""
        if self.num_levels > 256:
            return (self.integers.int() - self.low) // self.stride
        return ((self.integers.short() - self.low) >> (self.stride - 1)).to(torch.uint8)

    def narrow_step(self) -> Tensor:
        """`step` in the narrowest dtype that holds it exactly."""
        for dtype in (self.quantizer.scale_dtype, self.dtype):
            if dtype in (torch.float16, torch.bfloat16) and not rounding_error(self.step, dtype):
                return self.step.to(dtype)
        return self.step

    def row_scale(self) -> Tensor:
        """The scale of every row, of shape (outputs, 1) or (outputs, groups)."""
        return self.scale.expand(len(self.integers), -1)

    def dequantize(self) -> Tensor:
        """The weight that the forward pass uses, bit for bit, in its own shape and dtype."""
        integers = self.integers.unflatten(1, (self.scale.shape[1], -1)).to(self.scale.dtype)
        rows = (integers * self.scale.unsqueeze(-1)).flatten(1).to(self.dtype)
        if self.quantizer.rotation is not None:
            rows = self.quantizer.rotation(rows)
        return from_rows(rows, self.shape, self.output_dim).contiguous()

    def round_steps(self, dtype: torch.dtype) -> "IntegerWeight":
        """The same integers with `scale` rounded to a dtype, and so `step`: the weights move."""
        limits = torch.finfo(dtype)
        smallest = limits.smallest_normal * limits.eps
        scale = self.scale.clamp(smallest, limits.max / self.stride).to(dtype)
        return replace(self, scale=scale.to(self.scale.dtype))

    def with_divisor(self) -> "IntegerWeight":
        """The same integers as a reader sees them that divides by `divisor`."""
        return replace(self, scale=self.divisor().to(self.scale.dtype).reciprocal())

    def divisor(self) -> Tensor:
        """The reciprocal of `scale` in the weight's dtype; infinite where that holds it not."""
        return self.scale.reciprocal().to(self.dtype)

    def step_change(self, dtype: torch.dtype) -> float:
        """The largest relative change of a step that `round_steps` makes; 0 where it makes none."""
        return largest_change(self.scale, self.round_steps(dtype).scale)


def integer_weight(layer: QuantizedLayer) -> IntegerWeight:
    """The weight of a quantized layer in integers.

    Raises:
        ValueError: If the levels of its grid are no multiples of one number exactly.
    """
    quantizer, dim = cast(Quantizer, layer.quantizer), layer.output_dim  # no experts come here
    grid = quantizer.grid
    if math.frexp(grid.spacing)[0] != 0.5:
        raise ValueError(
            f"the levels of the grid {grid.name!r} are {grid.spacing!r} apart, and rounding them "
            "leaves no common factor: only a spacing that is a power of two has an exact integer "
            f"form, for example Grid({grid.name!r}, {grid.low_code}, {grid.high_code})"
        )
    with torch.no_grad():
        weight = layer._whole_weight()
        step = quantizer.current_step_size(weight, layer._step(), dim)
        codes = to_rows(layer.codes(), dim)
    stride = 2 if grid.offset else 1
    low, high = _integer(grid, grid.low_code), _integer(grid, grid.high_code)
    integers = codes.to(_dtype(low, high)) * stride + (stride - 1)
    wide = torch.promote_types(step.dtype, torch.float32)
    scale = step.to(wide) * (grid.spacing / stride)
    if isinstance(quantizer.granularity, int):
        scale = scale.reshape(len(codes), -1)
    return IntegerWeight(
        integers.contiguous(),
        scale,
        low,
        high,
        stride,
        quantizer,
        weight.shape,
        dim,
        weight.dtype,
    )


def rounding_error(values: Tensor, dtype: torch.dtype) -> float:
    """The largest relative change that rounding to a dtype makes; 0 where it holds all of them."""
    return largest_change(values, values.to(dtype).to(values.dtype))


def largest_change(values: Tensor, rounded: Tensor) -> float:
    """The largest relative change from one to the other."""
    return float(((rounded - values).abs() / values.abs()).max())


def _integer(grid: Grid, code: int) -> int:
    return 2 * code + 1 if grid.offset else code


def _dtype(low: int, high: int) -> torch.dtype:
    for dtype in (torch.int8, torch.int16):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return dtype
    return torch.int32
