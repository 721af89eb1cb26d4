"""CINIC-10: CIFAR-10's classes with images of CIFAR-10 and of ImageNet, 32 x 32.

Darlow et al., arXiv 1810.03505, 2018. 90,000 images in each of three splits, `SPLIT/CLASS/*.png`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fedprompt.data.reading.files import Layout, data_folder, locate
from fedprompt.data.reading.published import (
    ImageOptions,
    Published,
    build_task,
    read_class_folders,
    without_bad_images,
)
from fedprompt.data.task import Task, datasets

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
LAYOUT = Layout(("train/", "valid/", "test/"), ("CINIC-10", "cinic-10"))
SOURCE = "the authors' repository (github.com/BayesWatch/cinic-10)"


@dataclasses.dataclass(frozen=True)
class Cinic10Options(ImageOptions):
    """Options of `cinic10`."""

    size: int = 32


@datasets.register("cinic10", Cinic10Options)
def cinic10(options: Cinic10Options) -> Task:
    """Ten classes, the publisher's three splits."""
    published = read_cinic10(data_folder(options.root, "cinic10"), options.size)
    return build_task("cinic10", without_bad_images("cinic10", published, options), options)


def read_cinic10(root: Path, size: int) -> Published:
    """The three splits.

    Raises:
        ConfigError: the folders are not there.
        InputError: a class has no image.
    """
    folder, _ = locate("cinic10", root, (LAYOUT,), SOURCE)
    train, validation, test = (
        read_class_folders(folder / split, CLASSES, size) for split in ("train", "valid", "test")
    )
    return Published(CLASSES, train, test, validation)
