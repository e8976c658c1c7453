"""What is trained, as frozen dataclasses: networks, and how their layers are quantized."""

import typing
from dataclasses import dataclass, replace
from typing import Any, Literal

import tyro

from fogzo import quantizers
from fogzo.quantizers import Quantizer


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizerConfig:
    """How weights, or a layer's inputs, are quantized."""

    preset: Literal["none", "fixed", "lsq", "quest", "ternary", "sign", "abs_max"] = "none"
    """none stays in float."""
    bits: int | None = None
    """Bits of fixed, lsq, quest (by default 2) and abs_max (8)."""
    surrogate: str | None = None
    """Backward rule; by default the preset's own."""
    granularity: Literal["tensor", "channel", "token"] | int | None = None
    """What shares a step size: tensor, channel (of weights), token (of inputs) or a group size; by
    default the preset's own."""
    init: Literal["mse", "rms", "abs_mean", "lsq", "max"] | None = None
    """How fixed and lsq find their first step size; by default the preset's own."""
    stochastic: bool = False
    """In training, round up or down at random, the nearer level the more often."""

    def build(self) -> Quantizer | None:
        """The quantizer, or None for float.

        Raises:
            ValueError: If the options do not go together.
        """
        if self.preset == "none":
            return None
        options: dict[str, Any] = {
            "surrogate": self.surrogate,
            "granularity": self.granularity,
            "init": self.init,
            "bits": self.bits,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if self.preset in ("ternary", "sign"):
            if self.bits is not None:
                raise ValueError(
                    f"{self.preset} has levels of its own and takes no bits, got {self.bits}: "
                    "leave --quantizer.bits out, or use --quantizer.preset lsq"
                )
        elif self.preset != "abs_max":
            given.setdefault("bits", 2)
        if self.init is not None and self.preset not in ("fixed", "lsq"):
            raise ValueError(
                f"{self.preset} measures its step size at every forward and takes no init: leave "
                "--quantizer.init out, or use --quantizer.preset fixed"
            )
        quantizer = typing.cast(Quantizer, getattr(quantizers, self.preset)(**given))
        return replace(quantizer, stochastic=self.stochastic)


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpConfig:
    """A multilayer perceptron with ReLU."""

    family: tyro.conf.Suppress[Literal["mlp"]] = "mlp"
    hidden: tuple[int, ...] = (32,)
    """Widths of the hidden layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNetConfig:
    """A residual network of transformers."""

    family: tyro.conf.Suppress[Literal["resnet"]] = "resnet"
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Output channels of the stages."""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of the stages."""
    bottleneck: bool = False
    """Blocks of three convolutions (ResNet-50) instead of two (ResNet-18)."""
    small_images: bool = False
    """Begin with a 3x3 convolution of stride 1 and no pooling, as is usual for 32x32 pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeitConfig:
    """A vision transformer as DeiT trains it, without the distillation token."""

    family: tyro.conf.Suppress[Literal["deit"]] = "deit"
    width: int = 192
    """Size of a token's vector."""
    depth: int = 12
    """Blocks."""
    heads: int = 3
    """Attention heads."""
    patch_size: int = 16
    """Pixels a side of a patch."""
    dropout: float = 0.0
    """Probability of dropping a hidden unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """A LLaMA-2 decoder with untied embeddings."""

    family: tyro.conf.Suppress[Literal["llama"]] = "llama"
    width: int = 128
    """Size of a token's vector; the SwiGLU layer is 8/3 as wide, rounded up to 256."""
    depth: int = 4
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    vocab_size: int | None = None
    """Rows of the embedding; by default the tokenizer's number of tokens."""


ModelConfig = MlpConfig | ResNetConfig | DeitConfig | LlamaConfig
