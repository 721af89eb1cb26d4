"""scikit-learn's handwritten digits: 1,797 real images that come with an installed library.

The UCI "Optical Recognition of Handwritten Digits" test set (Alpaydin and Kaynak, 1998), 8 x 8
pixels in 17 grey levels, enlarged to 32 x 32 RGB. One visual domain, so it shows that a federation
runs and learns, not that one way of merging prompts beats another.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedprompt.core.checks import check_integer, check_number
from fedprompt.core.errors import ConfigError
from fedprompt.core.seeding import numpy_generator
from fedprompt.data.stratified import stratified_parts
from fedprompt.data.task import Origin, Split, Task, datasets

IMAGE_SIZE = 32


@dataclasses.dataclass(frozen=True)
class DigitsOptions:
    """How the images are divided.

    Args:
        seed: of the division; the images themselves are always the same.
        validation: share of each class that goes to the validation split; 0 for no such split.
        test: share of each class that goes to the test split.
        train: share of each class that goes to the training split; None means all that is left.
    """

    seed: int = 0
    validation: float = 0.15
    test: float = 0.2
    train: float | None = None

    def __post_init__(self) -> None:
        check_integer("data.seed", self.seed, 0)
        check_number("data.validation", self.validation, 0, below=1)
        check_number("data.test", self.test, 0, above=True, below=1)
        if self.train is not None:
            check_number("data.train", self.train, 0, above=True, below=1)
            if self.train + self.validation + self.test > 1 + 1e-9:  # sums of shares are rounded
                raise ConfigError(
                    "data.train + data.validation + data.test: expected at most 1, got "
                    f"{self.train} + {self.validation} + {self.test}; set data.train=null for all "
                    "images that the others leave"
                )
        if self.validation + self.test > 0.9:
            raise ConfigError(
                "data.validation + data.test: expected at most 0.9, or no training images remain, "
                f"got {self.validation} + {self.test}"
            )


@lru_cache(maxsize=1)
def source_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All digits in the order of scikit-learn: grey images (1797, 8, 8) uint8 in 0..255, labels
    (1797,).
    """
    from sklearn.datasets import load_digits  # takes a while, and only this needs it

    bunch = load_digits()
    images = np.rint(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)
    labels = np.asarray(bunch.target).astype(np.int64)
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


def enlarge(images: NDArray[np.uint8], size: int = IMAGE_SIZE) -> NDArray[np.uint8]:
    """Grey images (N, h, w) uint8 -> (N, size, size) uint8, bicubic."""
    resized = [
        np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
        for image in images
    ]
    return np.stack(resized) if resized else np.zeros((0, size, size), np.uint8)


@datasets.register("digits", DigitsOptions)
def digits(options: DigitsOptions) -> Task:
    """Ten classes in one group called `digits`, divided per class by the seed; there is no public
    split.
    """
    grey, labels = source_digits()
    shares = [options.test, options.validation]
    if options.train is not None:  # what is left is then no one's
        shares.append(options.train)
    test, validation, train, *_ = stratified_parts(
        labels, tuple(shares), numpy_generator(options.seed, "data/digits/split")
    )

    def split(index: NDArray[np.int64]) -> Split:
        images = np.repeat(enlarge(grey[index])[..., None], 3, axis=3)
        everything = np.broadcast_to(grey[..., None], (*grey.shape, 3))
        groups = np.zeros(len(index), np.int64)
        return Split(images, labels[index], groups, origin=Origin(index, everything))

    return Task(
        name="digits",
        class_names=tuple(str(digit) for digit in range(10)),
        group_names=("digits",),
        train=split(train),
        validation=split(validation),
        test=split(test),
    )
