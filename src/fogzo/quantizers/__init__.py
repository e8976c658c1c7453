"""Quantizers that compose: pure functions from tensor to tensor, usable without the rest."""

from fogzo.quantizers.companding import Bell
from fogzo.quantizers.granularity import Granularity
from fogzo.quantizers.grids import SIGN, TERNARY, Grid, uniform, unsigned
from fogzo.quantizers.one_hot import (
    conditional_gumbels,
    draw_levels,
    level_logits,
    one_hot_sample,
)
from fogzo.quantizers.presets import abs_max, bbq, fixed, lsq, quest, sign, ternary
from fogzo.quantizers.quantizer import Quantizer
from fogzo.quantizers.rotations import Hadamard
from fogzo.quantizers.scales import (
    Scale,
    abs_mean_scale,
    fixed_scale,
    learned_scale,
    max_scale,
    rms_scale,
)
from fogzo.quantizers.surrogates import (
    DRAWN_SURROGATE_NAMES,
    SURROGATE_NAMES,
    Surrogate,
    adjacent,
    resolve_surrogate,
)

__all__ = [
    "DRAWN_SURROGATE_NAMES",
    "SIGN",
    "SURROGATE_NAMES",
    "TERNARY",
    "Bell",
    "Granularity",
    "Grid",
    "Hadamard",
    "Quantizer",
    "Scale",
    "Surrogate",
    "abs_max",
    "abs_mean_scale",
    "adjacent",
    "bbq",
    "conditional_gumbels",
    "draw_levels",
    "fixed",
    "fixed_scale",
    "learned_scale",
    "level_logits",
    "lsq",
    "max_scale",
    "one_hot_sample",
    "quest",
    "resolve_surrogate",
    "rms_scale",
    "sign",
    "ternary",
    "uniform",
    "unsigned",
]
