"""Labelled images read by `datasets`: hub ids, and folders of parquet or image files."""

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fogzo_lab.data.config import ImagesConfig
from fogzo_lab.data.image_folders import first_line, load_splits

_LOG = logging.getLogger(__name__)

MEMORY_LIMIT = 2 * 2**30  # bytes of a decoded split; a larger one is decoded batch by batch
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels")
_TEST_SPLITS = ("test", "validation", "valid", "val")
_GREY_MODES = ("1", "L", "LA", "La")


class LazyPixels:
    """A column of encoded images that is indexed like a tensor and decoded on demand.

    Args:
        table: The split, of `datasets`.
        what: Name of the split in messages.
        mode: PIL's L or RGB.
        side: Pixels per side of the tensors.
        resize: Whether to resize images of another size, which are otherwise refused.
    """

    def __init__(self, table: Any, what: str, mode: str, side: int, resize: bool) -> None:
        self._table, self._column = _encoded(table, what)
        self._what, self._mode, self._side, self._resize = what, mode, side, resize
        self.shape = (len(table), len(mode), side, side)

    def __getitem__(self, rows: Tensor) -> Tensor:
        numbers = rows.tolist()
        values = self._table[numbers][self._column]
        return torch.stack([self._pixels(*pair) for pair in zip(numbers, values, strict=True)])

    def _pixels(self, row: int, value: Any) -> Tensor:
        image = _decode(value, self._what, row)
        if image.size != (self._side, self._side) and not self._resize:
            raise ValueError(
                f"image {row} of {self._what}{_name(value)} has {image.width}x{image.height} "
                f"pixels, and the first training image {self._side}x{self._side}: give all one "
                "size, with --data.image-size 224 for instance"
            )
        return to_tensor(image, self._mode, self._side)


Read = tuple[Tensor | LazyPixels, Tensor, Tensor | LazyPixels, Tensor, int]
"""Images and labels of train, images and labels of test, and the number of classes."""


def read_files(config: ImagesConfig) -> Read:
    """A hub data set or folder, decoded to memory if it fits.

    Raises:
        ValueError: If it cannot be found or read, or is not made of labelled images.
    """
    dataset = config.dataset
    splits = load_splits(dataset)
    if "train" in splits:  # what its columns lack, others usually lack too
        _column(splits["train"], _LABEL_COLUMNS, f"the train split of {dataset!r}")
    tests = [name for name in _TEST_SPLITS if name in splits and _has_labels(splits[name])]
    if "train" not in splits or not tests:
        raise ValueError(
            f"{dataset!r} has the splits {', '.join(splits)}, but needs train and, with labels, "
            f"one of {', '.join(_TEST_SPLITS)}: name its files or folders so, or give another "
            "--data.dataset cifar10"
        )
    names = {name: f"the {name} split of {dataset!r}" for name in ("train", tests[0])}
    labels, test_labels = (_labels(splits[name], what) for name, what in names.items())
    classes, test_classes = (_class_names(splits[name]) for name in names)
    num_classes = len(classes) or int(labels.max()) + 1
    if num_classes < 2:
        raise ValueError(
            f"{names['train']} has only one class, and two or more are needed: give "
            "another --data.dataset cifar10"
        )
    if int(test_labels.max()) >= num_classes:
        raise ValueError(
            f"{names[tests[0]]} has the label {int(test_labels.max())}, but the training split "
            f"only 0 to {num_classes - 1}: number both alike"
        )
    if classes and test_classes and test_classes != classes:
        test_labels = _renumbered(test_labels, test_classes, classes, names[tests[0]])

    encoded = {name: _encoded(splits[name], what) for name, what in names.items()}
    table, column = encoded["train"]
    first = _decode(table[0][column], names["train"], 0)
    if config.image_size is None and first.width != first.height:
        raise ValueError(
            f"the first image of {names['train']} has {first.width}x{first.height} pixels, and "
            "networks see squares: cut them out with --data.image-size "
            f"{min(first.size)} or another size"
        )
    coloured = any(_has_colour(*encoded[name], what) for name, what in names.items())
    _LOG.info("%s: %s", dataset, "read as RGB" if coloured else "all images are grey")
    mode, side = "RGB" if coloured else "L", stored_side(config, min(first.size))
    pixels, test_pixels = (
        _in_memory(LazyPixels(splits[name], what, mode, side, config.image_size is not None))
        for name, what in names.items()
    )
    return pixels, labels, test_pixels, test_labels, num_classes


def _find(table: Any, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in table.column_names), None)


def _column(table: Any, names: Sequence[str], what: str) -> str:
    found = _find(table, names)
    if found is None:
        raise ValueError(
            f"{what} has the columns {', '.join(table.column_names)}, but none called "
            f"{' or '.join(names)}: rename one with datasets' rename_column(..., '{names[0]}'), "
            "write it with to_parquet, and give the folder as --data.dataset ./path"
        )
    return found


def _has_labels(table: Any) -> bool:
    """Whether any label is known: test splits of competitions have none, or -1 everywhere."""
    column = _find(table, _LABEL_COLUMNS)
    if column is None or table.data.column(column).null_count == len(table):
        return False
    values = _values(table, column)
    return values.dtype.kind not in "iu" or bool((values != -1).any())


def _labels(table: Any, what: str) -> Tensor:
    column = _column(table, _LABEL_COLUMNS, what)
    if unknown := table.data.column(column).null_count:
        raise ValueError(
            f"{unknown} of the {len(table)} images of {what} have no {column}: leave them out, "
            f"with datasets' filter(lambda row: row[{column!r}] is not None), write the "
            "others with to_parquet, and give the folder as --data.dataset ./path"
        )
    values = _values(table, column)
    integers = values.dtype.kind in "iu" and values.ndim == 1
    if not integers or values.min() < 0:
        bad = (values[values < 0] if integers else values).tolist()[0]
        raise ValueError(
            f"{what} has the {column} {bad!r}, but labels must be integers from 0 on: number the "
            "classes, with datasets' class_encode_column for instance, write them with "
            "to_parquet, and give the folder as --data.dataset ./path"
        )
    return torch.tensor(values, dtype=torch.int64)


def _class_names(table: Any) -> list[str]:
    """What the numbers of labels mean, in their order; empty where it is not said."""
    return getattr(table.features[_find(table, _LABEL_COLUMNS)], "names", None) or []


def _renumbered(labels: Tensor, names: list[str], classes: list[str], what: str) -> Tensor:
    """Labels that count in an order of their own, in the order of the training split's classes."""
    if unknown := sorted(set(names) - set(classes)):
        raise ValueError(
            f"{what} has the class {unknown[0]!r}, but the training split only "
            f"{', '.join(classes[:10])}: name the classes of both alike"
        )
    if int(labels.max()) >= len(names):
        raise ValueError(
            f"{what} has the label {int(labels.max())}, but names only {', '.join(names[:10])}: "
            "name all of its classes"
        )
    return torch.tensor([classes.index(name) for name in names])[labels]


def _values(table: Any, column: str) -> Any:
    return table.select_columns([column]).with_format("numpy")[:][column]


def _encoded(table: Any, what: str) -> tuple[Any, str]:
    """The images of a split, as bytes or paths, and the name of their column."""
    import datasets

    column = _column(table, _IMAGE_COLUMNS, what)
    try:
        images = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # an arrow type that holds no encoded image
        raise ValueError(
            f"the {column} column of {what} holds no encoded images ({first_line(error)}): write "
            "it as a datasets.Image, and give the folder as --data.dataset ./path"
        ) from error
    return images, column


def _has_colour(table: Any, column: str, what: str) -> bool:
    """Whether any image has colours, according to its first bytes."""
    from PIL import Image

    for row, value in enumerate(example[column] for example in table):
        try:
            mode = Image.open(io.BytesIO(_content(value))).mode
        except Exception as error:  # PIL raises whatever its decoders raise
            raise _undecodable(value, what, row, error) from error
        if mode not in _GREY_MODES and mode[0] not in "IF":
            return True
    return False


def _decode(value: Any, what: str, row: int) -> Any:
    """A PIL image, rotated according to its EXIF data."""
    import datasets

    try:
        image = datasets.Image().decode_example({"bytes": _content(value), "path": None})
    except Exception as error:  # PIL raises whatever its decoders raise
        raise _undecodable(value, what, row, error) from error
    if image.mode[0] in "IF":  # 16 or 32 bits, which conversion would cut off at 255
        raise ValueError(
            f"image {row} of {what}{_name(value)} has PIL's mode {image.mode}, but pixels must "
            "have 8 bits per channel: convert all first, as with "
            'image.point(lambda level: level / 257).convert("L") from 16 bits'
        )
    return image


def _content(value: Any) -> bytes:
    """The encoded image, read whole: decoders leave a file open that they cannot decode."""
    content: bytes | None = value["bytes"]
    return Path(value["path"]).read_bytes() if content is None else content


def _undecodable(value: Any, what: str, row: int, error: Exception) -> ValueError:
    reason = first_line(error)
    return ValueError(
        f"image {row} of {what}{_name(value)} cannot be decoded ({reason}): mend or remove it"
    )


def _name(value: Any) -> str:
    """The file name of an encoded image, if it has one."""
    return f" ({value['path']})" if value and value.get("path") else ""


def to_tensor(image: Any, mode: str, side: int) -> Tensor:
    """Pixels of shape (channels, side, side): the largest centre square, scaled."""
    import numpy
    from PIL import Image, ImageOps

    if "transparency" in image.info:
        image = image.convert("RGBA")  # or PIL warns of palettes with it
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(numpy.array(image)).view(side, side, -1).permute(2, 0, 1)


def _in_memory(pixels: LazyPixels) -> Tensor | LazyPixels:
    """The pixels decoded to memory, if they fit."""
    count, channels, side, _ = pixels.shape
    if count * channels * side * side > MEMORY_LIMIT:
        return pixels
    decoded = torch.empty(pixels.shape, dtype=torch.uint8)
    for rows in torch.arange(count).split(1024):
        decoded[rows[0] : rows[-1] + 1] = pixels[rows]
    return decoded


def stored_side(config: ImagesConfig, source: int) -> int:
    """Pixels per side of images in memory, given the smaller side of an original."""
    if config.image_size is None:
        return source
    if config.augmentation.crop == "resized" and source > config.image_size:
        return round(config.image_size * 8 / 7)
    return config.image_size
