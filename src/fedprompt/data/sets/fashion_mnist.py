"""Fashion-MNIST: 28 x 28 grey images of ten kinds of clothing.

Xiao, Rasul and Vollgraf, arXiv 1708.07747, 2017. 60,000 training and 10,000 test images in four idx
files, plain or `.gz` as they are published.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fedprompt.core.errors import InputError
from fedprompt.data.reading.files import (
    Layout,
    check_labels,
    data_folder,
    locate,
    plain_or_gz,
    read_idx,
    signature,
)
from fedprompt.data.reading.images import ArrayImages
from fedprompt.data.reading.published import Labelled, Published, ValidationOptions, build_task
from fedprompt.data.task import Task, datasets

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
LAYOUT = Layout(
    tuple(
        f"{split}-{kind}-ubyte"
        for split in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ),
    ("FashionMNIST/raw", "data/fashion", "fashion-mnist"),
    packed=True,
)
SOURCE = "Zalando's repository (github.com/zalandoresearch/fashion-mnist)"


@dataclasses.dataclass(frozen=True)
class FashionMnistOptions(ValidationOptions):
    """Options of `fashion_mnist`."""


@datasets.register("fashion_mnist", FashionMnistOptions)
def fashion_mnist(options: FashionMnistOptions) -> Task:
    """Ten classes, 28 x 28, grey as RGB."""
    published = read_fashion_mnist(data_folder(options.root, "fashion_mnist"))
    return build_task("fashion_mnist", published, options, options.validation)


def read_fashion_mnist(root: Path, size: int | None = None) -> Published:
    """The four files; `size` resizes the images.

    Raises:
        ConfigError: the files are not there.
        InputError: a file is damaged.
    """
    folder, _ = locate("fashion_mnist", root, (LAYOUT,), SOURCE)

    def split(name: str) -> Labelled:
        images_path = plain_or_gz(folder / f"{name}-images-idx3-ubyte")
        labels_path = plain_or_gz(folder / f"{name}-labels-idx1-ubyte")
        pixels, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(pixels) != len(labels) or not len(labels):
            raise InputError(
                f"{images_path} and {labels_path.name}: expected equally many images and labels, "
                f"got {len(pixels)} and {len(labels)}; get the files again"
            )
        check_labels(labels_path, labels, len(CLASSES))
        return Labelled.of(ArrayImages(pixels, signature([images_path]), size), labels)

    return Published(CLASSES, split("train"), split("t10k"))
