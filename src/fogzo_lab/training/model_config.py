"""Configs of networks and of the quantization of their layers, as frozen dataclasses."""

import math
import typing
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro

from fogzo import quantizers
from fogzo.quantizers import Quantizer
from fogzo.quantizers.surrogates import DRAWN_SURROGATE_NAMES, SURROGATE_NAMES
from fogzo_lab.options import (
    Example,
    NonNegativeFloat,
    OneOf,
    Options,
    PositiveInt,
    Rule,
    ShareBelowOne,
    at_least_one,
)

_Bits = Annotated[int, Rule(lambda bits: 1 <= bits <= 8, "from 1 to 8")]
_OF_FEW = {"detach_scale": ("quest",), "learned": ("bbq",), "block": ("quest", "bbq")}
_Preset = Literal["none", "fixed", "lsq", "quest", "bbq", "ternary", "sign", "abs_max"]
_Surrogate = Annotated[str, OneOf((*SURROGATE_NAMES, *DRAWN_SURROGATE_NAMES))]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizerConfig(Options):
    """How weights, or the inputs of layers, are quantized."""

    PREFIX: ClassVar[str] = "quantizer."

    preset: _Preset = "none"
    """none keeps floating point; another than the recipe's begins from its own defaults, but for
    the bits."""
    bits: Annotated[_Bits | None, Example(2)] = None
    """Bits of fixed, lsq, quest, bbq (by default 2) and abs_max (8)."""
    surrogate: Annotated[_Surrogate | None, Example("identity")] = None
    """Backward rule; by default the preset's own. adjacent needs stochastic."""
    granularity: Annotated[
        Literal["tensor", "channel", "token"] | PositiveInt | None, Example("channel")
    ] = None
    """Values that share a step size: tensor, channel (of weights), token (of inputs) or a group
    size; by default the preset's own."""
    init: Annotated[
        Literal["mse", "rms", "abs_mean", "lsq", "max", "range", "bell", "bell_wide"] | None,
        Example("mse"),
    ] = None
    """How fixed, lsq and bbq find their first step size; by default the preset's own."""
    levels: Annotated[Literal["half", "integer", "unsigned"] | None, Example("integer")] = None
    """Levels of fixed, lsq and bbq: half (±1/2, ±3/2, ...), integer or, for inputs that cannot be
    negative, unsigned; by default half up to 2 bits, integer above."""
    scale_dtype: Annotated[Literal["float16", "bfloat16"] | None, Example("float16")] = None
    """Round step sizes to this dtype in training, as the file to be exported holds them."""
    detach_scale: bool | None = None
    """Whether quest's gradient stops at its step size, by default true."""
    learned: bool | None = None
    """Whether bbq learns its step sizes (the default) or takes a multiple of the present rms."""
    block: Annotated[
        Annotated[int, Rule(lambda size: size > 0 and not size & (size - 1), "a power of 2")]
        | None,
        Example(128),
    ] = None
    """Inputs that quest and bbq rotate together, by default 128."""
    noise: NonNegativeFloat = 0.0
    """Standard deviation of the noise on weights in training, as in WinQ; 0.001 there."""
    stochastic: bool = False
    """In training, round up or down at random, more often to the nearer level."""

    def check_together(self, prefix: str) -> None:
        """Raise a `ValueError` if the preset does not take an option that is given."""
        if self.preset == "none":
            self._check_nothing_given(prefix)
        if self.surrogate in DRAWN_SURROGATE_NAMES and not self.stochastic:
            raise ValueError(
                f"the slope {self.surrogate} is that of a level that was drawn: "
                f"--{prefix}stochastic, or --{prefix}surrogate identity_unmasked"
            )
        if self.preset in ("ternary", "sign") and self.bits is not None:
            raise ValueError(
                f"{self.preset} has levels of its own and takes no bits, got {self.bits}: "
                f"--{prefix}bits None, or --{prefix}preset lsq"
            )
        if self.preset not in ("fixed", "lsq", "bbq") and self.init is not None:
            raise ValueError(
                f"{self.preset} measures its step size in every forward pass and takes no init, "
                f"got {self.init}: --{prefix}init None, or --{prefix}preset fixed"
            )
        for name, owners in _OF_FEW.items():
            if getattr(self, name) is not None and self.preset not in owners:
                option = f"{prefix}{name.replace('_', '-')}"
                raise ValueError(
                    f"{self.preset} has no {name.replace('_', ' ')} to choose, which "
                    f"{' and '.join(owners)} have: --{option} None, or --{prefix}preset {owners[0]}"
                )
        if self.preset not in ("fixed", "lsq", "bbq") and self.levels is not None:
            raise ValueError(
                f"{self.preset} has levels of its own and takes none, got {self.levels}: "
                f"--{prefix}levels None, or --{prefix}preset lsq"
            )

    def _check_nothing_given(self, prefix: str) -> None:
        """Raise a `ValueError` if an option says how to quantize what stays in float."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                owner = "abs_max" if value == "token" else _OF_FEW.get(field.name, ("fixed",))[0]
                option = f"--{prefix}{field.name.replace('_', '-')}"
                raise ValueError(
                    f"{field.name} says nothing without a preset: --{prefix}preset {owner} "
                    f"{option}" + ("" if field.type is bool else f" {value}")
                )

    def for_preset(self, preset: str) -> "QuantizerConfig":
        """The preset's own options, with as many bits where it takes any."""
        if preset == self.preset or preset not in typing.get_args(_Preset):
            return self  # the parser refuses what is no preset
        bits = None if preset in ("none", "ternary", "sign") else self.bits
        return QuantizerConfig(preset=typing.cast(_Preset, preset), bits=bits)

    def build(self) -> Quantizer | None:
        """The quantizer, or None for float."""
        if self.preset == "none":
            return None
        drawn = self.surrogate if self.surrogate in DRAWN_SURROGATE_NAMES else None
        options: dict[str, Any] = {
            "surrogate": None if drawn else self.surrogate,
            "granularity": self.granularity,
            "init": self.init,
            "bits": self.bits,
            "levels": self.levels,
            "detach_scale": self.detach_scale,
            "learned": self.learned,
            "block": self.block,
            "scale_dtype": self.scale_dtype and getattr(torch, self.scale_dtype),
        }
        given = {name: value for name, value in options.items() if value is not None}
        if self.preset in ("fixed", "lsq", "quest", "bbq"):
            given.setdefault("bits", 2)
        quantizer = typing.cast(Quantizer, getattr(quantizers, self.preset)(**given))
        surrogate = drawn or quantizer.surrogate
        return replace(quantizer, surrogate=surrogate, stochastic=self.stochastic, noise=self.noise)

    def build_for_inputs(self) -> Quantizer | None:
        """The quantizer of the inputs of layers.

        There one step that is kept serves all tokens, and `fixed` masks what it clips.
        """
        kept = self.preset == "bbq" and self.granularity is None and self.learned is not False
        masks = self.preset == "fixed" and self.surrogate is None
        own = replace(self, granularity="tensor") if kept else self
        return (replace(own, surrogate="identity") if masks else own).build()


def check_quantizers(weights: QuantizerConfig, activations: QuantizerConfig) -> None:
    """Raise a `ValueError` unless weights and inputs can be quantized together in this way."""
    if activations.preset != "none" and weights.preset == "none":
        raise ValueError(
            "activations are quantized only where weights are: add --quantizer.preset lsq, or "
            "--activations.preset none"
        )
    if activations.preset == "bbq" and activations.levels == "unsigned":
        raise ValueError(
            "bbq's levels are two-sided, as a bell is: --activations.levels None, or "
            "--activations.preset lsq"
        )
    if weights.levels == "unsigned":
        raise ValueError(
            "weights have both signs and unsigned levels only one: --quantizer.levels integer"
        )
    if weights.granularity == "token":
        raise ValueError(
            "weights have no tokens, but channels: --quantizer.granularity channel, or tensor"
        )
    if activations.noise and activations.preset != "none":
        raise ValueError("only weights get noise, not inputs: --activations.noise 0")
    kept = activations.preset in ("fixed", "lsq")
    kept |= activations.preset == "bbq" and activations.learned is not False
    if kept and activations.granularity not in (None, "tensor"):
        raise ValueError(
            f"{activations.preset} keeps the step sizes of activations, whose tokens vary in "
            f"number, got {activations.granularity}: --activations.granularity tensor, or "
            "--activations.preset abs_max"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpConfig(Options):
    """A multilayer perceptron with ReLU."""

    PREFIX: ClassVar[str] = "model."

    family: tyro.conf.Suppress[Literal["mlp"]] = "mlp"
    hidden: tuple[PositiveInt, ...] = (32,)
    """Widths of the hidden layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNetConfig(Options):
    """A residual network, as in transformers."""

    PREFIX: ClassVar[str] = "model."

    family: tyro.conf.Suppress[Literal["resnet"]] = "resnet"
    widths: Annotated[tuple[PositiveInt, ...], at_least_one("stage")] = (64, 128, 256, 512)
    """Output channels of the stages."""
    depths: Annotated[tuple[PositiveInt, ...], at_least_one("stage")] = (2, 2, 2, 2)
    """Blocks of the stages."""
    bottleneck: bool = False
    """Blocks of three convolutions (ResNet-50) instead of two (ResNet-18)."""
    small_images: bool = False
    """Begin with a 3x3 convolution of stride 1 and no pooling, as is usual for 32x32 pixels."""

    def check_together(self, prefix: str) -> None:
        """Raise a `ValueError` if these are not the sizes of one network."""
        if len(self.widths) != len(self.depths):
            raise ValueError(
                f"a ResNet needs as many widths as depths, got {len(self.widths)} and "
                f"{len(self.depths)}: --{prefix}widths 64 128 --{prefix}depths 2 2"
            )
        if self.bottleneck and min(self.widths) < 4:
            raise ValueError(
                "a bottleneck has a quarter of its stage's channels inside, and the widths "
                f"{self.widths} leave none: --{prefix}widths 4 8, or --{prefix}no-bottleneck"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DeitConfig(Options):
    """A vision transformer as DeiT trains it, without the distillation token."""

    PREFIX: ClassVar[str] = "model."

    family: tyro.conf.Suppress[Literal["deit"]] = "deit"
    width: PositiveInt = 192
    """Size of a token's vector."""
    depth: PositiveInt = 12
    """Blocks."""
    heads: PositiveInt = 3
    """Attention heads."""
    patch_size: PositiveInt = 16
    """Pixels per side of a patch."""
    dropout: ShareBelowOne = 0.0
    """Probability of dropping a hidden unit."""

    def check_together(self, prefix: str) -> None:
        """Raise a `ValueError` if the heads cannot share a token's vector."""
        _check_heads(self.width, self.heads, 1, prefix)


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig(Options):
    """A LLaMA-2 decoder with untied embeddings."""

    PREFIX: ClassVar[str] = "model."

    family: tyro.conf.Suppress[Literal["llama"]] = "llama"
    width: PositiveInt = 128
    """Size of a token's vector; the SwiGLU layer is 8/3 as wide, rounded up to 256."""
    depth: PositiveInt = 4
    """Blocks."""
    heads: PositiveInt = 4
    """Attention heads."""
    vocab_size: Annotated[PositiveInt | None, Example(256)] = None
    """Rows of the embedding; by default the tokenizer's number of tokens."""

    def check_together(self, prefix: str) -> None:
        """Raise a `ValueError` if the heads cannot share a token's vector."""
        _check_heads(self.width, self.heads, 2, prefix)  # rotary embeddings turn pairs


ModelConfig = MlpConfig | ResNetConfig | DeitConfig | LlamaConfig


def _check_heads(width: int, heads: int, multiple: int, prefix: str) -> None:
    """Raise a `ValueError` unless every head gets the same multiple of channels."""
    if width % (heads * multiple):
        pairs = " in pairs" if multiple == 2 else ""
        fitting = math.gcd(width, heads * multiple) // multiple
        wider = heads * multiple * max(1, width // (heads * multiple))
        other = f"--{prefix}heads {fitting}, or " if width % multiple == 0 else ""
        raise ValueError(
            f"{heads} heads cannot share a width of {width}{pairs}: {other}--{prefix}width {wider}"
        )
