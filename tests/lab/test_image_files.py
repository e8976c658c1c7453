import sys

import datasets
import numpy
import pytest
from pictures import encode, everything, pictures, write, write_set
from PIL import Image

from fogzo_lab.data import image_files
from fogzo_lab.data.config import ImagesConfig
from fogzo_lab.data.images import load_images


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "set")


def refused(folder, match, **options):
    with pytest.raises(ValueError, match=match):
        load_images(ImagesConfig(dataset=str(folder), **options))


def test_a_set_that_cannot_be_loaded_says_what_to_do(tmp_path, monkeypatch):
    refused(tmp_path / "nowhere", "there is no folder .*--data.dataset uoft-cs/cifar10")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "could not load .*empty.*--data.dataset cifar10")
    (tmp_path / "empty" / "train.parquet").write_text("these are no images")
    refused(
        tmp_path / "empty", r"could not load '.*train\.parquet' .*Parquet magic bytes not found"
    )

    asked = []

    def offline(path):
        asked.append(path)
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    refused("imagenet-1k", r"could not load 'imagenet-1k' .*on the Hub\).*hf auth login")
    refused("owner/name", "connection the first time")
    assert asked == ["ILSVRC/imagenet-1k", "owner/name"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("mnist", r"pip install 'fogzo\[data\]'")


def test_missing_splits_and_columns_are_named(folder):
    test = folder / "test-00000-of-00001.parquet"
    write(folder, "test", pictures(4), [-1] * 4)
    refused(folder, "has the splits train, test, but needs train and, with labels, one of")
    test.unlink()
    refused(folder, "has the splits train, but needs")
    write(folder, "test", pictures(4), [0, 1] * 2)
    for name in ("train", "test"):
        write(folder, name, pictures(4), [0, 1] * 2, columns=("photo", "label"))
    refused(folder, r"columns photo, label, but none called image or img: rename")


def test_labels_must_be_numbers_of_two_classes_or_more(folder):
    def train_on(labels, kind="int64"):
        write(folder, "train", pictures(len(labels)), labels, label=datasets.Value(kind))

    train_on(["cat", "dog"], "string")
    refused(folder, "the train split of .* has the label 'cat', but labels must be integers")
    train_on([0.5, 1.0], "float32")
    refused(folder, "has the label 0.5")
    train_on([0, -2, 1])
    refused(folder, "has the label -2")
    train_on([0, None, 1])
    refused(folder, "1 of the 3 images of the train split .* have no label: leave them out")
    train_on([0, 0, 0])
    refused(folder, "only one class")
    train_on([0, 1] * 3)
    refused(folder, "the test split of .* has the label 2, but the training split only 0 to 1")
    train_on([])
    refused(folder, "could not load .*no data")


def test_images_must_be_of_one_size_unless_one_is_given(folder):
    write(folder, "test", pictures(2), [0, 1])
    write(folder, "train", [*pictures(3), *pictures(1, (7, 6))], [0, 1] * 2)
    refused(folder, r"image 3 of the train split .* 7x6 pixels.*6x6.*--data.image-size 224")
    load_images(ImagesConfig(dataset=str(folder), image_size=5))
    write(folder, "train", pictures(4, (7, 6)), [0, 1] * 2)
    refused(folder, "7x6 pixels, and networks see squares.*--data.image-size 6")


def test_images_that_cannot_be_decoded_are_named(folder, monkeypatch):
    jpeg = encode(pictures(1, (64, 64))[0], "JPEG")
    for corrupt in (jpeg[: len(jpeg) // 2], b"not an image"):
        write(folder, "test", [*pictures(3), corrupt], [0, 1] * 2)
        refused(folder, "image 3 of the test split of .* cannot be decoded")
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "MEMORY_LIMIT", 10)
        data = load_images(ImagesConfig(dataset=str(folder)))
        with pytest.raises(ValueError, match="image 3 of the test split"):
            everything(data.test)
    deep = Image.fromarray(numpy.full((6, 6), 40_000, dtype=numpy.uint16))
    write(folder, "train", [deep] * 4, [0, 1] * 2)
    refused(folder, "PIL's mode I;16, but pixels must have 8 bits")
    numbers = datasets.Dataset.from_dict({"image": [1, 2, 3, 4], "label": [0, 1, 0, 1]})
    for name in ("train", "test"):
        numbers.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    refused(folder, "the image column of the train split of .* holds no encoded images")


def test_neither_part_of_the_training_images_may_be_empty(folder):
    refused(folder, "leaves 0 to validate with and 40", validation_fraction=0.01)
    refused(folder, "leaves 40 to validate with and 0", validation_fraction=0.99)
