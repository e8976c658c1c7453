"""The quantizer of fused experts: one matrix per expert, all of them in one tensor."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fogzo.quantizers.companding import Bell
from fogzo.quantizers.granularity import Granularity
from fogzo.quantizers.grids import Grid
from fogzo.quantizers.quantizer import Quantizer
from fogzo.quantizers.rotations import Hadamard
from fogzo.quantizers.scales import Scale
from fogzo.quantizers.surrogates import Surrogate


@dataclass(frozen=True)
class ExpertQuantizer:
    """Quantizes each expert's matrix as `matrix` would quantize it alone.

    It answers as a `Quantizer` does in layers, for weights of shape (experts, outputs, inputs), or
    (experts, inputs, outputs) if they are ``transposed``. Step sizes are of shape (groups, 1),
    those of the first expert first: one for each expert where ``matrix.granularity`` is
    ``"tensor"``.

    >>> import fogzo
    >>> quantizer = ExpertQuantizer(fogzo.ternary(), transposed=False)
    >>> quantizer.quantize_weight(torch.tensor([[[1.0, -1.0]], [[6.0, 0.0]]]))
    tensor([[[ 1., -1.]],
    <BLANKLINE>
            [[ 3.,  0.]]])
    """

    matrix: Quantizer
    transposed: bool

    def __post_init__(self) -> None:
        if self.matrix.rotation is not None and self._one_step:
            raise ValueError(
                "a rotation of fused experts needs a step size for each output or group, got "
                'granularity="tensor": use granularity="channel"'
            )

    @property
    def grid(self) -> Grid:
        """As of `matrix`, like all that follow."""
        return self.matrix.grid

    @property
    def scale(self) -> Scale:
        """Where step sizes come from."""
        return self.matrix.scale

    @property
    def surrogate(self) -> Surrogate | str:
        """The backward rule."""
        return self.matrix.surrogate

    @property
    def rotation(self) -> Hadamard | None:
        """The change of basis, or None."""
        return self.matrix.rotation

    @property
    def granularity(self) -> Granularity:
        """Which weights of one expert share a step size."""
        return self.matrix.granularity

    @property
    def companding(self) -> Bell | None:
        """The curve before rounding, or None."""
        return self.matrix.companding

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """What step sizes are rounded to."""
        return self.matrix.scale_dtype

    def quantize_weight(
        self, weight: Tensor, step: Tensor | None = None, dim: int = 0, training: bool = False
    ) -> Tensor:
        """The quantized weights. ``dim`` is not used, here and below."""
        rows = self._of_rows.quantize_weight(self._rows(weight), step, 0, training)
        return self._back(rows, weight)

    def find_step_size(self, weight: Tensor, dim: int = 0) -> tuple[Tensor | None, int]:
        """As `Quantizer.find_step_size`."""
        fan_in = weight.shape[1 if self.transposed else 2]
        return self._of_rows.find_step_size(self._rows(weight), 0, fan_in)

    def initial_step_size(self, weight: Tensor, dim: int = 0) -> Tensor | None:
        """As `Quantizer.initial_step_size`."""
        return self.find_step_size(weight)[0]

    def empty_step_size(self, weight: Tensor, dim: int = 0) -> Tensor | None:
        """As `Quantizer.empty_step_size`."""
        return self._of_rows.empty_step_size(self._rows(weight))

    def current_step_size(self, weight: Tensor, step: Tensor | None = None, dim: int = 0) -> Tensor:
        """As `Quantizer.current_step_size`."""
        return self._of_rows.current_step_size(self._rows(weight), step)

    def step_size(self, weight: Tensor, step: Tensor | None = None, dim: int = 0) -> Tensor:
        """As `Quantizer.step_size`."""
        rows = self._rows(weight)
        steps = self._of_rows.step_size(rows, step)
        if steps.numel() != len(rows):
            return self._back(steps, weight)
        steps = steps.reshape(len(weight), -1, 1)
        return steps.transpose(1, 2) if self.transposed else steps

    def codes(self, weight: Tensor, step: Tensor | None = None, dim: int = 0) -> Tensor:
        """As `Quantizer.codes`."""
        return self._back(self._of_rows.codes(self._rows(weight), step), weight)

    def in_step_sizes(self, weight: Tensor, step: Tensor | None = None, dim: int = 0) -> Tensor:
        """As `Quantizer.in_step_sizes`."""
        return self._back(self._of_rows.in_step_sizes(self._rows(weight), step), weight)

    def rotate(self, weight: Tensor, output_dim: int = 0) -> Tensor:
        """As `Quantizer.rotate`."""
        return self._back(self._of_rows.rotate(self._rows(weight)), weight)

    @property
    def _one_step(self) -> bool:
        return self.matrix.granularity == "tensor"

    @property
    def _of_rows(self) -> Quantizer:
        """What quantizes `_rows`."""
        return replace(self.matrix, granularity="channel") if self._one_step else self.matrix

    def _rows(self, weight: Tensor) -> Tensor:
        """One row per expert, in any order, or one per output of an expert."""
        if self._one_step:
            return weight.flatten(1)
        return (weight.transpose(1, 2) if self.transposed else weight).flatten(0, 1)

    def _back(self, rows: Tensor, like: Tensor) -> Tensor:
        if self._one_step or not self.transposed:
            return rows.reshape(like.shape)
        experts, inputs, outputs = like.shape
        return rows.reshape(experts, outputs, inputs).transpose(1, 2).contiguous()
