"""ImageNet-LT: a long-tailed part of ImageNet, 1,280 down to 5 training images a class.

Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019. 115,846 training,
20,000 validation and 50,000 test images in three list files; the images are ImageNet's own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath

import numpy as np

from fedprompt.core.errors import InputError
from fedprompt.data.reading.files import Layout, check_labels, data_folder, locate, read_list
from fedprompt.data.reading.images import ImageFiles
from fedprompt.data.reading.published import (
    ImageOptions,
    Labelled,
    Published,
    build_task,
    without_bad_images,
)
from fedprompt.data.task import Task, datasets

LAYOUT = Layout(
    tuple(f"ImageNet_LT_{split}.txt" for split in ("train", "val", "test")), ("ImageNet_LT",)
)
SOURCE = (
    "the authors' repository (github.com/zhmiao/OpenLongTailRecognition-OLTR), and the images from "
    "image-net.org"
)


@dataclasses.dataclass(frozen=True)
class ImageNetLtOptions(ImageOptions):
    """Options of `imagenet_lt`."""

    images: str | None = None
    """Folder that the lists' paths (train/n01440764/...) are relative to; null means theirs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is not None:
            object.__setattr__(self, "images", str(Path(self.images).expanduser().absolute()))


@datasets.register("imagenet_lt", ImageNetLtOptions)
def imagenet_lt(options: ImageNetLtOptions) -> Task:
    """The classes of the training list, named by the folder of their images."""
    root = data_folder(options.root, "imagenet_lt")
    folder, layout = locate("imagenet_lt", root, (LAYOUT,), SOURCE)
    images = folder if options.images is None else Path(options.images)
    paths = [folder / file for file in layout.files]
    names, labels = read_list(paths[0])
    class_names = _class_names(paths[0], names, labels.tolist())

    def split(path: Path) -> Labelled:
        listed, classes = read_list(path)
        check_labels(path, classes, len(class_names))
        return Labelled.of(ImageFiles(images, listed, options.size).all_there(), classes)

    train, validation, test = (split(path) for path in paths)
    published = Published(class_names, train, test, validation)
    return build_task("imagenet_lt", without_bad_images("imagenet_lt", published, options), options)


def _class_names(path: Path, names: list[str], labels: list[int]) -> tuple[str, ...]:
    """The folder of each class's images; a class has one.

    Raises:
        InputError: a number below the largest has no image, or its images lie in two folders.
    """
    folders: dict[int, str] = {}
    for name, label in zip(names, labels, strict=True):
        own = PurePosixPath(name).parent.name
        if folders.setdefault(label, own) != own:
            raise InputError(
                f"{path}: expected the images of class {label} in one folder, got {folders[label]} "
                f"and {own}; get the file again"
            )
    absent = np.setdiff1d(np.arange(max(folders) + 1), list(folders))
    if len(absent):
        raise InputError(
            f"{path}: expected images of every class from 0 to {max(folders)}, got none of class "
            f"{int(absent[0])}; get the file again"
        )
    return tuple(folders[label] for label in range(len(folders)))
