"""Images as tensors: embedded digits, or whatever `datasets` reads."""

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fogzo.recipes.config import DataConfig


@dataclass(frozen=True)
class Split:
    """Flattened images, standardised, of shape (count, pixels), and their labels."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """Train, validation (to choose with) and test (to report on)."""

    train: Split
    validation: Split
    test: Split
    num_classes: int


@lru_cache(maxsize=2)
def load_images(config: DataConfig) -> ImageData:
    """Load a data set, the same split every time.

    Raises:
        ValueError: If it cannot be found or read, or lacks the columns image and label.
    """
    if config.dataset == "digits":
        images, labels, test_images, test_labels = _digits()
    else:
        images, labels, test_images, test_labels = _from_datasets(config.dataset)
    mean, std = images.mean(), images.std()
    images, test_images = ((x - mean) / std for x in (images, test_images))
    # Fixed whatever the run's seed is, so that every seed is chosen and judged on the same images.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out = round(len(labels) * config.validation_fraction)
    validation, train = order[:held_out], order[held_out:]
    return ImageData(
        train=Split(images[train], labels[train]),
        validation=Split(images[validation], labels[validation]),
        test=Split(test_images, test_labels),
        num_classes=int(labels.max()) + 1,
    )


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, every fourth one for testing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    test = torch.arange(len(y)) % 4 == 3
    return x[~test], y[~test], x[test], y[test]


def _from_datasets(dataset: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"reading {dataset!r} needs the datasets library: pip install 'fogzo[data]'"
        ) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if dataset.startswith((".", "/", "~")) and not Path(dataset).expanduser().is_dir():
        raise ValueError(
            f"there is no folder {dataset!r}: give one with train and test files, a hub id such "
            "as --data.dataset mnist, or --data.dataset digits"
        )
    try:
        splits = datasets.load_dataset(str(Path(dataset).expanduser()))
    except Exception as error:  # whatever the hub, the disk or a parser has to say
        raise ValueError(f"could not load {dataset!r} with datasets: {error}") from error
    missing = {"train", "test"} - set(splits)
    if missing:
        raise ValueError(
            f"{dataset!r} has the splits {', '.join(splits)} but not {', '.join(sorted(missing))}"
        )
    return *_as_tensors(dataset, splits["train"]), *_as_tensors(dataset, splits["test"])


def _as_tensors(dataset: str, split: Any) -> tuple[Tensor, Tensor]:
    import datasets
    import numpy

    missing = {"image", "label"} - set(split.column_names)
    if missing:
        raise ValueError(
            f"{dataset!r} has the columns {', '.join(split.column_names)} but not "
            f"{', '.join(sorted(missing))}: rename them with datasets' rename_column"
        )
    split = split.cast_column("image", datasets.Image())
    images = numpy.stack([numpy.asarray(image, dtype=numpy.uint8) for image in split["image"]])
    pixels = torch.from_numpy(images).flatten(1).float()
    return pixels, torch.tensor(split["label"])
