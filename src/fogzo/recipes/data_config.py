"""What is learned, as frozen dataclasses: images and their augmentation, or text."""

from dataclasses import dataclass, field
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """What happens to training images, on the device; nothing by default."""

    crop: Literal["none", "pad", "resized"] = "none"
    """pad: a random crop after padding by an eighth (small images); resized: a random part of 8% to
    100% of the area, resized."""
    flip: bool = False
    """Mirror every other image."""
    rand_augment: int = 0
    """Magnitude, up to 29, of RandAugment's two operations an image; 0 for none, 9 in DeiT."""
    mixup: float = 0.0
    """Alpha of mixup; 0 for none, 0.8 in DeiT."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 for none, 1 in DeiT. With mixup too, either is taken in turn by a coin."""
    label_smoothing: float = 0.0
    """Probability spread over all classes."""

    def __post_init__(self) -> None:
        if not 0 <= self.rand_augment < 30:
            raise ValueError(
                f"rand_augment must be from 0 to 29, got {self.rand_augment}: "
                "--data.augmentation.rand-augment 9"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be in [0, 1), got {self.label_smoothing}: "
                "--data.augmentation.label-smoothing 0.1"
            )
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} must be 0 or more, got {getattr(self, name)}: "
                    f"--data.augmentation.{name} 0.8"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagesConfig:
    """Which images."""

    kind: tyro.conf.Suppress[Literal["images"]] = "images"
    dataset: str = "digits"
    """digits (scikit-learn's, embedded), a preset (mnist, cifar10, imagenet-100, imagenet-1k), or
    a hub id or local folder that `datasets` reads."""
    validation_fraction: float = 0.15
    """Share of the training images held out to choose learning rates."""
    image_size: int | None = None
    """Pixels a side that the network sees; by default as the data set has them."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """What happens to training images."""
    max_eval_images: int = 65_536
    """At most so many images are evaluated of a split."""
    workers: int = 0
    """Processes that decode images ahead of training, for data sets too large for memory."""

    def __post_init__(self) -> None:
        _check_fraction(self.validation_fraction)
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(
                f"image_size must be 1 or more, got {self.image_size}: --data.image-size 224"
            )
        if self.max_eval_images < 1:
            raise ValueError(
                f"max_eval_images must be 1 or more, got {self.max_eval_images}: "
                "--data.max-eval-images 10000"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """Which text."""

    kind: tyro.conf.Suppress[Literal["text"]] = "text"
    dataset: str = "pydoc"
    """pydoc (the prose of Python's own help topics, embedded), a local text file or folder of
    .txt files, or a hub id or local folder that `datasets` reads."""
    subset: str | None = None
    """Configuration of a hub data set, such as en of allenai/c4."""
    column: str = "text"
    """Where a data set of `datasets` keeps its text."""
    tokenizer: str = "bytes"
    """bytes (256 tokens), or a hub id or folder that transformers' AutoTokenizer reads."""
    context: int = 128
    """Tokens a block."""
    streaming: bool = False
    """Read a hub data set while training instead of downloading it first."""
    validation_fraction: float = 0.1
    """Share of the text before the test part that is held out to choose learning rates; the test
    part is the last tenth, or the data set's own validation or test split."""
    max_eval_blocks: int = 512
    """At most so many blocks are evaluated of a split."""

    def __post_init__(self) -> None:
        _check_fraction(self.validation_fraction)
        for name in ("context", "max_eval_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be 1 or more, got {getattr(self, name)}: "
                    f"--data.{name.replace('_', '-')} 128"
                )


DataConfig = ImagesConfig | TextConfig


def _check_fraction(value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(
            f"validation_fraction must be in (0, 1), got {value}: --data.validation-fraction 0.15"
        )
