"""Images as uint8 tensors: embedded digits, or whatever `datasets` reads."""

import gzip
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fogzo_lab.data.config import ImagesConfig
from fogzo_lab.data.image_files import (
    MEMORY_LIMIT,
    LazyPixels,
    Read,
    read_files,
    stored_side,
    to_tensor,
)
from fogzo_lab.data.record import stamp

# The usual values for ImageNet: to measure a split that is too large for memory, all of it would
# have to be decoded once more.
_IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
_IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


class ImageSplit:
    """Images, uint8 of shape (n, channels, side, side), and their int64 labels, by index.

    Args:
        pixels: All images, in memory or decoded when asked for; processes can share either.
        labels: All labels.
        rows: Indices of the images in the split; by default all.
    """

    def __init__(
        self, pixels: Tensor | LazyPixels, labels: Tensor, rows: Tensor | None = None
    ) -> None:
        self._pixels = pixels
        self._rows = torch.arange(len(labels)) if rows is None else rows
        self._labels = labels

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images and labels at these indices.

        Raises:
            ValueError: If an image is decoded on demand and cannot be.
        """
        rows = self._rows[indices]
        return self._pixels[rows], self._labels[rows]


@dataclass(frozen=True)
class Images:
    """Train, validation (to choose with) and test (to report on), and their common properties."""

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    num_classes: int
    channels: int
    image_size: int
    """Pixels per side of the network's input; images to be cropped at random are stored larger."""
    mean: tuple[float, ...]
    """Mean of each channel of the training images, in pixel units from 0 to 255."""
    std: tuple[float, ...]


def load_images(config: ImagesConfig) -> Images:
    """Load a data set, the same split every time.

    Images of another size than the configured one are resized: their largest centre square is
    scaled. For resized crops, images larger than image_size are stored as squares of 8/7 of it
    (256 pixels for 224); crops are drawn from that square, and its centre is evaluated.

    The validation images are always part of the training split. If the test split is missing or
    has no labels, the data set's own validation split is used for testing. Images are grey if all
    images of all splits are, and otherwise RGB. Unchanged files are not read again.

    Raises:
        ValueError: If the set cannot be found or read, or is not made of labelled images.
    """
    return _load(config, stamp(config))


@lru_cache(maxsize=2)
def _load(config: ImagesConfig, stamp: object) -> Images:
    read = _digits if config.dataset == "digits" else read_files
    pixels, labels, test_pixels, test_labels, num_classes = read(config)
    held_out = round(len(labels) * config.validation_fraction)
    if not 0 < held_out < len(labels):
        raise ValueError(
            f"validation_fraction {config.validation_fraction} of {len(labels)} images leaves "
            f"{held_out} to validate with and {len(labels) - held_out} to train on, and neither "
            "may be 0: --data.validation-fraction 0.5"
        )
    # Independent of the run's seed, so that all seeds are validated and tested on the same images.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    mean, std = _statistics(pixels)
    return Images(
        train=ImageSplit(pixels, labels, order[held_out:]),
        validation=ImageSplit(pixels, labels, order[:held_out]),
        test=ImageSplit(test_pixels, test_labels, _test_order(test_labels, config)),
        num_classes=num_classes,
        channels=pixels.shape[1],
        image_size=config.image_size or pixels.shape[-1],
        mean=mean,
        std=std,
    )


def _test_order(labels: Tensor, config: ImagesConfig) -> Tensor | None:
    """None for the order of the files, unless the evaluated part would be of some classes only.

    Folders list one class after the other.
    """
    if len(labels) <= config.max_eval_images or bool((labels.diff() < 0).any()):
        return None
    return torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))


def _digits(config: ImagesConfig) -> Read:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, every fourth one for testing."""
    # From its file, as to import scikit-learn takes longer than many a training on them.
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the digits are scikit-learn's: pip install 'fogzo[lab]'")
    with gzip.open(Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz") as file:
        rows = torch.tensor([list(map(int, line.split(b","))) for line in file], dtype=torch.uint8)
    # Their levels, 0 to 16, times a power of two: that changes no bit of the standardised images,
    # and augmentations made for 0 to 255 see ink.
    x, y = 8 * rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1].long()
    side = stored_side(config, 8)
    if len(x) * side**2 > MEMORY_LIMIT:
        raise ValueError(
            f"digits of {side}x{side} pixels take {len(x) * side**2 / 2**30:.0f} GiB, more than "
            f"the {MEMORY_LIMIT / 2**30:.0f} that a data set may: --data.image-size 32"
        )
    if side != 8:
        from PIL import Image

        x = torch.stack([to_tensor(Image.fromarray(i.numpy()), "L", side) for i in x[:, 0]])
    test = torch.arange(len(y)) % 4 == 3
    return x[~test], y[~test], x[test], y[test], 10


def _statistics(pixels: Tensor | LazyPixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and unbiased standard deviation of each channel, in single precision."""
    if isinstance(pixels, LazyPixels):
        if pixels.shape[1] == 3:
            return _IMAGENET_MEAN, _IMAGENET_STD
        return (sum(_IMAGENET_MEAN) / 3,), (sum(_IMAGENET_STD) / 3,)
    means, stds, levels = [], [], torch.arange(256, dtype=torch.float64)
    for channel in pixels.unbind(1):
        # A histogram is exact, and all pixels as floats would take four times the memory.
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        mean = (counts * levels).sum() / counts.sum()
        variance = (counts * (levels - mean).square()).sum() / (counts.sum() - 1)
        means.append(float(mean.float()))
        # A constant channel is standardised to zeros instead of dividing by zero.
        stds.append(float(variance.sqrt().float()) or 1.0)
    return tuple(means), tuple(stds)
