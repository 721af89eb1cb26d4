"""TinyImageNet: 64 x 64 colour images of 200 ImageNet classes.

Stanford CS231n, 2015. 100,000 training images; the 10,000 validation images have labels and become
the test split, since those of the test images are not published.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from fedprompt.core.errors import InputError
from fedprompt.data.reading.files import (
    Layout,
    check_same_names,
    data_folder,
    image_names,
    locate,
    read_lines,
)
from fedprompt.data.reading.images import ImageFiles
from fedprompt.data.reading.published import (
    ImageOptions,
    Labelled,
    Published,
    ValidationOptions,
    build_task,
    without_bad_images,
)
from fedprompt.data.task import Task, datasets

LAYOUT = Layout(
    ("wnids.txt", "words.txt", "train/", "val/val_annotations.txt", "val/images/"),
    ("tiny-imagenet-200",),
    ("tiny-imagenet-200.zip",),
)
SOURCE = "Stanford's CS231n (cs231n.stanford.edu/tiny-imagenet-200.zip)"


@dataclasses.dataclass(frozen=True)
class TinyImageNetOptions(ImageOptions, ValidationOptions):
    """Options of `tinyimagenet`."""

    size: int = 64


@datasets.register("tinyimagenet", TinyImageNetOptions)
def tinyimagenet(options: TinyImageNetOptions) -> Task:
    """200 classes, named by WordNet id and first word."""
    root = data_folder(options.root, "tinyimagenet")
    published = read_tinyimagenet(root, options.size)
    published = without_bad_images("tinyimagenet", published, options)
    return build_task("tinyimagenet", published, options, options.validation)


def read_tinyimagenet(root: Path, size: int) -> Published:
    """`train/WNID/images/`, and `val/` with its list.

    Raises:
        ConfigError: the files are not there.
        InputError: a class is empty, or the list and the images do not belong together.
    """
    folder, _ = locate("tinyimagenet", root, (LAYOUT,), SOURCE)
    ids = [line for _, line in read_lines(folder / "wnids.txt")]
    if not ids or len(set(ids)) != len(ids):
        raise InputError(f"{folder / 'wnids.txt'}: expected one WordNet id a line, each once")
    words = dict(
        line.split("\t", 1) for _, line in read_lines(folder / "words.txt") if "\t" in line
    )
    class_names = tuple(f"{each} {words.get(each, '?').split(',')[0].strip()}" for each in ids)
    return Published(
        class_names, _train(folder / "train", ids, size), _val(folder / "val", ids, size)
    )


def _train(folder: Path, ids: list[str], size: int) -> Labelled:
    names: list[str] = []
    labels: list[int] = []
    for label, wnid in enumerate(ids):
        own = [f"{wnid}/images/{name}" for name in image_names(folder / wnid / "images")]
        if not own:
            raise InputError(
                f"{folder / wnid / 'images'}: expected images of class {wnid}, got none; "
                "get the files again"
            )
        names += own
        labels += [label] * len(own)
    return Labelled.of(ImageFiles(folder, names, size), np.array(labels, np.int64))


def _val(folder: Path, ids: list[str], size: int) -> Labelled:
    """Lines of file, id and box, separated by tabs."""
    path = folder / "val_annotations.txt"
    number_of = {wnid: label for label, wnid in enumerate(ids)}
    names: list[str] = []
    labels: list[int] = []
    for number, line in read_lines(path):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in number_of:
            raise InputError(
                f"{path}, line {number}: expected a file name, a tab and an id of wnids.txt, "
                f"got {line!r}; get the files again"
            )
        names.append(fields[0])
        labels.append(number_of[fields[1]])
    check_same_names(path, names, folder / "images")
    return Labelled.of(ImageFiles(folder / "images", names, size), np.array(labels, np.int64))
