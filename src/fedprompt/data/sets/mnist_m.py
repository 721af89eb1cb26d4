"""MNIST-M: MNIST's digits blended into pieces of photographs, in colour.

Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016. Two published layouts:
the authors' 59,001 and 9,001 PNG files of 32 x 32 pixels with label lists, and the tensor files
`mnist_m_train.pt` and `mnist_m_test.pt` (60,000 and 10,000 images of 28 x 28 pixels).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fedprompt.core.errors import InputError
from fedprompt.data.reading.files import (
    Layout,
    check_labels,
    check_same_names,
    data_folder,
    locate,
    read_list,
    signature,
)
from fedprompt.data.reading.images import ArrayImages, ImageFiles
from fedprompt.data.reading.published import (
    ImageOptions,
    Labelled,
    Published,
    ValidationOptions,
    build_task,
    without_bad_images,
)
from fedprompt.data.task import Task, datasets

CLASSES = tuple("0123456789")
FILES = Layout(
    ("mnist_m_train_labels.txt", "mnist_m_train/", "mnist_m_test_labels.txt", "mnist_m_test/"),
    ("mnist_m",),
    ("mnist_m.tar.gz",),
)
TENSORS = Layout(("mnist_m_train.pt", "mnist_m_test.pt"), ("processed", "MNISTM/processed"))
SOURCE = "the page of Yaroslav Ganin (yaroslav.ganin.net)"


@dataclasses.dataclass(frozen=True)
class MnistMOptions(ImageOptions, ValidationOptions):
    """Options of `mnist_m`."""

    size: int = 32


@datasets.register("mnist_m", MnistMOptions)
def mnist_m(options: MnistMOptions) -> Task:
    """Ten digits in colour."""
    published = read_mnist_m(data_folder(options.root, "mnist_m"), options.size)
    published = without_bad_images("mnist_m", published, options)
    return build_task("mnist_m", published, options, options.validation)


def read_mnist_m(root: Path, size: int) -> Published:
    """Either published layout.

    Raises:
        ConfigError: the files are not there.
        InputError: a list and its folder do not belong together, or a file is damaged.
    """
    folder, layout = locate("mnist_m", root, (FILES, TENSORS), SOURCE)
    read = _read_files if layout is FILES else _read_tensors
    return Published(CLASSES, read(folder, "train", size), read(folder, "test", size))


def _read_files(folder: Path, split: str, size: int) -> Labelled:
    path = folder / f"mnist_m_{split}_labels.txt"
    names, labels = read_list(path)
    check_labels(path, labels, len(CLASSES))
    images = folder / f"mnist_m_{split}"
    check_same_names(path, names, images)
    return Labelled.of(ImageFiles(images, names, size), labels)


def _read_tensors(folder: Path, split: str, size: int) -> Labelled:
    import torch

    path = folder / f"mnist_m_{split}.pt"
    try:
        images, labels = torch.load(path, map_location="cpu", weights_only=True)
        pixels, classes = images.numpy(), labels.numpy()
        if pixels.dtype != "uint8" or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"images of shape {pixels.shape} {pixels.dtype}")
        if classes.dtype != "int64" or classes.shape != pixels.shape[:1] or not len(classes):
            raise ValueError(f"labels of shape {classes.shape} for {len(pixels)} images")
    except Exception as error:  # a damaged file can raise anything
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(
            f"{path}: expected a pair of tensors, (N, H, W, 3) bytes and (N,) labels, got "
            f"something else ({lines[0]}); get the file again"
        ) from error
    check_labels(path, classes, len(CLASSES))
    return Labelled.of(ArrayImages(pixels, signature([path]), size), classes)
