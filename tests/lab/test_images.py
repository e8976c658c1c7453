import pickle
import random
from dataclasses import replace
from pathlib import Path

import datasets
import numpy
import pyarrow.parquet as parquet
import pytest
import torch
from pictures import encode, everything, pictures, write, write_set
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from fogzo_lab.data import image_files
from fogzo_lab.data import images as module
from fogzo_lab.data.augment import Augmentation
from fogzo_lab.data.config import AugmentationConfig, ImagesConfig
from fogzo_lab.data.images import load_images

DATA = Path(__file__).parents[2] / "data"
CROPS = AugmentationConfig(crop="resized")


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    module._load.cache_clear()


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "set")


def test_digits_are_split_once_and_for_all_and_standardised_to_the_same_bits_as_ever():
    config = ImagesConfig()
    data = load_images(config)
    assert (len(data.train), len(data.validation), len(data.test)) == (1146, 202, 449)
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, 8)

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    test = torch.arange(len(y)) % 4 == 3
    train, mean, std = x[~test], x[~test].mean(), x[~test].std()
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    expected = {
        "train": ((train - mean) / std)[order[202:]],
        "validation": ((train - mean) / std)[order[:202]],
        "test": (x[test] - mean) / std,
    }
    augmentation = Augmentation(config.augmentation, data)
    for name, values in expected.items():
        pixels, found = everything(getattr(data, name))
        assert pixels.dtype == torch.uint8
        assert found.dtype == torch.int64
        inputs, targets = augmentation.train(pixels, found)
        assert torch.equal(inputs.flatten(1), values)
        assert torch.equal(augmentation.evaluate(pixels).flatten(1), values)
        assert targets is found
    assert torch.equal(everything(data.test)[1], y[test])


def test_digits_can_be_enlarged():
    data = load_images(ImagesConfig(image_size=16))
    assert everything(data.test)[0].shape == (449, 1, 16, 16)


def test_nothing_random_is_drawn_or_reseeded(folder):
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    load_images(ImagesConfig(dataset=str(folder)))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == states[1:]


def test_parquet_files_give_the_very_pixels(folder):
    data = load_images(ImagesConfig(dataset=str(folder)))
    assert (len(data.train), len(data.validation), len(data.test)) == (34, 6, 10)
    assert (data.num_classes, data.channels, data.image_size) == (3, 3, 6)
    pixels, labels = everything(data.test)
    expected = numpy.stack([numpy.asarray(image) for image in pictures(10, seed=1)])
    assert torch.equal(pixels, torch.from_numpy(expected).permute(0, 3, 1, 2))
    assert labels.tolist() == [i % 3 for i in range(10)]
    train = numpy.stack([numpy.asarray(image) for image in pictures(40)]).reshape(-1, 3)
    assert numpy.allclose(data.mean, train.mean(0))
    assert numpy.allclose(data.std, train.std(0, ddof=1))


def test_train_and_validation_share_no_image_and_miss_none(folder):
    data = load_images(ImagesConfig(dataset=str(folder)))
    seen = torch.cat([everything(data.train)[0], everything(data.validation)[0]])
    assert len(seen.flatten(1).unique(dim=0)) == 40


def test_columns_may_be_called_as_in_cifar(folder):
    for name in ("train", "test"):
        write(folder, name, pictures(8), [0, 1] * 4, columns=("img", "labels"))
    assert load_images(ImagesConfig(dataset=str(folder))).num_classes == 2


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_folder_of_image_files_has_a_class_for_each_folder(tmp_path, kind, mode):
    for split, count in (("train", 6), ("validation", 2)):
        for name in ("bird", "cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i, image in enumerate(pictures(count, mode=mode, seed=len(name))):
                image.save(tmp_path / "set" / split / name / f"{i}.{kind}")
    data = load_images(ImagesConfig(dataset=str(tmp_path / "set")))
    assert (data.num_classes, data.channels) == (3, len(mode))
    assert everything(data.test)[0].shape == (6, len(mode), 6, 6)
    assert everything(data.test)[1].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_part_of_a_test_split_in_the_order_of_its_classes_is_of_all_classes(folder):
    for name in ("train", "test"):
        write(folder, name, pictures(30), sorted([0, 1, 2] * 10))
    config = ImagesConfig(dataset=str(folder))
    whole = everything(load_images(config).test)[1]
    assert whole.tolist() == sorted([0, 1, 2] * 10)
    part = everything(load_images(replace(config, max_eval_images=12)).test)[1]
    assert len(part) == 30 and part[:12].bincount().min() >= 2
    write(folder, "test", pictures(30), [0, 1, 2] * 10)
    module._load.cache_clear()
    mixed = everything(load_images(replace(config, max_eval_images=12)).test)[1]
    assert mixed.tolist() == [0, 1, 2] * 10


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_images_have_one_channel(folder, mode):
    for name in ("train", "test"):
        write(folder, name, [i.convert(mode) for i in pictures(8, mode="L")], [0, 1] * 4)
    data = load_images(ImagesConfig(dataset=str(folder)))
    assert data.channels == len(data.mean) == 1
    assert everything(data.test)[0].max() > 200


def transparent(image):
    image = image.convert("P")
    image.info["transparency"] = bytes(range(200))  # of each colour of the palette
    return image


ODD = {
    "L": lambda image: image.convert("L"),
    "LA": lambda image: image.convert("LA"),
    "1": lambda image: image.convert("1"),
    "P": lambda image: image.convert("P"),
    "transparent P": transparent,
    "RGBA": lambda image: image.convert("RGBA"),
    "CMYK": lambda image: image.convert("CMYK"),
}


@pytest.mark.parametrize("first", ["odd", "coloured"])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("memory", [0, 2**30])
def test_one_image_with_colour_makes_a_set_rgb_whichever_it_is(
    folder, odd, first, memory, monkeypatch
):
    monkeypatch.setattr(image_files, "MEMORY_LIMIT", memory)
    images = [encode(ODD[odd](i), "TIFF" if odd == "CMYK" else "PNG") for i in pictures(7)]
    coloured = pictures(1, seed=5)
    mixed = [*coloured, *images] if first == "coloured" else [*images, *coloured]
    for name in ("train", "test"):
        write(folder, name, mixed, [0, 1] * 4)
    data = load_images(ImagesConfig(dataset=str(folder)))
    assert data.channels == len(data.mean) == 3
    pixels, _ = everything(data.test)
    shown = pixels[0 if first == "coloured" else 7]
    assert torch.equal(shown.permute(1, 2, 0), torch.from_numpy(numpy.array(coloured[0])))
    grey = [ODD[odd](i).convert("RGB") for i in pictures(7)] if odd in ("L", "LA", "1") else []
    for tensor, image in zip(pixels[1:] if first == "coloured" else pixels, grey, strict=False):
        assert torch.equal(tensor.permute(1, 2, 0), torch.from_numpy(numpy.array(image)))


@pytest.mark.parametrize("coloured", ["train", "test"])
def test_colour_in_either_split_is_kept_and_the_log_says_so(folder, coloured, caplog):
    for name in ("train", "test"):
        last = pictures(1) if name == coloured else pictures(1, mode="L")
        write(folder, name, [*pictures(7, mode="L"), *last], [0, 1] * 4)
    with caplog.at_level("INFO"):
        assert load_images(ImagesConfig(dataset=str(folder))).channels == 3
    assert "read as RGB" in caplog.text


def test_a_channel_that_never_changes_becomes_zeros(folder):
    for name in ("train", "test"):
        write(folder, name, [Image.new("RGB", (4, 4), (9 * i, 7, 0)) for i in range(8)], [0, 1] * 4)
    config = ImagesConfig(dataset=str(folder))
    data = load_images(config)
    inputs = Augmentation(config.augmentation, data).evaluate(everything(data.test)[0])
    assert inputs.isfinite().all()
    assert inputs[:, 1:].abs().max() == 0 != inputs[:, 0].std()


def test_images_are_resized_and_cut_to_their_centre_square(folder):
    wide = Image.new("RGB", (20, 8), "blue")
    wide.paste("red", (6, 0, 14, 8))  # the centre square
    tall = Image.new("RGB", (4, 12), "blue")
    tall.paste("red", (0, 4, 4, 8))
    for name in ("train", "test"):
        write(folder, name, [wide, tall] * 4, [0, 1] * 4)
    data = load_images(ImagesConfig(dataset=str(folder), image_size=4))
    pixels, _ = everything(data.test)
    assert pixels.shape == (8, 3, 4, 4)
    red, green, blue = pixels.transpose(0, 1).flatten(1).float().mean(1)
    assert red > 245 and green == 0 and blue < 10  # interpolation looks past the edge


@pytest.mark.parametrize(("source", "stored"), [(14, 8), (7, 7), (5, 7)])
def test_resized_crops_have_room_in_larger_images_only(folder, source, stored):
    for name in ("train", "test"):
        write(folder, name, pictures(8, (source, source)), [0, 1] * 4)
    config = ImagesConfig(dataset=str(folder), image_size=7, augmentation=CROPS)
    data = load_images(config)
    pixels, labels = everything(data.train)
    assert pixels.shape[-2:] == (stored, stored)
    assert data.image_size == 7
    augmentation = Augmentation(config.augmentation, data)
    assert augmentation.evaluate(pixels).shape[-2:] == (7, 7)
    assert augmentation.train(pixels, labels)[0].shape[-2:] == (7, 7)


@pytest.mark.parametrize("unlabelled", [[-1] * 10, [None] * 10])
def test_a_test_split_without_labels_gives_way_to_validation(folder, unlabelled):
    write(folder, "test", pictures(10), unlabelled)
    write(folder, "validation", pictures(7), [0] * 7)
    data = load_images(ImagesConfig(dataset=str(folder)))
    assert (len(data.train), len(data.test)) == (34, 7)


def test_class_names_count_even_where_no_image_shows_them(folder):
    names = datasets.ClassLabel(names=["bird", "cat", "dog", "emu"])
    for name in ("train", "test"):
        write(folder, name, pictures(6), [0, 1] * 3, label=names)
    assert load_images(ImagesConfig(dataset=str(folder))).num_classes == 4


@pytest.mark.parametrize(
    ("names", "labels"), [(["dog", "cat", "bird"], [2, 1, 0]), (["cat", "dog"], [1, 2])]
)
def test_class_names_say_what_the_numbers_of_the_test_split_mean(folder, names, labels):
    def named(names):
        return datasets.ClassLabel(names=names)

    write(folder, "train", pictures(6), [0, 1, 2] * 2, label=named(["bird", "cat", "dog"]))
    write(folder, "test", pictures(len(names)), list(range(len(names))), label=named(names))
    data = load_images(ImagesConfig(dataset=str(folder)))
    assert data.test.batch(torch.arange(len(names)))[1].tolist() == labels
    write(folder, "test", pictures(2), [0, 1], label=named(["cat", "emu"]))
    with pytest.raises(ValueError, match="has the class 'emu', but the training split only bird"):
        load_images(ImagesConfig(dataset=str(folder)))


def test_a_label_that_has_no_name_is_refused(folder):
    names = datasets.ClassLabel(names=["bird", "cat", "dog"])
    for name in ("train", "test"):
        write(folder, name, pictures(6), [0, 1, 2] * 2, label=names)
    path = folder / "test-00000-of-00001.parquet"
    table = parquet.read_table(path)
    meaning = table.schema.metadata[b"huggingface"].replace(b', "dog"', b"")
    parquet.write_table(table.replace_schema_metadata({b"huggingface": meaning}), path)
    with pytest.raises(ValueError, match="has the label 2, but names only bird, cat:"):
        load_images(ImagesConfig(dataset=str(folder)))


@pytest.fixture
def lazy(folder, monkeypatch):
    """The folder's images, decoded when asked for."""
    monkeypatch.setattr(image_files, "MEMORY_LIMIT", 100)
    return load_images(ImagesConfig(dataset=str(folder)))


def test_what_does_not_fit_into_memory_is_decoded_lazily_to_the_same_images(folder, lazy):
    module._load.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files, "MEMORY_LIMIT", 2**20)
        eager = load_images(ImagesConfig(dataset=str(folder)))
    for name in ("train", "validation", "test"):
        a, b = getattr(lazy, name), getattr(eager, name)
        indices = torch.randperm(len(a), generator=torch.Generator().manual_seed(1))[:5]
        for x, y in zip(a.batch(indices), b.batch(indices), strict=True):
            assert torch.equal(x, y)
    assert [round(m / 255, 3) for m in lazy.mean] == [0.485, 0.456, 0.406]
    assert lazy.mean != eager.mean


class ByBatch:
    def __init__(self, split):
        self.split = split

    def __getitem__(self, indices):
        return self.split.batch(indices)


def test_worker_processes_decode_the_same_images(lazy):
    expected = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(*everything(lazy.train), strict=True)
    }
    order = torch.randperm(len(lazy.train), generator=torch.Generator().manual_seed(0)).split(8)
    loader = DataLoader(ByBatch(lazy.train), batch_size=None, sampler=order, num_workers=2)
    for images, labels in loader:
        assert [expected[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_a_lazy_split_can_be_sent_to_a_fresh_process(lazy):
    again = pickle.loads(pickle.dumps(lazy.train))
    assert torch.equal(everything(again)[0], everything(lazy.train)[0])


def test_a_lazy_grey_set_is_standardised_too(folder, monkeypatch):
    monkeypatch.setattr(image_files, "MEMORY_LIMIT", 10)
    for name in ("train", "test"):
        write(folder, name, pictures(8, mode="L"), [0, 1] * 4)
    data = load_images(ImagesConfig(dataset=str(folder)))
    assert len(data.mean) == len(data.std) == 1
    assert 0 < data.std[0] < 255


@pytest.mark.parametrize(("name", "channels", "size"), [("cifar10", 3, 32), ("mnist", 1, 28)])
def test_real_data_load_as_the_hub_has_them(name, channels, size, monkeypatch):
    if not (DATA / name).is_dir():
        pytest.skip(f"data/{name} is not here")
    monkeypatch.setattr(image_files, "MEMORY_LIMIT", 2**20)  # decoding them all takes a while
    data = load_images(ImagesConfig(dataset=str(DATA / name)))
    assert (data.num_classes, data.channels, data.image_size) == (10, channels, size)
    assert len(data.train) + len(data.validation) == {"cifar10": 50_000, "mnist": 60_000}[name]
    assert len(data.test) == 10_000
    images, labels = data.train.batch(torch.arange(500))
    assert images.shape == (500, channels, size, size)
    assert set(labels.tolist()) == set(range(10))
    assert images.float().mean() == pytest.approx({"cifar10": 121, "mnist": 33.3}[name], rel=0.05)
