"""Presets: the quantizers people name, each a composition of the parts beside this file."""

import torch

from fogzo.quantizers.companding import Bell
from fogzo.quantizers.granularity import Granularity
from fogzo.quantizers.grids import SIGN, TERNARY, Levels, uniform
from fogzo.quantizers.quantizer import Quantizer
from fogzo.quantizers.rotations import Hadamard
from fogzo.quantizers.scales import (
    Rule,
    Scale,
    abs_mean_scale,
    fixed_scale,
    learned_scale,
    max_scale,
    rms_scale,
)
from fogzo.quantizers.surrogates import Surrogate


def fixed(
    bits: int,
    *,
    step_size: float | None = None,
    init: Rule | None = None,
    levels: Levels | None = None,
    surrogate: str | Surrogate = "identity_unmasked",
    granularity: Granularity = "tensor",
    scale_dtype: torch.dtype | None = None,
) -> Quantizer:
    """A constant step size (the paper's "fixed alpha"): given, or measured once by `init`, "mse".

    Gradients pass everywhere, as nothing would bring back a weight that a mask had stopped beyond
    the range; ``surrogate="identity"`` is the paper's masked STE. Inputs of layers keep nothing
    from step to step and are masked by custom: pass ``fogzo.fixed(8, surrogate="identity")``.
    """
    scale = fixed_scale(step_size, init)
    return Quantizer(uniform(bits, levels), scale, surrogate, None, granularity, scale_dtype)


def lsq(
    bits: int,
    *,
    init: Rule = "lsq",
    levels: Levels | None = None,
    surrogate: str | Surrogate = "identity",
    granularity: Granularity = "tensor",
    scale_dtype: torch.dtype | None = None,
) -> Quantizer:
    """Learned step sizes (Esser et al., arXiv 1902.08153)."""
    scale = learned_scale(init)
    return Quantizer(uniform(bits, levels), scale, surrogate, None, granularity, scale_dtype)


def quest(
    bits: int,
    *,
    block: int = 128,
    surrogate: str | Surrogate = "trust",
    granularity: Granularity = "channel",
    scale_dtype: torch.dtype | None = None,
    detach_scale: bool = True,
) -> Quantizer:
    """Hadamard rotation, Gaussian-optimal step sizes, trust mask (QuEST, arXiv 2502.05003).

    With ``detach_scale=False`` gradients also pass through the step size, as in later code of the
    authors of BBQ.
    """
    grid = uniform(bits, "half")
    scale = rms_scale("quest", detach_scale)
    return Quantizer(grid, scale, surrogate, Hadamard(block), granularity, scale_dtype)


def bbq(
    bits: int,
    *,
    block: int = 128,
    init: Rule = "bell",
    levels: Levels | None = None,
    learned: bool = True,
    surrogate: str | Surrogate = "identity_unmasked",
    granularity: Granularity = "channel",
    scale_dtype: torch.dtype | None = None,
) -> Quantizer:
    """Bell Box Quantization: rotated, then codes of equal frequency (arXiv 2603.01599).

    Thresholds are the quantiles of a Gaussian of the weights' rms; levels are evenly spaced, with
    a step size of their own: ``learned``, or a multiple of the rms. Gradients pass through the rms.
    As published, levels are half up to 2 bits and integer above, where they lie half a step
    below the cells' middles: ``levels="half"`` is without that shift (squared error .074 against
    .119 on a unit Gaussian with 3 bits).

    The authors' vision models have no learned steps, wider levels and shorter rotations:
    ``fogzo.bbq(2, block=32, init="bell_wide", learned=False)``.

    Inference needs the Gaussian's quantiles to find the codes of inputs; weights are codes and
    step sizes as ever. For inputs: ``activations=fogzo.bbq(2, granularity="tensor")``.
    """
    scale = learned_scale(init) if learned else Scale(init, "dynamic", detached=False)
    return Quantizer(
        uniform(bits, levels),
        scale,
        surrogate,
        Hadamard(block),
        granularity,
        scale_dtype,
        companding=Bell(),
    )


def ternary(
    *,
    surrogate: str | Surrogate = "identity_unmasked",
    granularity: Granularity = "tensor",
    scale_dtype: torch.dtype | None = None,
) -> Quantizer:
    """BitNet b1.58: {-1, 0, 1} times the mean magnitude (arXiv 2402.17764)."""
    return Quantizer(TERNARY, abs_mean_scale(), surrogate, None, granularity, scale_dtype)


def sign(
    *,
    surrogate: str | Surrogate = "hardtanh",
    granularity: Granularity = "channel",
    scale_dtype: torch.dtype | None = None,
) -> Quantizer:
    """XNOR-Net weights: the sign times each output channel's mean magnitude, detached."""
    return Quantizer(SIGN, abs_mean_scale(), surrogate, None, granularity, scale_dtype)


def abs_max(
    bits: int = 8,
    *,
    surrogate: str | Surrogate = "identity_unmasked",
    granularity: Granularity = "channel",
    scale_dtype: torch.dtype | None = None,
) -> Quantizer:
    """Integer levels up to the largest magnitude: BitNet's 8-bit activations, each token's own.

    Nothing lies beyond the range, so nothing is masked; a mask at the range would drop the gradient
    of about one maximum in seven, which its own division rounds to beyond the last level.
    """
    grid = uniform(bits, "integer")
    return Quantizer(grid, max_scale(), surrogate, None, granularity, scale_dtype)
