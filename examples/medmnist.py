"""A data set: any of MedMNIST's files of small medical images.

Yang et al., "MedMNIST v2 - A large-scale lightweight benchmark for 2D and 3D biomedical image
classification", Scientific Data, 2023. A file such as `pneumoniamnist.npz` (4 MB, from
medmnist.com) holds 28 x 28 images, grey or RGB, and labels, in the publisher's three splits.
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.reading.files import data_folder, signature
from fedprompt.data.reading.images import ArrayImages
from fedprompt.data.reading.published import DataOptions, Labelled, Published, build_task
from fedprompt.data.task import Task, datasets


@dataclasses.dataclass(frozen=True)
class MedMnistOptions(DataOptions):
    """Options of `medmnist`."""

    subset: str = "pneumoniamnist"
    """The file's name without its ending."""


@datasets.register("medmnist", MedMnistOptions)
def medmnist(options: MedMnistOptions) -> Task:
    """The classes are called by their numbers: the file does not name them.

    Raises:
        ConfigError: the file is not there.
        InputError: it is no file of MedMNIST with one label for each 2D image.
    """
    path = data_folder(options.root, "medmnist") / f"{options.subset}.npz"
    if not path.is_file():
        raise ConfigError(
            f"medmnist: no file {path}; get it from medmnist.com, and say where it is with "
            "data.root=FOLDER"
        )
    train, validation, test = (read_split(path, name) for name in ("train", "val", "test"))
    classes = tuple(str(number) for number in range(int(train.labels.max(initial=0)) + 1))
    return build_task("medmnist", Published(classes, train, test, validation), options)


def read_split(path: Path, name: str) -> Labelled:
    """One split of the file: images (N, 28, 28) or (N, 28, 28, 3) uint8, labels (N, 1)."""
    images, labels = read_array(path, f"{name}_images"), read_array(path, f"{name}_labels")
    flat = images.dtype == np.uint8 and (images.ndim == 3 or images.shape[3:] == (3,))
    if not flat or labels.shape != (len(images), 1) or labels.dtype.kind not in "iu":
        raise InputError(
            f"{path}, split {name}: expected uint8 images (N, H, W) or (N, H, W, 3) and integer "
            f"labels (N, 1), got {images.dtype} {images.shape} and {labels.dtype} {labels.shape}; "
            "choose a subset of 2D images with one label each"
        )
    word = f"{signature([path])} {name}"
    return Labelled.of(ArrayImages(images, word), labels[:, 0])


def read_array(path: Path, name: str) -> NDArray[Any]:
    """One array of an `.npz` file; pickled objects are refused."""
    try:
        with np.load(path, allow_pickle=False) as file:
            array: NDArray[Any] = file[name]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: expected a file of MedMNIST with an array '{name}', got {error}; get the "
            "file again"
        ) from error
    return array
