"""The quantizer: grid x scale x surrogate x rotation, a pure function from tensor to tensor."""

import logging
import math
from dataclasses import dataclass, field
from types import NoneType

import torch
from torch import Tensor

from fogzo.quantizers.checks import is_number, require_type
from fogzo.quantizers.companding import Bell
from fogzo.quantizers.fake_quantize import fake_quantize
from fogzo.quantizers.granularity import (
    Granularity,
    broadcast_step_size,
    check_granularity,
    from_rows,
    to_groups,
    to_rows,
)
from fogzo.quantizers.grids import Grid, for_inputs, unsigned
from fogzo.quantizers.rotations import Hadamard
from fogzo.quantizers.scales import Scale
from fogzo.quantizers.smoothing import to_be_drawn
from fogzo.quantizers.step_sizes import effective_step_size, smallest_step_size
from fogzo.quantizers.surrogates import Surrogate, resolve_surrogate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantizer:
    """How a weight is quantized, or the input of a layer.

    It holds no tensors: the step sizes that a scale keeps between forward passes belong to the
    layer and are passed in, as tensors of shape (groups, 1).

    Attributes:
        grid: The levels.
        scale: Where step sizes come from.
        surrogate: The backward rule, by name or as an object.
        rotation: A change of basis along the input, undone after rounding, or None.
        granularity: ``"tensor"``, ``"channel"`` (one step size per output channel) or the number
            of consecutive inputs that share one. For activations ``"token"``, which is the same
            as ``"channel"`` there: one step size for all the features at one position.
        scale_dtype: Round step sizes to this dtype in the forward pass (``torch.float16``, say), so
            that what is trained is exactly what a low-bit file can hold.
        stochastic: In training, add noise of the surrogate's smoothing law before rounding. The
            mean of the forward pass is then the smooth function whose slope the backward pass
            takes: for the identity the clipped weight itself, rounded up more often
            the nearer it is. Surrogates without a law take uniform noise as wide as the grid's
            spacing. Draws come from torch's global stream, which FOGZO's probes replay. Codes are
            those of rounding to nearest. The surrogate ``"adjacent"`` needs it, and is given
            together with it: ``replace(fogzo.fixed(2), surrogate="adjacent", stochastic=True)``.
        companding: A curve that weights pass before they are rounded, or None. Step sizes are then
            those of the output alone.
        noise: In training, round ``w + N(0, noise^2)`` in place of a weight w, and move a learned
            largest level likewise, anew in each forward pass: WinQ's noise (arXiv 2605.17471),
            0.001 there, in the weights' own units. Inputs get none, codes and step sizes that are
            measured in each forward pass are those without it, and the draws are replayed as those
            of stochastic rounding are.

    >>> from fogzo.quantizers import TERNARY, abs_mean_scale
    >>> quantizer = Quantizer(TERNARY, abs_mean_scale(), "identity_unmasked")
    >>> quantizer(torch.tensor([[0.1, -0.5], [2.0, 0.6]]))
    tensor([[ 0.0000, -0.8000],
            [ 0.8000,  0.8000]])
    """

    grid: Grid
    scale: Scale
    surrogate: Surrogate | str = "identity"
    rotation: Hadamard | None = None
    granularity: Granularity = "tensor"
    scale_dtype: torch.dtype | None = None
    stochastic: bool = False
    companding: Bell | None = None
    noise: float = 0.0
    # Here and not when they are needed, as the compiler cannot follow how grids are made.
    _input_grids: tuple[Grid, Grid] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_type("grid", self.grid, Grid, "grid=fogzo.quantizers.uniform(2)")
        require_type("scale", self.scale, Scale, "scale=fogzo.quantizers.learned_scale()")
        require_type("rotation", self.rotation, (Hadamard, NoneType), "rotation=Hadamard(128)")
        require_type("stochastic", self.stochastic, bool, "stochastic=True")
        require_type("companding", self.companding, (Bell, NoneType), "companding=Bell()")
        check_granularity(self.granularity)
        if not (is_number(self.noise) and 0 <= self.noise < math.inf):
            raise ValueError(
                f"noise must be a standard deviation, 0 or more, got {self.noise!r}: noise=0.001"
            )
        if self.companding is not None and self.grid.low >= 0:
            raise ValueError(
                f"the levels of {self.grid.name} have one side and the curve of a bell two, got "
                'companding with them: fogzo.bbq(2, levels="half"), or '
                'activations=fogzo.lsq(2, levels="unsigned")'
            )
        surrogate = resolve_surrogate(self.surrogate, self.grid)
        object.__setattr__(self, "surrogate", surrogate)
        object.__setattr__(self, "_input_grids", (for_inputs(self.grid), unsigned(self.grid)))
        if surrogate.is_of_drawn_level and not self.stochastic:
            raise ValueError(
                f"the slope {surrogate.name!r} is that of a level that was drawn, and this "
                "quantizer rounds to the nearest: dataclasses.replace(fogzo.fixed(2), "
                f"surrogate={surrogate.name!r}, stochastic=True)"
            )
        masks = surrogate.range_slack not in (None, math.inf)
        # Only inputs have unsigned levels, and no input is stuck.
        if self.stochastic and masks and self.grid.low < 0:
            logger.warning(
                "stochastic rounding with surrogate %r, which masks gradients beyond the range, "
                "keeps weights that are stuck there stuck, and gains nothing over rounding to "
                'nearest: surrogate="identity_unmasked" has no mask',
                surrogate.name,
            )
        if self.scale_dtype is None:
            return
        if not (isinstance(self.scale_dtype, torch.dtype) and self.scale_dtype.is_floating_point):
            raise ValueError(
                f"scale_dtype must be a floating-point dtype, got {self.scale_dtype!r}: "
                "for example scale_dtype=torch.float16"
            )
        self._check_step_size_fits(self.scale_dtype, "scale_dtype")

    def initial_step_size(self, weight: Tensor, output_dim: int = 0) -> Tensor | None:
        """Step sizes to keep for this weight, of shape (groups, 1); None for dynamic scales."""
        return self.find_step_size(weight, output_dim)[0]

    def find_step_size(
        self, weight: Tensor, output_dim: int = 0, fan_in: int | None = None
    ) -> tuple[Tensor | None, int]:
        """`initial_step_size`, and of how many groups it could not be measured.

        Those are zero, or so small beside the others that they are as good as zero, and get a step
        size from the layer's other groups (see `Scale.measure_once`).

        Args:
            weight: Of the layer.
            output_dim: Which dimension holds the output channels.
            fan_in: Inputs of an output, where the weight's shape does not tell.

        Raises:
            ValueError: If the weight's dtype cannot hold the step size that was given.
        """
        if not self.scale.has_state:
            return None, 0
        self.check_dtype(weight.dtype)
        groups = self._groups(weight.detach(), output_dim)
        wide = torch.promote_types(groups.dtype, torch.float32)
        fan_in = fan_in or weight.numel() // weight.shape[output_dim]
        smallest = smallest_step_size(weight.dtype, self.scale_dtype)
        step, empty = self.scale.measure_once(groups.to(wide), self.grid, fan_in, smallest)
        return step.to(weight.dtype), int(empty.sum())

    def empty_step_size(self, weight: Tensor, output_dim: int = 0) -> Tensor | None:
        """Of the shape that `initial_step_size` gives, without values: the weight has none yet."""
        if not self.scale.has_state:
            return None
        groups = self._groups(torch.empty_like(weight, device="meta"), output_dim)
        return torch.empty(len(groups), 1, dtype=weight.dtype, device=weight.device)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise a `ValueError` unless a step size that was given fits weights of this dtype."""
        self._check_step_size_fits(dtype, "a weight of")

    def _check_step_size_fits(self, dtype: torch.dtype, what: str) -> None:
        limits, value = torch.finfo(dtype), self.scale.value
        if value is not None and not limits.smallest_normal <= value <= limits.max:
            raise ValueError(
                f"a step size of {value:g} does not fit {what} {dtype}, which holds "
                f"{limits.smallest_normal:.2g} to {limits.max:.2g}: use a wider dtype, "
                "torch.bfloat16 or torch.float32, or leave step_size out to measure the weights"
            )

    def __call__(
        self,
        weight: Tensor,
        step: Tensor | None = None,
        output_dim: int = 0,
        training: bool = False,
    ) -> Tensor:
        """The quantized weight, of the weight's shape and dtype.

        Args:
            weight: The latent weight, of two dimensions or more.
            step: Step sizes of shape (groups, 1), as `initial_step_size` or `current_step_size`
                returns them. None measures the weight.
            output_dim: Which dimension holds the output channels.
            training: Whether a stochastic quantizer rounds at random or to nearest, and whether
                there is `noise`.

        Raises:
            ValueError: If the weight is no such tensor, or the step no such step sizes.
        """
        _check_weight(weight)
        _check_step(step, self._group_count(weight, output_dim))
        return self.quantize_weight(weight, step, output_dim, training)

    def quantize_weight(
        self,
        weight: Tensor,
        step: Tensor | None = None,
        output_dim: int = 0,
        training: bool = False,
    ) -> Tensor:
        """What a call returns, without its checks: for the forward pass of layers."""
        measured_on = weight  # as those are that probes hold
        if self.noise and training:
            weight, step = self._noisy(weight, step)
        return self._quantize(weight, step, output_dim, training, (self.grid,), measured_on)

    def quantize_input(
        self,
        x: Tensor,
        step: Tensor | None = None,
        feature_dim: int = -1,
        training: bool = False,
        is_unsigned: Tensor | None = None,
    ) -> Tensor:
        """The quantized input of a layer, of the input's shape and dtype.

        It may differ from what a weight of these values would become: see `grids.for_inputs`.

        Args:
            x: The input; all its features at one position are a token.
            step: Step sizes of shape (groups, 1), as `measure_input` returns them. None measures
                this input.
            feature_dim: Which dimension holds the features: those that rotate, share the step
                size of a token or group, and count in LSQ's gradient scale.
            training: Whether a stochastic quantizer rounds at random or to nearest.
            is_unsigned: A bool tensor of one element, true for the unsigned levels of as many bits
                in place of the grid's, chosen without reading the tensor.
        """
        tokens = self._features_last(x, feature_dim)
        rows = tokens.reshape(
            -1, tokens.shape[-1]
        )  # one row per token, as weights have one per output
        grids = self._input_grids if is_unsigned is not None else self._input_grids[:1]
        features = x.shape[feature_dim]
        quantized = self._quantize(rows, step, 0, training, grids, rows, features, is_unsigned)
        quantized = quantized.reshape(tokens.shape)
        return quantized if tokens is x else quantized.movedim(-1, feature_dim)

    @torch.no_grad()
    def measure_input(self, x: Tensor, feature_dim: int = -1) -> Tensor:
        """The (groups, 1) step sizes that the scale finds for an input, in float32 or finer."""
        tokens = self._features_last(x, feature_dim)
        return self._measure(self._groups(tokens.reshape(-1, tokens.shape[-1]), 0))

    def current_step_size(
        self, weight: Tensor, step: Tensor | None = None, output_dim: int = 0
    ) -> Tensor:
        """The (groups, 1) step sizes that a forward pass would use, after any rounding of them.

        They carry no history.
        """
        if step is None:
            step = self._measure(self._groups(weight.detach(), output_dim))
        # A copy, as an optimizer moves a learned step size in place.
        return effective_step_size(step.detach().to(weight.dtype), self.scale_dtype).clone()

    def step_size(self, weight: Tensor, step: Tensor | None = None, output_dim: int = 0) -> Tensor:
        """`current_step_size`, shaped to broadcast against the weight (rotated, if it is).

        Where weights are companded, what the step size is at each weight, in the weight's units.
        """
        if self.companding is not None:
            groups = self._groups(weight.detach(), output_dim)
            return self._arrange(self.companding.cell(groups, self.grid), weight, output_dim)
        step = self.current_step_size(weight, step, output_dim)
        return broadcast_step_size(step, weight.shape, self.granularity, output_dim)

    def codes(self, weight: Tensor, step: Tensor | None = None, output_dim: int = 0) -> Tensor:
        """Integer codes of the weight's shape, in the rotated basis if there is one.

        They are int8, uint8 where no code is negative, or wider where the grid has more codes.
        """
        x = self.in_step_sizes(weight, step, output_dim)
        return self.grid.round_to_code(x).to(_code_dtype(self.grid))

    @torch.no_grad()
    def in_step_sizes(
        self, weight: Tensor, step: Tensor | None = None, output_dim: int = 0
    ) -> Tensor:
        """What is rounded: the weight in step sizes, of its shape, rotated and companded."""
        groups = self._groups(weight, output_dim)
        step = self._measure(groups) if step is None else step
        step = effective_step_size(step.to(weight.dtype), self.scale_dtype)
        return self._arrange(self._in_steps(groups, step), weight, output_dim)

    def dequantize(
        self, codes: Tensor, step: Tensor, output_dim: int = 0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Exactly the weight that the forward pass used, from its codes and `current_step_size`.

        Args:
            codes: What `codes` returned.
            step: What `current_step_size` returned for the same weight.
            output_dim: As given to `codes`.
            dtype: The latent weight's dtype, by default that of ``step``.
        """
        dtype = dtype or step.dtype
        groups = self._groups(codes.to(dtype), output_dim, rotated=True)
        return self._ungroup(self.grid.level(groups) * step.to(dtype), codes, output_dim)

    def rotate(self, weight: Tensor, output_dim: int = 0) -> Tensor:
        """A weight-shaped tensor in the basis where it is rounded. Its own inverse."""
        if self.rotation is None:
            return weight
        rows = self.rotation(to_rows(weight, output_dim))
        return from_rows(rows, weight.shape, output_dim)

    def _quantize(
        self,
        tensor: Tensor,
        step: Tensor | None,
        output_dim: int,
        training: bool,
        grids: tuple[Grid, ...],
        measured_on: Tensor,
        features: int | None = None,
        second: Tensor | None = None,
    ) -> Tensor:
        groups = self._groups(tensor, output_dim)
        follows = step is None and not self.scale.detached
        if step is None:
            own = groups if measured_on is tensor else self._groups(measured_on, output_dim)
            step = self._measure(own)
        step = effective_step_size(step.to(tensor.dtype), self.scale_dtype)
        if follows:
            step = _following(step, groups)
        size = features or groups.shape[1]
        grad_scales = [self.scale.grad_scale(size, grid) for grid in grids]
        surrogate = resolve_surrogate(self.surrogate, self.grid)
        dither = self._dither(groups, surrogate) if self.stochastic and training else None
        if follows or self.companding is not None:
            # Step by step, for gradients through the step size and the curve.
            x = self._in_steps(groups, step)
            one = x.new_ones(1, 1)
            quantized = fake_quantize(x, one, grids, surrogate, dither=dither, second=second)
            quantized = quantized.to(groups.dtype) * _scale_grad(step, grad_scales[0])
        else:
            quantized = fake_quantize(groups, step, grids, surrogate, grad_scales, dither, second)
        return self._ungroup(quantized, tensor, output_dim)

    def _in_steps(self, groups: Tensor, step: Tensor) -> Tensor:
        """What is rounded."""
        if self.companding is None:
            return groups / step
        return self.companding.compress(groups, self.grid)

    def _noisy(self, weight: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight, and a learned step size whose largest level is moved as far."""
        moved = weight + self.noise * to_be_drawn(weight).normal_()
        if step is None or self.scale.kind != "learned":
            return moved, step
        largest = max(-self.grid.low, self.grid.high)
        noise = self.noise / largest * to_be_drawn(step).normal_()
        return moved, step + noise.clamp(min=-0.5 * step.detach())  # which stays positive

    def _dither(self, groups: Tensor, surrogate: Surrogate) -> Tensor:
        law = surrogate.noise(self.grid)
        # In half precision the noise itself would be too coarse for its mean to be right.
        wide = torch.promote_types(groups.dtype, torch.float32)
        return law.sample_(to_be_drawn(groups, wide)).mul_(law.radius)

    def _features_last(self, x: Tensor, feature_dim: int) -> Tensor:
        # Where all values share one step size any order will do: that of memory, which copies none
        # and keeps channels last. Draws take that of indices (see `to_be_drawn`).
        one_step = self.granularity == "tensor" and self.rotation is None
        in_order = one_step and (self.stochastic or x.is_contiguous())
        return x if in_order else x.movedim(feature_dim, -1)

    def _measure(self, groups: Tensor) -> Tensor:
        # The squares of half precision overflow in float16 and are coarse in bfloat16.
        wide = torch.promote_types(groups.dtype, torch.float32)
        return self.scale.measure(groups.detach().to(wide), self.grid)

    def _group_count(self, weight: Tensor, output_dim: int) -> int:
        if isinstance(self.granularity, int):
            return weight.numel() // self.granularity
        return 1 if self.granularity == "tensor" else weight.shape[output_dim]

    def _groups(self, weight: Tensor, output_dim: int, rotated: bool = False) -> Tensor:
        if self.granularity == "tensor" and self.rotation is None:
            return weight.reshape(1, -1)  # every order of the weights will do, so copy none
        rows = to_rows(weight, output_dim)
        if self.rotation is not None and not rotated:
            rows = self.rotation(rows)
        return to_groups(rows, self.granularity)

    def _ungroup(self, groups: Tensor, like: Tensor, output_dim: int) -> Tensor:
        if self.rotation is None:
            return self._arrange(groups, like, output_dim)
        # Contiguous, as codes that are given may not be, and their product would round differently.
        rows = self.rotation(groups.reshape(like.shape[output_dim], -1).contiguous())
        return _like_a_parameter(rows, like, output_dim)

    def _arrange(self, groups: Tensor, like: Tensor, output_dim: int) -> Tensor:
        """Groups in the weight's shape, without leaving the rotated basis."""
        if self.granularity == "tensor" and self.rotation is None:
            return groups.reshape(like.shape)
        return _like_a_parameter(groups.reshape(like.shape[output_dim], -1), like, output_dim)


def _check_weight(weight: object) -> None:
    example = "for example quantizer(torch.randn(8, 16))"
    if not isinstance(weight, Tensor):
        raise ValueError(f"a weight must be a tensor, got {type(weight).__name__}: {example}")
    if not (weight.is_floating_point() and weight.dim() > 1 and weight.numel()):
        raise ValueError(
            "a weight must be a floating-point tensor of two dimensions or more with values in "
            f"it, got {weight.dtype} of shape {tuple(weight.shape)}: {example}"
        )


def _check_step(step: object, groups: int) -> None:
    if step is None or (isinstance(step, Tensor) and step.shape in ((groups, 1), (1, 1))):
        return
    shape = f"shape {tuple(step.shape)}" if isinstance(step, Tensor) else f"{step!r:.80}"
    raise ValueError(
        f"step sizes must be a tensor of shape (groups, 1), here ({groups}, 1), got {shape}: for "
        "example quantizer(weight, quantizer.initial_step_size(weight))"
    )


def _following(step: Tensor, groups: Tensor) -> Tensor:
    """A step size in proportion to its group's rms, with the gradient of that."""
    wide = torch.promote_types(groups.dtype, torch.float32)  # or the norm is infinite in float16
    norm = torch.linalg.vector_norm(groups, dim=1, keepdim=True, dtype=wide)
    norm = norm.clamp(min=torch.finfo(wide).tiny)
    # A quotient that is 1 exactly. Where all weights share one there is one norm.
    return (step.to(wide) * (norm / norm.detach())).to(step.dtype)


def _scale_grad(step: Tensor, factor: float) -> Tensor:
    """The step size with its gradient multiplied."""
    return step if factor == 1 else step.detach() + (step - step.detach()) * factor


def _code_dtype(grid: Grid) -> torch.dtype:
    for dtype in (torch.uint8, torch.int8, torch.int16):
        limits = torch.iinfo(dtype)
        if limits.min <= grid.low_code and grid.high_code <= limits.max:
            return dtype
    return torch.int32


def _like_a_parameter(rows: Tensor, like: Tensor, output_dim: int) -> Tensor:
    # A product rounds differently on a transposed weight, and a baked weight is contiguous.
    return from_rows(rows, like.shape, output_dim).contiguous()
