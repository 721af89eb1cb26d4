"""MMAFEDB: small photographs of faces with seven expressions.

"MMA Facial Expression" of Mahmoudi, published on Kaggle, 2020. About 93,000 training, 17,000
validation and 17,000 test images, most of them grey, `SPLIT/EXPRESSION/*.jpg`.
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

CLASSES = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
LAYOUT = Layout(("train/", "valid/", "test/"), ("MMAFEDB",))
SOURCE = "Kaggle, data set mahmoudima/mma-facial-expression"


@dataclasses.dataclass(frozen=True)
class MmafedbOptions(ImageOptions):
    """Options of `mmafedb`."""

    size: int = 48


@datasets.register("mmafedb", MmafedbOptions)
def mmafedb(options: MmafedbOptions) -> Task:
    """Seven expressions, the publisher's three splits."""
    published = read_mmafedb(data_folder(options.root, "mmafedb"), options.size)
    return build_task("mmafedb", without_bad_images("mmafedb", published, options), options)


def read_mmafedb(root: Path, size: int) -> Published:
    """The three splits.

    Raises:
        ConfigError: the folders are not there.
        InputError: a class has no image.
    """
    folder, _ = locate("mmafedb", root, (LAYOUT,), SOURCE)
    train, validation, test = (
        read_class_folders(folder / split, CLASSES, size) for split in ("train", "valid", "test")
    )
    return Published(CLASSES, train, test, validation)
