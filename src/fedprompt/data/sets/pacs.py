"""PACS: seven classes in four domains - art paintings, cartoons, photographs, sketches.

Li et al., "Deeper, Broader and Artier Domain Generalization", ICCV 2017. 9,991 images of 227 x 227
pixels, `PACS/kfold/DOMAIN/CLASS/*`. The publisher's lists DOMAIN_train_kfold.txt and
DOMAIN_crossval_kfold.txt, where they are there, say which images train and which test; its
DOMAIN_test_kfold.txt repeats both, for training on the other domains, and is not used.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.core.seeding import numpy_generator
from fedprompt.data.reading.files import (
    Layout,
    check_labels,
    data_folder,
    image_names,
    locate,
    read_list,
)
from fedprompt.data.reading.images import ImageFiles, Indices
from fedprompt.data.reading.published import (
    ImageOptions,
    Labelled,
    Published,
    ValidationOptions,
    build_task,
    check_share,
    without_bad_images,
)
from fedprompt.data.stratified import stratified_parts
from fedprompt.data.task import Task, datasets

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
LAYOUT = Layout(
    tuple(f"{domain}/" for domain in DOMAINS), ("PACS/kfold", "kfold", "PACS", "images")
)
LIST_FOLDERS = (
    *(".", "..", "../pacs_label", "../splits"),
    "../Train val splits and h5py files pre-read",
)
"""Where the lists are, seen from the folder of the domains."""
FAULTY = "sketch/dog/n02103406_4068-1.png"
"""In the publisher's lists, but known to be faulty; other loaders leave it out, too."""
SOURCE = "the authors' page (domaingeneralization.github.io)"

Named = tuple[list[str], Indices, Indices]
"""Names, labels and domains of images."""


@dataclasses.dataclass(frozen=True)
class PacsOptions(ImageOptions, ValidationOptions):
    """Options of `pacs`."""

    several_domains: ClassVar[bool] = True

    size: int = 227
    test: float = 0.1
    """Share of each domain's classes that becomes the test split where the lists are not there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("test", self.test)


@datasets.register("pacs", PacsOptions)
def pacs(options: PacsOptions) -> Task:
    """Seven classes that all four domains share."""
    root = data_folder(options.root, "pacs")
    folder, _ = locate("pacs", root, (LAYOUT,), SOURCE)
    lists = _find_lists(folder)
    if lists is None:
        train, test = _split_folders(folder, options)
    else:
        train, test = (
            _labelled(folder, _read_lists(lists, split), options.size)
            for split in ("train", "crossval")
        )
    published = Published(CLASSES, train, test, group_names=DOMAINS)
    published = without_bad_images("pacs", published, options)
    return build_task("pacs", published, options, options.validation)


def _find_lists(folder: Path) -> Path | None:
    """The folder of the lists, or None if there are none.

    Raises:
        ConfigError: some are there, some are not.
    """
    files = [f"{domain}_{split}_kfold.txt" for domain in DOMAINS for split in ("train", "crossval")]
    for inner in LIST_FOLDERS:
        absent = [file for file in files if not (folder / inner / file).is_file()]
        if not absent:
            return folder / inner
        if len(absent) < len(files):
            raise ConfigError(
                f"pacs: {', '.join(absent)} missing in {(folder / inner).resolve()}: expected the "
                f"lists of all domains, or none of them; get the files from {SOURCE}"
            )
    return None


def _read_lists(folder: Path, split: str) -> Named:
    """Lines of DOMAIN/CLASS/FILE and a class from 1 to 7."""
    names: list[str] = []
    labels: list[Indices] = []
    domains: list[int] = []
    for number, domain in enumerate(DOMAINS):
        path = folder / f"{domain}_{split}_kfold.txt"
        own, classes = read_list(path, first_label=1)
        check_labels(path, classes, len(CLASSES), first=1)
        for name, label in zip(own, classes, strict=True):
            if name.split("/")[:2] != [domain, CLASSES[label]]:
                raise InputError(
                    f"{path}: expected paths of {domain}/{CLASSES[label]}/ with label {label + 1}, "
                    f"got '{name}'; get the files again"
                )
        names += own
        labels.append(classes)
        domains += [number] * len(own)
    return names, np.concatenate(labels), np.array(domains, np.int64)


def _split_folders(folder: Path, options: PacsOptions) -> tuple[Labelled, Labelled]:
    """All images of the folders, divided by the seed."""
    names: list[str] = []
    labels: list[int] = []
    domains: list[int] = []
    for number, domain in enumerate(DOMAINS):
        for label, class_name in enumerate(CLASSES):
            own = image_names(folder / domain / class_name)
            if not own:
                raise InputError(
                    f"{folder / domain / class_name}: expected images, got none; "
                    "get the files again"
                )
            names += [f"{domain}/{class_name}/{name}" for name in own]
            labels += [label] * len(own)
            domains += [number] * len(own)
    everything = _labelled(
        folder, (names, np.array(labels, np.int64), np.array(domains, np.int64)), options.size
    )
    generator = numpy_generator(options.seed, "data/pacs/test")
    test, train = stratified_parts(everything.strata, (options.test,), generator)
    if not len(test):
        raise ConfigError(
            f"data.test: expected a share that leaves test images, got {options.test} of "
            f"{len(everything)} images"
        )
    return everything.take(train), everything.take(test)


def _labelled(folder: Path, named: Named, size: int) -> Labelled:
    names, labels, domains = named
    kept = np.array([name != FAULTY for name in names], bool)
    chosen = [name for name, keep in zip(names, kept, strict=True) if keep]
    return Labelled(ImageFiles(folder, chosen, size).all_there(), labels[kept], domains[kept])
