import random
import sys
from dataclasses import replace

import numpy
import pytest
import torch
from torch.nn.functional import cross_entropy

from fogzo_lab.data.augment import Augmentation
from fogzo_lab.data.config import AugmentationConfig
from fogzo_lab.data.images import Images, ImageSplit

EVERYTHING = AugmentationConfig(crop="resized", flip=True, rand_augment=9, mixup=0.8, cutmix=1.0)


def batch(count=64, channels=3, side=32, classes=5):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        256, (count, channels, side, side), dtype=torch.uint8, generator=generator
    )
    return pixels, torch.randint(classes, (count,), generator=generator)


def build(config, channels=3, size=32, classes=5, mean=120.0, std=60.0):
    split = ImageSplit(*batch(4, channels, size, classes))
    images = Images(
        train=split,
        validation=split,
        test=split,
        num_classes=classes,
        channels=channels,
        image_size=size,
        mean=(mean,) * channels,
        std=(std,) * channels,
    )
    return Augmentation(config, images)


def in_pixels(**options):
    """An augmentation whose outputs are pixels, not standardised."""
    return build(AugmentationConfig(**options), mean=0.0, std=1.0)


def at(state):
    torch.set_rng_state(state)


@pytest.fixture(autouse=True)
def own_stream():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_without_augmentation_images_are_standardised_and_nothing_is_drawn():
    pixels, labels = batch()
    state = torch.get_rng_state()
    images, targets = build(AugmentationConfig()).train(pixels, labels)
    assert torch.equal(images, (pixels.float() - 120) / 60)
    assert targets is labels
    assert torch.equal(torch.get_rng_state(), state)


def test_channels_are_standardised_each_by_its_own():
    augmentation = build(AugmentationConfig())
    changed = replace_statistics((10.0, 20.0, 30.0), (1.0, 2.0, 4.0))
    pixels, _ = batch()
    images = changed.evaluate(pixels)
    assert torch.equal(images[:, 2], (pixels[:, 2].float() - 30) / 4)
    assert not torch.equal(images, augmentation.evaluate(pixels))


def replace_statistics(mean, std):
    split = ImageSplit(*batch(4))
    return Augmentation(AugmentationConfig(), Images(split, split, split, 5, 3, 32, mean, std))


ONE_EACH = [
    AugmentationConfig(crop="pad"),
    AugmentationConfig(crop="resized"),
    AugmentationConfig(flip=True),
    AugmentationConfig(rand_augment=9),
    AugmentationConfig(mixup=0.8),
    AugmentationConfig(cutmix=1.0),
    EVERYTHING,
]


@pytest.mark.parametrize("config", ONE_EACH)
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (1, 8)])
def test_every_augmentation_is_replayed_by_torchs_stream_alone(config, channels, side):
    pixels, labels = batch(channels=channels, side=side)
    before = pixels.clone()
    augmentation = build(config, channels, side)
    state = torch.get_rng_state()
    images, targets = augmentation.train(pixels, labels)
    assert images.shape == (64, channels, side, side)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    assert not images.requires_grad
    assert torch.equal(pixels, before)
    others = random.getstate(), numpy.random.get_state()[1].tolist()
    differs, _ = augmentation.train(pixels, labels)
    assert not torch.equal(images, differs)
    assert others == (random.getstate(), numpy.random.get_state()[1].tolist())
    at(state)
    random.random(), numpy.random.random()
    again, again_targets = build(config, channels, side).train(pixels, labels)
    assert torch.equal(images, again)
    assert torch.equal(targets, again_targets)


@pytest.mark.parametrize("config", ONE_EACH)
def test_evaluation_is_never_augmented(config):
    pixels, _ = batch()
    state = torch.get_rng_state()
    assert torch.equal(build(config).evaluate(pixels), (pixels.float() - 120) / 60)
    assert torch.equal(torch.get_rng_state(), state)


def test_flips_mirror_about_half_of_the_images_exactly():
    pixels, labels = batch(400)
    images, _ = in_pixels(flip=True).train(pixels, labels)
    same = (images == pixels).flatten(1).all(1)
    mirrored = (images == pixels.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_padded_crops_move_images_by_up_to_an_eighth():
    pixels, labels = batch(200)
    images, _ = in_pixels(crop="pad").train(pixels, labels)
    padded = torch.nn.functional.pad(pixels.float(), (4, 4, 4, 4))
    offsets = set()
    for image, source in zip(images, padded, strict=True):
        windows = source.unfold(1, 32, 1).unfold(2, 32, 1)  # channels, 9, 9, 32, 32
        hits = (windows == image[:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
        assert len(hits) == 1
        offsets.add(tuple(hits[0]))
    assert len(offsets) > 60  # of 81


def test_resized_crops_show_parts_of_the_image():
    across = torch.arange(64, dtype=torch.uint8).expand(100, 3, 64, 64)
    images, _ = in_pixels(crop="resized").train(across, torch.zeros(100, dtype=torch.int64))
    assert images.shape == (100, 3, 32, 32)
    shares = (images.amax((1, 2, 3)) - images.amin((1, 2, 3))) / 63
    assert shares.min() < 0.5 and shares.max() > 0.8
    assert images.min() >= 0 and images.max() <= 63


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_draws_two_operations_for_each_image_and_stays_in_range(channels):
    one, label = batch(1, channels)
    config = AugmentationConfig(rand_augment=15)
    augmentation = build(config, channels, mean=0.0, std=1.0)
    images, _ = augmentation.train(one.expand(300, -1, -1, -1), label.expand(300))
    assert images.min() >= -1e-3 and images.max() <= 255.001
    # Far more results than one operation alone could give, so that they do combine by image.
    assert len(images.round().flatten(1).unique(dim=0)) > 100


def test_mixup_mixes_each_image_and_label_with_its_mirror_in_the_batch():
    pixels, labels = batch()
    images, targets = in_pixels(mixup=0.8).train(pixels, labels)
    shares = []
    for i in range(64):
        a, b = pixels[i].double(), pixels[63 - i].double()
        shares.append(float(((images[i] - b) * (a - b)).sum() / (a - b).square().sum()))
    share = shares[0]
    assert shares == pytest.approx([share] * 64, abs=1e-4)
    assert 0 < share < 1
    one_hot = torch.eye(5)[labels]
    assert torch.allclose(targets, share * one_hot + (1 - share) * one_hot.flip(0), atol=1e-4)


def test_cutmix_takes_one_box_from_the_mirror_and_labels_count_its_area():
    pixels, labels = batch()
    augmentation = in_pixels(cutmix=1.0)
    sizes = set()
    for _ in range(20):
        images, targets = augmentation.train(pixels, labels)
        kept = (images == pixels).all(1).float().mean(0) == 1  # of all images
        taken = (images == pixels.flip(0)).all(1).float().mean(0) == 1
        assert (kept ^ taken).all()
        rows, columns = taken.any(1).sum(), taken.any(0).sum()
        assert rows * columns == taken.sum()  # a rectangle
        share = kept.float().mean()
        one_hot = torch.eye(5)[labels]
        assert torch.allclose(targets, share * one_hot + (1 - share) * one_hot.flip(0), atol=1e-6)
        sizes.add(int(taken.sum()))
    assert len(sizes) > 10


def test_both_take_turns_and_probabilities_sum_to_one():
    pixels, labels = batch()
    augmentation = in_pixels(mixup=0.8, cutmix=1.0)
    pasted = 0
    for _ in range(60):
        images, targets = augmentation.train(pixels, labels)
        pasted += int(torch.equal(images, images.round()))
        assert torch.allclose(targets.sum(1), torch.ones(64))
        assert targets.min() >= 0
        cross_entropy(torch.zeros(64, 5), targets, label_smoothing=0.1)
    assert 15 < pasted < 45


def test_a_batch_of_one_and_an_extreme_alpha_are_fine():
    pixels, labels = batch(1)
    for alpha in (1e-6, 1e6):
        images, targets = in_pixels(mixup=alpha).train(pixels, labels)
        assert torch.allclose(images, pixels.float(), atol=1e-3)  # mixed with itself
        assert targets.isfinite().all()


def test_without_kornia_only_what_needs_it_is_refused(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "kornia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kornia", None)
    build(AugmentationConfig(mixup=0.8, cutmix=1.0))
    for config in (AugmentationConfig(flip=True), replace(EVERYTHING, crop="none")):
        with pytest.raises(ValueError, match=r"pip install 'fogzo\[lab\]'"):
            build(config)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_from_the_same_stream():
    pixels, labels = batch()
    for config in ONE_EACH:
        state = torch.get_rng_state()
        images, targets = build(config).train(pixels, labels)
        at(state)
        others, other_targets = build(config).train(pixels.cuda(), labels.cuda())
        assert others.is_cuda
        assert torch.allclose(targets.float(), other_targets.cpu().float(), atol=1e-6)
        close = ((images - others.cpu()).abs() < 0.05).float().mean()
        assert close > 0.98  # interpolation and equalisation round elsewhere
