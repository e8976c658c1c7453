"""Images from a hub id, or from a folder whose subfolders are the classes."""

import sys
from itertools import chain
from pathlib import Path
from typing import Any

from fogzo_lab.data.config import HUB_IDS
from fogzo_lab.data.files import (
    DataFiles,
    declares_its_files,
    find_data_files,
    local_path,
    meant_files,
)

_PICTURES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"}
_PICTURES |= {".ppm", ".tif", ".tiff", ".webp"}
_KINDS = {".parquet": "parquet", ".arrow": "arrow", **dict.fromkeys(_PICTURES, "imagefolder")}
# Files that label pictures, instead of their folders.
_METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}


def load_splits(dataset: str) -> Any:
    """The splits of a hub data set or folder, as `datasets` loads them.

    Raises:
        ValueError: If it cannot be found or read, or its folders are not classes.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"reading {dataset!r} needs the datasets library: pip install 'fogzo[data]', or use "
            "--data.dataset digits"
        ) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    root = local_path(dataset)
    if root is None and dataset.startswith((".", "/")):
        raise ValueError(
            f"there is no folder {dataset!r}: give one with train and test files, a hub id such "
            "as --data.dataset uoft-cs/cifar10, or --data.dataset digits"
        )
    found = _find(root) if root is not None else None
    files = [*chain(*found.splits.values())] if found is not None else []
    try:
        if found is None:
            return datasets.load_dataset(HUB_IDS.get(dataset, dataset))
        if found.kind == "imagefolder":
            return datasets.load_dataset(found.kind, data_files=found.paths)
        # Each by itself: together, all would be taken to have the first one's class names.
        return {
            name: datasets.load_dataset(found.kind, data_files={name: paths})[name]
            for name, paths in found.paths.items()
        }
    except Exception as error:  # whatever the hub, the disk or a parser has to say
        unhelpful = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = first_line((unhelpful and error.__cause__) or error)
        broken = next(filter(_is_broken, files), None)
        advice = (
            "mend or remove what cannot be read, or give another --data.dataset cifar10"
            if root is not None
            else "a hub id needs a connection the first time, and `hf auth login` if it is gated; "
            "a folder is given as --data.dataset ./path"
        )
        raise ValueError(
            f"could not load {str(broken or dataset)!r} with datasets ({reason}): {advice}"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _find(root: Path) -> DataFiles | None:
    """The files of a folder; None if `datasets` itself must find them."""
    if declares_its_files(root) or _METADATA & {file.name for file in meant_files(root)}:
        return None
    files = find_data_files(root, _KINDS)
    if files is not None and files.kind == "imagefolder":
        _check_classes(root, files.splits)
    return files


def _check_classes(root: Path, splits: dict[str, list[Path]]) -> None:
    """Raise a `ValueError` unless all images are in folders named after two classes or more.

    Otherwise `datasets` drops their labels.
    """
    depths = {len(image.parts): image for image in chain(*splits.values())}
    if len(depths) > 1:
        raise ValueError(
            f"the images of {root} lie at different depths, such as {depths[min(depths)]} and "
            f"{depths[max(depths)]}, and their folders are their classes: put all of them into "
            "train/cat/1.png, test/cat/2.png and the like"
        )
    classes = {name: {image.parent.name for image in images} for name, images in splits.items()}
    known = classes.get("train", set())
    if len(known) == 1:
        raise ValueError(
            f"the train images of {root} are all in one folder, {min(known)!r}, and their folders "
            "are their classes, of which there must be two or more: put them into "
            "train/cat/1.png, train/dog/2.png and the like"
        )
    for name, found in classes.items():
        if known and not found <= known:
            raise ValueError(
                f"the {name} images of {root} have the class {min(found - known)!r}, which no "
                "train image has: give it some, or remove that folder"
            )


def _is_broken(file: Path) -> bool:
    """Whether a file is not parquet despite its name."""
    if file.suffix.lower() != ".parquet":
        return False
    import pyarrow.parquet

    try:
        pyarrow.parquet.ParquetFile(file).close()
    except Exception:  # whatever is wrong with it
        return True
    return False
