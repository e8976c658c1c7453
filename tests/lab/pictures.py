"""Small data sets of random pictures, written to disk as users have them."""

import io

import datasets
import numpy
import torch
from PIL import Image


def pictures(count, size=(6, 6), mode="RGB", seed=0):
    rng = numpy.random.default_rng(seed)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=numpy.uint8)) for _ in range(count)]


def encode(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write(folder, name, images, labels, label=None, columns=("image", "label")):
    """A split as the hub lays it out: a parquet file of encoded images and labels."""
    values = [
        {"bytes": encode(i) if isinstance(i, Image.Image) else i, "path": None} for i in images
    ]
    features = datasets.Features(
        {columns[0]: datasets.Image(), columns[1]: label or datasets.Value("int64")}
    )
    table = datasets.Dataset.from_dict({columns[0]: values, columns[1]: labels}, features=features)
    table.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def write_set(path):
    """Forty training and ten test images of three classes."""
    path.mkdir()
    write(path, "train", pictures(40), [i % 3 for i in range(40)])
    write(path, "test", pictures(10, seed=1), [i % 3 for i in range(10)])
    return path


def everything(split):
    return split.batch(torch.arange(len(split)))
