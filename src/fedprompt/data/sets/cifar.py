"""CIFAR-10 and CIFAR-100: 32 x 32 colour images of 10 or 100 classes.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. 50,000 training and
10,000 test images. Read from the binary version (mapped, not loaded) or from the Python version,
which is a pickle and is read without running what is in it; an archive of either is unpacked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedprompt.core.errors import InputError
from fedprompt.data.reading.files import (
    Layout,
    check_labels,
    data_folder,
    locate,
    read_lines,
    signature,
)
from fedprompt.data.reading.images import ArrayImages, Indices, JoinedImages, Pixels
from fedprompt.data.reading.published import Labelled, Published, ValidationOptions, build_task
from fedprompt.data.reading.unpickling import as_texts, read_pickle
from fedprompt.data.task import Task, datasets

PIXELS = 3 * 32 * 32
SOURCE = "the CIFAR page of Alex Krizhevsky (www.cs.toronto.edu/~kriz/cifar.html)"


@dataclasses.dataclass(frozen=True)
class Version:
    """What differs between CIFAR-10 and CIFAR-100, in the binary and in the Python version."""

    num_classes: int
    train: tuple[str, ...]
    """Files of the training images; `.bin` is added in the binary version."""
    test: str
    names: tuple[str, str]
    """Files of the class names: binary, Python."""
    names_key: str
    """Of the class names in the Python version."""
    labels_key: str
    label_byte: int
    """Which of the bytes before the pixels of a record."""
    label_bytes: int

    def layouts(self, number: int) -> tuple[Layout, Layout]:
        """Binary and Python version of CIFAR-`number`."""
        binary, pickled = (
            (f"cifar-{number}-batches-bin", f"cifar-{number}-batches-py")
            if number == 10
            else (f"cifar-{number}-binary", f"cifar-{number}-python")
        )
        return (
            Layout(
                (*(f"{file}.bin" for file in (*self.train, self.test)), self.names[0]),
                (binary,),
                (f"cifar-{number}-binary.tar.gz",),
            ),
            Layout(
                (*self.train, self.test, self.names[1]),
                (pickled,),
                (f"cifar-{number}-python.tar.gz",),
            ),
        )


CIFAR10 = Version(
    num_classes=10,
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    names=("batches.meta.txt", "batches.meta"),
    names_key="label_names",
    labels_key="labels",
    label_byte=0,
    label_bytes=1,
)
FINE = Version(
    num_classes=100,
    train=("train",),
    test="test",
    names=("fine_label_names.txt", "meta"),
    names_key="fine_label_names",
    labels_key="fine_labels",
    label_byte=1,
    label_bytes=2,
)
COARSE = dataclasses.replace(
    FINE,
    num_classes=20,
    names=("coarse_label_names.txt", "meta"),
    names_key="coarse_label_names",
    labels_key="coarse_labels",
    label_byte=0,
)


@dataclasses.dataclass(frozen=True)
class Cifar10Options(ValidationOptions):
    """Options of `cifar10`."""


@dataclasses.dataclass(frozen=True)
class Cifar100Options(ValidationOptions):
    """Options of `cifar100`."""

    coarse: bool = False
    """Take the 20 superclasses for classes."""


@datasets.register("cifar10", Cifar10Options)
def cifar10(options: Cifar10Options) -> Task:
    """Ten classes, 32 x 32."""
    published = read_cifar("cifar10", data_folder(options.root, "cifar10"), CIFAR10)
    return build_task("cifar10", published, options, options.validation)


@datasets.register("cifar100", Cifar100Options)
def cifar100(options: Cifar100Options) -> Task:
    """A hundred classes, or the twenty superclasses; 32 x 32."""
    version = COARSE if options.coarse else FINE
    published = read_cifar("cifar100", data_folder(options.root, "cifar100"), version)
    return build_task("cifar100", published, options, options.validation)


def read_cifar(name: str, root: Path, version: Version) -> Published:
    """Either version of CIFAR-10 or CIFAR-100.

    Args:
        name: of the data set.
        root: folder of the files.
        version: what its files and classes are called.

    Raises:
        ConfigError: the files are not there.
        InputError: a file is damaged.
    """
    binary, pickled = version.layouts(10 if version is CIFAR10 else 100)
    folder, layout = locate(name, root, (binary, pickled), SOURCE)
    if layout is binary:
        names = tuple(line for _, line in read_lines(folder / version.names[0]))
        batches = [_read_binary(folder / f"{file}.bin", version) for file in version.train]
        test = _read_binary(folder / f"{version.test}.bin", version)
    else:
        names = as_texts(read_pickle(folder / version.names[1]).get(version.names_key, ()))
        batches = [_read_pickled(folder / file, version) for file in version.train]
        test = _read_pickled(folder / version.test, version)
    if len(names) != version.num_classes:
        raise InputError(
            f"{name}: expected {version.num_classes} class names in {folder}, got {len(names)}; "
            "get the files again"
        )
    counts = [len(batch) for batch in batches]
    if len(set(counts)) > 1:
        raise InputError(
            f"{name}: expected equally many images in {', '.join(version.train)} of {folder}, got "
            f"{', '.join(map(str, counts))}; get the files again"
        )
    return Published(names, _joined(batches), test)


def _joined(batches: Sequence[Labelled]) -> Labelled:
    if len(batches) == 1:
        return batches[0]
    images = JoinedImages([batch.images for batch in batches])
    return Labelled.of(images, np.concatenate([batch.labels for batch in batches]))


def _read_binary(path: Path, version: Version) -> Labelled:
    """Records of one or two label bytes and 3,072 bytes: all red, then green, then blue."""
    record = version.label_bytes + PIXELS
    size = path.stat().st_size
    if size == 0 or size % record:
        raise InputError(
            f"{path}: expected records of {record} bytes, got {size} bytes, which is not a "
            "multiple; get the file again"
        )
    records = np.asarray(np.memmap(path, np.uint8, mode="r")).reshape(-1, record)
    return _labelled(
        path, records[:, version.label_bytes :], records[:, version.label_byte], version
    )


def _read_pickled(path: Path, version: Version) -> Labelled:
    """A dictionary with `data` (N, 3072) and a list of labels."""
    content = read_pickle(path)
    data, labels = content.get("data"), content.get(version.labels_key)
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != PIXELS:
        raise InputError(
            f"{path}: expected 'data' of shape (N, {PIXELS}), "
            f"got {getattr(data, 'shape', type(data).__name__)}; get the file again"
        )
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise InputError(
            f"{path}: expected a list of integers in '{version.labels_key}'; get the file again"
        )
    if len(labels) != len(data) or not labels:
        raise InputError(
            f"{path}: expected one label for each image, got {len(labels)} labels and {len(data)} "
            "images; get the file again"
        )
    return _labelled(path, data, np.array(labels), version)


def _labelled(path: Path, pixels: Pixels, labels: Indices | Pixels, version: Version) -> Labelled:
    check_labels(path, labels, version.num_classes)
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Labelled.of(ArrayImages(images, signature([path])), labels)
