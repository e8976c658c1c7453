"""Configs of the data, as frozen dataclasses: images and their augmentation, or text."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from fogzo_lab.options import (
    Example,
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PathOrName,
    PositiveInt,
    ProperShare,
    Rule,
    ShareBelowOne,
)

EMBEDDED = ("digits", "pydoc")
"""Data sets that come with what is installed."""

HUB_IDS = {
    "mnist": "ylecun/mnist",
    "cifar10": "uoft-cs/cifar10",
    "imagenet-100": "clane9/imagenet-100",
    "imagenet-1k": "ILSVRC/imagenet-1k",
}
"""Hub ids by the short names that a config may give."""

_Magnitude = Annotated[int, Rule(lambda magnitude: 0 <= magnitude < 30, "from 0 to 29")]


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig(Options):
    """Augmentation of training images, on the device; none by default."""

    PREFIX: ClassVar[str] = "data.augmentation."

    crop: Literal["none", "pad", "resized"] = "none"
    """pad: a random crop after padding by an eighth (small images); resized: a random part with 8%
    to 100% of the area, resized."""
    flip: bool = False
    """Mirror each image with probability 1/2."""
    rand_augment: Annotated[_Magnitude, Example(9)] = 0
    """Magnitude, up to 29, of RandAugment's two operations per image; 0 for none, 9 in DeiT."""
    mixup: Annotated[NonNegativeFloat, Example(0.8)] = 0.0
    """Alpha of mixup; 0 for none, 0.8 in DeiT."""
    cutmix: Annotated[NonNegativeFloat, Example(1.0)] = 0.0
    """Alpha of cutmix; 0 for none, 1 in DeiT. With mixup too, one of them is drawn per batch."""
    label_smoothing: Annotated[ShareBelowOne, Example(0.1)] = 0.0
    """Probability spread over all classes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagesConfig(Options):
    """A data set of images."""

    PREFIX: ClassVar[str] = "data."

    kind: tyro.conf.Suppress[Literal["images"]] = "images"
    dataset: PathOrName = "digits"
    """digits (scikit-learn's, embedded), a preset (mnist, cifar10, imagenet-100, imagenet-1k), a
    hub id, or a local folder: parquet files, or train/cat/1.png. Hidden files, backups, licences
    and readmes are ignored."""
    validation_fraction: ProperShare = 0.15
    """Fraction of the training images held out to choose learning rates."""
    image_size: Annotated[PositiveInt | None, Example(224)] = None
    """Pixels per side of the network's input; by default as in the data set."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Augmentation of training images."""
    max_eval_images: PositiveInt = 65_536
    """Maximum number of images of a split that are evaluated."""
    workers: NonNegativeInt = 0
    """Processes that decode images ahead of training, for data sets too large for memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig(Options):
    """A data set of text."""

    PREFIX: ClassVar[str] = "data."

    kind: tyro.conf.Suppress[Literal["text"]] = "text"
    dataset: PathOrName = "pydoc"
    """pydoc (the prose of Python's own help topics, embedded), a local text file, a folder of .txt
    files, a file or folder of parquet, arrow, csv or json, or a hub id. Hidden files, backups,
    licences and readmes are ignored."""
    subset: Annotated[str | None, Example("en")] = None
    """Configuration of a hub data set, such as en of allenai/c4."""
    column: str = "text"
    """Column of the text in a data set of `datasets`."""
    tokenizer: PathOrName = "bytes"
    """bytes (256 tokens), or a hub id or folder that transformers' AutoTokenizer reads."""
    context: PositiveInt = 128
    """Tokens per block."""
    streaming: bool = False
    """Read a hub data set while training instead of downloading it first."""
    validation_fraction: ProperShare = 0.1
    """Fraction of the text before the test part that is held out to choose learning rates; the test
    part is the last tenth, or the data set's own validation or test split."""
    max_eval_blocks: PositiveInt = 512
    """Maximum number of blocks of a split that are evaluated."""


DataConfig = ImagesConfig | TextConfig
