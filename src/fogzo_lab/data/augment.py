"""Standardisation and augmentation of a batch of images, on the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn.functional import one_hot

from fogzo_lab.data.config import AugmentationConfig
from fogzo_lab.data.images import Images


class Augmentation:
    """Standardises images, and changes training images and their labels at random.

    Everything random is drawn from torch's global CPU generator, whatever the device, so that
    restoring its state replays a batch.

    Args:
        config: The augmentations of training images.
        images: The data set.

    Raises:
        ValueError: If the augmentations need kornia and it is not installed.
    """

    def __init__(self, config: AugmentationConfig, images: Images) -> None:
        self._mixup, self._cutmix = config.mixup, config.cutmix
        self._num_classes, self._size = images.num_classes, images.image_size
        self._mean, self._std = (
            torch.tensor(values).view(-1, 1, 1) for values in (images.mean, images.std)
        )
        self._steps = _steps(config, images)

    @torch.no_grad()
    def train(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Augmented, standardised images and their targets.

        Returns:
            Images of shape (n, channels, size, size), and labels: unchanged, or of shape (n,
            classes), probabilities, with mixup or cutmix.
        """
        pixels = images.float()
        for step in self._steps:
            pixels = step(pixels)
        pixels = self._standardise(pixels)
        if self._mixup or self._cutmix:
            return self._mix(pixels, one_hot(labels, self._num_classes).float())
        return pixels, labels

    @torch.no_grad()
    def evaluate(self, images: Tensor) -> Tensor:
        """The standardised centre of images."""
        begin = (images.shape[-1] - self._size) // 2
        inside = slice(begin, begin + self._size)
        return self._standardise(images[..., inside, inside].float())

    def _standardise(self, pixels: Tensor) -> Tensor:
        self._mean, self._std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return (pixels - self._mean) / self._std

    def _mix(self, pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix every image with its mirror in the batch, which is in random order already."""
        cutmix = self._cutmix > 0 and (not self._mixup or bool(torch.rand(()) < 0.5))
        alpha = torch.tensor(self._cutmix if cutmix else self._mixup, dtype=torch.float64)
        share = float(Beta(alpha, alpha).sample())
        if cutmix:
            height, width = pixels.shape[-2:]
            top, bottom = _interval(height, 1 - share)
            left, right = _interval(width, 1 - share)
            share = 1 - (bottom - top) * (right - left) / (height * width)  # less if cut off
            mixed = pixels.clone()
            mixed[..., top:bottom, left:right] = pixels.flip(0)[..., top:bottom, left:right]
        else:
            mixed = share * pixels + (1 - share) * pixels.flip(0)
        return mixed, share * targets + (1 - share) * targets.flip(0)


def _interval(length: int, area: float) -> tuple[int, int]:
    """Start and end of a side of a square with this fraction of the area, cut off at the edges."""
    side, centre = int(length * area**0.5), int(torch.randint(length, ()))
    return max(centre - side // 2, 0), min(centre + (side + 1) // 2, length)


class _RandAugment:
    """RandAugment with two operations per image, on pixels from 0 to 255.

    kornia draws two operations for a whole batch. Here each of its operations is applied to the
    images that drew it, so that a batch is as varied as one augmented image by image.
    """

    def __init__(self, magnitude: int, channels: int) -> None:
        from kornia.augmentation.auto import RandAugment
        from kornia.augmentation.auto.rand_augment.rand_augment import default_policy

        self._operations = [
            RandAugment(n=1, m=magnitude, policy=[operation])
            for operation in default_policy
            if channels == 3 or operation[0][0] != "color"  # grey has no saturation
        ]

    def __call__(self, pixels: Tensor) -> Tensor:
        pixels = pixels / 255
        # Without replacement: the first two of a random order.
        drawn = torch.rand(len(pixels), len(self._operations)).argsort(1)[:, :2]
        for choice in drawn.unbind(1):
            for number, operation in enumerate(self._operations):
                rows = (choice == number).nonzero().flatten().to(pixels.device)
                if len(rows):
                    pixels[rows] = operation(pixels[rows])
        return pixels * 255


def _steps(config: AugmentationConfig, images: Images) -> list[Callable[[Tensor], Tensor]]:
    if config.crop == "none" and not config.flip and not config.rand_augment:
        return []
    try:
        from kornia import augmentation as kornia
    except ImportError as error:
        raise ValueError(
            "crops, flips and RandAugment need kornia: pip install 'fogzo[lab]', or leave "
            "--data.augmentation.crop, .flip and .rand-augment out"
        ) from error
    size = (images.image_size, images.image_size)
    steps: list[Any] = []
    if config.crop == "pad":
        steps.append(kornia.RandomCrop(size, padding=max(1, images.image_size // 8)))
    if config.crop == "resized":
        steps.append(kornia.RandomResizedCrop(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)))
    if config.flip:
        steps.append(kornia.RandomHorizontalFlip())
    if config.rand_augment:
        steps.append(_RandAugment(config.rand_augment, images.channels))
    return steps
