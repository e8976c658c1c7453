"""Grids: the levels a value may take, in units of its step size, and rounding to them."""

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from fogzo.quantizers.checks import is_int, is_number, require_type

Levels = Literal["half", "integer", "unsigned"]

# Far above the round-off of a sum in float32, far below anything that the loss would notice.
TIE_MARGIN = 2.0**-12


@dataclass(frozen=True)
class Grid:
    """Evenly spaced levels ``spacing * code + offset`` for integer codes ``low_code..high_code``.

    ``x`` below always means ``weight / step_size``. A grid whose offset is half a spacing has a
    threshold at zero and rounds by ``floor``; one with offset 0 has a level at zero and rounds to
    the nearest integer (ties to even), as every integer kernel does.

    Attributes:
        name: What error messages and reports call it.
        low_code: Smallest integer code.
        high_code: Largest integer code.
        offset: Level of code 0, 0 or ``spacing / 2``.
        spacing: Distance between neighbouring levels.
        margin: How far below their places the thresholds lie, in step sizes; see `for_inputs`.
    """

    name: str
    low_code: int
    high_code: int
    offset: float = 0.0
    spacing: float = 1.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        require_type("name", self.name, str, 'Grid("ternary", -1, 1)')
        if not (is_int(self.low_code) and is_int(self.high_code)):
            raise ValueError(
                f"the codes of a grid must be integers, got {self.low_code!r}..{self.high_code!r}: "
                'for example Grid("ternary", -1, 1)'
            )
        if self.low_code >= self.high_code:
            raise ValueError(
                f"a grid needs two levels or more, got codes {self.low_code}..{self.high_code}: "
                'use low_code < high_code, for example Grid("ternary", -1, 1)'
            )
        numbers = is_number(self.offset) and is_number(self.spacing)
        if not (numbers and 0 < self.spacing < math.inf and self.offset in (0.0, self.spacing / 2)):
            raise ValueError(
                f"got offset={self.offset!r} and spacing={self.spacing!r}: the spacing must be "
                "positive and the offset 0 (a level at zero) or spacing / 2 (a threshold at zero), "
                'for example Grid("half", -2, 1, offset=0.5)'
            )
        if not (is_number(self.margin) and 0 <= self.margin < self.spacing / 2):
            raise ValueError(
                f"the margin must be from 0 to less than half of the spacing, got {self.margin!r}: "
                "for example for_inputs(uniform(2))"
            )
        # Now, as torch.compile cannot enter the lock of Python 3.11's cached_property.
        _ = self.thresholds

    @property
    def num_levels(self) -> int:
        """How many levels the grid has."""
        return self.high_code - self.low_code + 1

    @property
    def bits(self) -> float:
        """Information per weight, ``log2(num_levels)``: 1.585 for ternary."""
        return math.log2(self.num_levels)

    @property
    def low(self) -> float:
        """Smallest level, in step sizes."""
        return self.spacing * self.low_code + self.offset

    @property
    def high(self) -> float:
        """Largest level, in step sizes."""
        return self.spacing * self.high_code + self.offset

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """Where the rounded value jumps by ``spacing``, ascending, in step sizes."""
        codes = range(self.low_code, self.high_code)
        return tuple(self.spacing * (code + 0.5) + self.offset - self.margin for code in codes)

    @property
    def gaussian_step_size(self) -> float:
        """The step size with the smallest squared error on a unit Gaussian."""
        return _gaussian_step_size(self)

    def round_to_code(self, x: Tensor) -> Tensor:
        """The code of the nearest level, as a float tensor of ``x``'s shape and dtype."""
        if self.margin:
            x = x + self.margin
        if self.spacing != 1.0:
            x = x / self.spacing
        # floor(x), not round(x - 0.5): subtracting first would send -1e-9 to +level.
        code = torch.floor(x) if self.offset else torch.round(x)
        # A clamp in place by the name that torch.func.vmap knows.
        return torch.nn.functional.hardtanh_(code, self.low_code, self.high_code)

    def level(self, code: Tensor) -> Tensor:
        """The level of each code, in step sizes."""
        if self.spacing != 1.0:
            code = code * self.spacing
        return code + self.offset if self.offset else code

    def round(self, x: Tensor) -> Tensor:
        """The nearest level, in step sizes.

        >>> import torch
        >>> uniform(2, "half").round(torch.tensor([-9.0, -0.2, 0.0, 0.7, 1.2]))
        tensor([-1.5000, -0.5000,  0.5000,  0.5000,  1.5000])
        >>> SIGN.round(torch.tensor([-0.1, 0.0, 3.0]))
        tensor([-1.,  1.,  1.])
        """
        return self.level(self.round_to_code(x))

    def round_(self, x: Tensor) -> Tensor:
        """`round`, in place: on a large weight, memory that is already there costs half."""
        if self.margin:
            x.add_(self.margin)
        if self.spacing != 1.0:
            x.div_(self.spacing)
        torch.nn.functional.hardtanh_(
            x.floor_() if self.offset else x.round_(), self.low_code, self.high_code
        )
        if self.spacing != 1.0:
            x.mul_(self.spacing)
        return x.add_(self.offset) if self.offset else x


def uniform(bits: int, levels: Levels | None = None) -> Grid:
    """A uniform grid of ``2**bits`` levels.

    Args:
        bits: 1 to 8.
        levels: ``"integer"`` gives ``-2^(b-1) .. 2^(b-1)-1``, ``"half"`` the symmetric
            ``±1/2, ±3/2, ...``. By default half up to 2 bits, where the wasted negative level of
            the integer grid costs most (squared error .119 against .149 on a unit Gaussian),
            integer above. ``"unsigned"`` gives ``0 .. 2^b-1``, for inputs that cannot be negative.

    Raises:
        ValueError: If ``bits`` is not an integer from 1 to 8 or ``levels`` is unknown.
    """
    if not is_int(bits) or not 1 <= bits <= 8:
        raise ValueError(
            f"bits must be an integer from 1 to 8, got {bits!r}: for example fogzo.fixed(bits=2); "
            "for three levels use fogzo.ternary()"
        )
    if levels is None:
        levels = "half" if bits <= 2 else "integer"
    if not (isinstance(levels, str) and levels in ("half", "integer", "unsigned")):
        raise ValueError(
            f'levels must be "half", "integer" or "unsigned", got {levels!r}: '
            f'for example fogzo.fixed(bits={bits}, levels="half")'
        )
    if levels == "unsigned":
        return Grid(f"uniform{bits}-unsigned", 0, 2**bits - 1)
    offset = 0.5 if levels == "half" else 0.0
    return Grid(f"uniform{bits}-{levels}", -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, offset)


def unsigned(grid: Grid) -> Grid:
    """The unsigned grid of as many bits as a uniform one; any other grid as it is.

    >>> unsigned(uniform(2, "half")).name, unsigned(TERNARY).name
    ('uniform2-unsigned', 'ternary')
    """
    require_type("grid", grid, Grid, "unsigned(uniform(2))")
    bits = grid.num_levels.bit_length() - 1
    if 1 <= bits <= 8 and grid in (uniform(bits, "half"), uniform(bits, "integer")):
        return uniform(bits, "unsigned")
    return grid


def for_inputs(grid: Grid) -> Grid:
    """The grid by which inputs of layers are rounded: thresholds at zero move down by 2^-12.

    Inputs are sums, and many of them are exactly zero in exact arithmetic (zero padding, quantized
    terms that cancel). In floating point the order of the sum decides the sign of what is left, so
    with a threshold at zero the same network would give other outputs by every kernel, batch size,
    device and precision. Just above the threshold they all round up, as an exact zero does. The
    other thresholds move too, as values on multiples of a step have ties there for the same reason.

    Integer levels have no threshold at zero and stay as they are, so that integer kernels, which
    round to the nearest, reproduce them exactly. They are no default for inputs: at 2 bits their
    squared error on a Gaussian is a quarter larger.

    >>> import torch
    >>> for_inputs(uniform(2, "half")).round(torch.tensor([-0.1, -1e-6, 0.0]))
    tensor([-0.5000,  0.5000,  0.5000])
    """
    return replace(grid, margin=TIE_MARGIN) if grid.offset else grid


TERNARY = Grid("ternary", -1, 1)
"""Levels -1, 0, 1."""

SIGN = Grid("sign", -1, 0, offset=1.0, spacing=2.0)
"""Levels -1 and 1, with sign(0) = +1."""


@lru_cache(maxsize=64)
def _gaussian_step_size(grid: Grid) -> float:
    """Golden-section search of ``E (x - a Q(x/a))^2`` for ``x ~ N(0, 1)``.

    With thresholds t_k: ``E[x Q] = spacing * sum_k phi(a t_k)`` and E[Q^2] is a sum of interval
    probabilities, so the error is exact and no published table has to be trusted.
    """
    levels = [
        grid.spacing * code + grid.offset for code in range(grid.low_code, grid.high_code + 1)
    ]

    def error(step: float) -> float:
        cuts = [step * threshold for threshold in grid.thresholds]
        density = sum(math.exp(-cut * cut / 2) for cut in cuts) / math.sqrt(2 * math.pi)
        below = [0.0, *(0.5 * math.erfc(-cut / math.sqrt(2)) for cut in cuts), 1.0]
        square = sum(l * l * (b - a) for l, a, b in zip(levels, below, below[1:], strict=False))
        return 1 - 2 * step * grid.spacing * density + step * step * square

    ratio = (math.sqrt(5) - 1) / 2
    left, right = 1e-3 / grid.spacing, 4 / grid.spacing  # neighbours 0.001 to 4 apart
    for _ in range(80):
        inner_left, inner_right = right - ratio * (right - left), left + ratio * (right - left)
        if error(inner_left) < error(inner_right):
            right = inner_right
        else:
            left = inner_left
    return (left + right) / 2
