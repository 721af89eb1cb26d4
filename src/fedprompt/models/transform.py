"""From stored images to the pixels that a backbone sees: resize, centre crop, normalise."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.models.options import ModelOptions

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Transform:
    """What is done to every image, the same in training and evaluation.

    The paper's is `Transform(224, 256, IMAGENET_MEAN, IMAGENET_STD)`.
    """

    image_size: int
    """Side of the square that the network sees."""
    resize: int | None = None
    """The shorter side before the centre crop; None means `image_size`."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.shorter_side < self.image_size:
            raise ConfigError(
                f"model.resize: expected at least model.image_size ({self.image_size}), which is "
                f"cut out of the resized image, got {self.resize}"
            )

    @property
    def shorter_side(self) -> int:
        """The shorter side after resizing."""
        return self.image_size if self.resize is None else self.resize

    def with_options(self, options: ModelOptions) -> Transform:
        """This transform with what a config sets in its place.

        A new `image_size` without a `resize` keeps the proportion between the two.
        """
        size = options.image_size or self.image_size
        resize = options.resize
        if resize is None and self.resize is not None:
            resize = round(self.resize * size / self.image_size)
        return Transform(
            size,
            resize,
            _triple(options.mean) or self.mean,
            _triple(options.std) or self.std,
            options.interpolation or self.interpolation,
        )

    def __call__(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Resize, crop and normalise.

        Args:
            images: (B, H, W, 3) uint8.
            mean: `mean` as a tensor (1, 3, 1, 1) on the images' device.
            std: `std` in the same way.

        Returns:
            (B, 3, S, S) of the dtype of `mean`, S = `image_size`.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise InputError(
                f"images: expected (B, H, W, 3) uint8, "
                f"got {tuple(images.shape)} {images.dtype}; convert them to RGB"
            )
        pixels = images.permute(0, 3, 1, 2).to(mean.dtype) / 255
        if min(pixels.shape[-2:]) != self.shorter_side:
            mode = InterpolationMode(self.interpolation)
            pixels = transforms.resize(pixels, [self.shorter_side], mode, antialias=True)
            if self.interpolation == "bicubic":
                pixels = pixels.clamp(0, 1)  # cubic weights overshoot at edges
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            pixels = transforms.center_crop(pixels, [self.image_size, self.image_size])
        normalised: Tensor = (pixels - mean) / std
        return normalised


def _triple(values: list[float] | None) -> tuple[float, float, float] | None:
    return None if values is None else (values[0], values[1], values[2])
