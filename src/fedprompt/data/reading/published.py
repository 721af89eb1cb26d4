"""What the loaders of published data sets share: their options, and the way from files to a `Task`.

A loader reads what its publisher gives, a `Published`; `build_task` takes a validation split out of
the training images where the publisher has none, applies limits, and checks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedprompt.core.checks import check_choice, check_integer
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.core.seeding import numpy_generator
from fedprompt.data.reading.files import image_names
from fedprompt.data.reading.images import (
    EncodedImages,
    ImageFiles,
    Indices,
    JoinedImages,
    LazyImages,
)
from fedprompt.data.stratified import stratified_parts
from fedprompt.data.task import Origin, Split, Task

BAD_IMAGE = ("refuse", "skip")
LIMITS = ("max_train", "max_validation", "max_test")
SPLITS = ("train", "validation", "test", "public")
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "validation"
)
"""What users call their splits, and what it means."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Options of every data set that is read from files."""

    root: str | None = None
    """Folder of the files; null means $FEDPROMPT_DATA/NAME, or data/NAME."""
    seed: int = 0
    """Of all draws: the validation split and what the limits leave."""
    max_train: int | None = None
    """Training images at most; every class keeps its share of them."""
    max_validation: int | None = None
    """Validation images at most."""
    max_test: int | None = None
    """Test images at most."""

    def __post_init__(self) -> None:
        if self.root is not None:
            # Settled here, so that a worker or a resumed run elsewhere finds the same files.
            object.__setattr__(self, "root", str(Path(self.root).expanduser().absolute()))
        check_integer("data.seed", self.seed, 0)
        for name in LIMITS:
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ConfigError(f"data.{name}: expected an integer >= 1 or null, got {limit}")


@dataclasses.dataclass(frozen=True)
class ValidationOptions(DataOptions):
    """Options of a data set whose publisher has no validation split."""

    validation: float = 0.1
    """Share of each class's training images that becomes the validation split; with 0 there is
    none, and all of them are trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("validation", self.validation, or_none=True)


@dataclasses.dataclass(frozen=True)
class ImageOptions(DataOptions):
    """Options of a data set of image files."""

    size: int = 256
    """Side in pixels: the shorter side is resized to it and the middle is cut out."""
    on_bad_image: str = "refuse"
    """What a file that does not decode means: `refuse` names it and stops when it is read; `skip`
    decodes every image once before the run, leaves such files out and says how many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 8 <= self.size <= 2048:
            raise ConfigError(f"data.size: expected 8 to 2048 pixels, got {self.size}")
        check_choice("data.on_bad_image", self.on_bad_image, BAD_IMAGE)


def check_share(name: str, share: float, *, or_none: bool = False) -> None:
    """Refuse a share that leaves one side empty.

    Args:
        name: of the option.
        share: what was given.
        or_none: whether 0 is allowed, for no such split.

    Raises:
        ConfigError: it is not between 0 and 1.
    """
    if not (0 < share < 1 or (or_none and share == 0)):
        zero = "; 0 means no such split" if or_none else ""
        raise ConfigError(f"data.{name}: expected a share between 0 and 1, got {share}{zero}")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Images with what is known of them."""

    images: LazyImages
    labels: Indices
    groups: Indices
    """Zeros where there is one domain."""
    clients: Indices | None = None
    """Who owns each image, where the data name an owner."""
    origin: Origin | None = None
    """Set by `take`: where the images stood before they were cut out of others."""

    @classmethod
    def of(cls, images: LazyImages, labels: NDArray[np.integer]) -> Labelled:
        """Images of one domain."""
        if images.shape[0] != len(labels):
            raise InputError(
                f"expected one label for each image, got {len(labels)} labels for "
                f"{images.shape[0]} images"
            )
        return cls(images, labels.astype(np.int64), np.zeros(len(labels), np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Indices) -> Labelled:
        """The images at these positions, in this order."""
        clients = None if self.clients is None else self.clients[index]
        return Labelled(
            self.images.take(index),
            self.labels[index],
            self.groups[index],
            clients,
            self.split().origins().take(index),
        )

    def as_published(self) -> Labelled:
        """The same images, as those that positions are counted in."""
        return dataclasses.replace(self, origin=None)

    @property
    def strata(self) -> Indices:
        """A number for each pair of domain and class."""
        return self.groups * (int(self.labels.max(initial=0)) + 1) + self.labels

    def split(self) -> Split:
        """For a `Task`."""
        return Split(self.images, self.labels, self.groups, self.clients, self.origin)


@dataclasses.dataclass(frozen=True)
class Published:
    """What the files of a data set hold, before anything is drawn."""

    class_names: tuple[str, ...]
    train: Labelled
    test: Labelled
    validation: Labelled | None = None
    group_names: tuple[str, ...] | None = None
    """Names of the domains; None for one domain."""
    notes: tuple[str, ...] = ()
    public: Labelled | None = None
    """Images that no client holds; no limit holds for them."""


def build_task(
    name: str,
    published: Published,
    options: DataOptions,
    share: float | None = None,
    balanced: bool = False,
) -> Task:
    """A task from published files.

    Args:
        name: of the data set.
        published: its splits.
        options: seed and limits.
        share: of the training images that becomes the validation split if there is none.
        balanced: see `limited`.

    Raises:
        ConfigError: a share or a limit leaves no image, or not one of each class.
        InputError: a class has no training image, or one is tested that is not trained.
    """
    check_no_repeats(name, published)
    splits = draw_splits(name, published, options, share, balanced)
    return Task(
        name=name,
        class_names=published.class_names,
        group_names=published.group_names or (name,),
        train=splits[0].split(),
        validation=splits[1].split(),
        test=splits[2].split(),
        public=None if published.public is None else published.public.split(),
        notes=published.notes,
    )


def draw_splits(
    name: str,
    published: Published,
    options: DataOptions,
    share: float | None = None,
    balanced: bool = False,
) -> tuple[Labelled, Labelled, Labelled]:
    """Training, validation and test images after the draws; see `build_task`.

    Args:
        name: of the data set.
        published: the splits as their publisher made them.
        options: how many images are taken, and the seed of the draws.
        share: of each class of the training images for validation, where the publisher has no such
            split.
        balanced: whether validation gets equally many images of each class.
    """
    check_all_trained(name, published)
    train, validation = published.train, published.validation
    if validation is None:
        train, validation = hold_out(name, train, options.seed, share)
    drawn = []
    for limit, split in zip(LIMITS, (train, validation, published.test), strict=True):
        none_wanted = limit == "max_validation" and getattr(options, "validation", None) == 0
        if not len(split) and not none_wanted:
            which = limit.removeprefix("max_")
            raise InputError(f"{name}: expected images in the {which} split, got none")
        bound, strata = getattr(options, limit), split.strata
        if bound is None:
            drawn.append(split)
            continue
        if limit == "max_train" and bound < len(np.unique(strata)):
            raise ConfigError(
                f"data.max_train: expected at least {len(np.unique(strata))} images, one of each "
                f"class of {name}, got {bound}"
            )
        generator = numpy_generator(options.seed, f"data/{name}/{limit}")
        drawn.append(split.take(limited(strata, bound, generator, balanced)))
    return drawn[0], drawn[1], drawn[2]


def check_no_repeats(name: str, published: Published) -> None:
    """No file is listed twice, in one split or in two.

    Raises:
        InputError: names the first file and where it stands.
    """
    seen: dict[str, str] = {}
    for which in SPLITS:
        split: Labelled | None = getattr(published, which)
        if split is None or not isinstance(split.images, ImageFiles):
            continue
        root = str(split.images.root)
        for image in split.images.names:
            path = os.path.normpath(f"{root}/{image}")
            if path in seen:
                where = (
                    f"twice in {which}" if seen[path] == which else f"in {seen[path]} and {which}"
                )
                raise InputError(
                    f"{name}: expected each image once, got {path} {where}; a list of the data set "
                    "is wrong: get the files again, or remove the line"
                )
            seen[path] = which


def check_all_trained(name: str, published: Published) -> None:
    """Every class has a training image.

    Raises:
        InputError: names the first that has none.
    """
    counts = np.bincount(published.train.labels, minlength=len(published.class_names))
    if not counts.all():
        empty = published.class_names[int(counts.argmin())]
        raise InputError(
            f"{name}: expected training images of every class, got none of '{empty}' "
            f"({int((counts == 0).sum())} of {len(counts)} classes are empty)"
        )


def hold_out(
    name: str, train: Labelled, seed: int, share: float | None
) -> tuple[Labelled, Labelled]:
    """Training images and the validation split that is cut out of them, class by class.

    Args:
        name: of the data set, for messages.
        train: the images to divide.
        seed: of the draw.
        share: of each class that goes to validation; 0 for an empty split.

    Raises:
        ConfigError: the share leaves one of them empty.
    """
    if share is None:
        raise InputError(f"{name}: expected a validation split or a share for one, got neither")
    if share == 0:
        return train, train.take(np.zeros(0, np.int64))
    held, kept = stratified_parts(
        train.strata, (share,), numpy_generator(seed, f"data/{name}/validation")
    )
    if not len(held) or not len(kept):
        raise ConfigError(
            f"data.validation: expected a share that leaves both splits images, got {share} of "
            f"{len(train)} images in {len(np.unique(train.strata))} classes; change the share "
            "(0: no such split) or add images"
        )
    return train.take(kept), train.take(held)


def limited(
    labels: Indices, count: int, generator: np.random.Generator, balanced: bool = False
) -> Indices:
    """Draw `count` samples so that each class keeps its share, or gets an equal one.

    Args:
        labels: (N,)
        count: how many; all if there are no more.
        generator: decides which.
        balanced: classes get equally many, as far as their samples reach.

    Returns:
        Sorted positions; the first of each class comes before the second of any.

    >>> labels = np.repeat([0, 1, 2], [70, 20, 10])
    >>> np.bincount(labels[limited(labels, 10, np.random.default_rng(0))]).tolist()
    [7, 2, 1]
    >>> np.bincount(labels[limited(labels, 36, np.random.default_rng(0), balanced=True)]).tolist()
    [13, 13, 10]
    """
    if count >= len(labels):
        return np.arange(len(labels))
    order = np.zeros(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        rank = np.arange(len(members))
        order[members] = rank if balanced else np.where(rank > 0, (rank + 0.5) / len(members), 0)
    return np.sort(np.argsort(order, kind="stable")[:count]).astype(np.int64)


def with_test(
    name: str,
    class_names: tuple[str, ...],
    splits: Mapping[str, Labelled],
    options: DataOptions,
    share: float,
    group_names: tuple[str, ...] | None = None,
) -> Published:
    """The splits that there are; a test split is cut out of the training images if there is none,
    so that each class of each domain keeps its share.

    Args:
        name: of the data set.
        class_names: of all splits.
        splits: `train` and, as it may be, `validation` and `test`.
        options: hold the seed.
        share: of the images that are tested.
        group_names: of the domains; None for one domain.

    Raises:
        ConfigError: the share leaves a split empty.
    """
    train, test = splits["train"], splits.get("test")
    if test is None:
        generator = numpy_generator(options.seed, f"data/{name}/test")
        held, kept = stratified_parts(train.strata, (share,), generator)
        if not len(held) or not len(kept):
            raise ConfigError(
                f"data.test: expected a share that leaves both splits images, got {share} of "
                f"{len(train)} images in {len(class_names)} classes"
            )
        train, test = train.take(kept), train.take(held)
    return Published(class_names, train, test, splits.get("validation"), group_names)


def numbered(
    values: Sequence[str], order: Sequence[str] | None = None
) -> tuple[tuple[str, ...], Indices]:
    """The different values in order, and each value's number.

    Args:
        values: (N,)
        order: of all that may occur; by default that of the alphabet, or of numbers if all are.

    >>> names, numbers = numbered(["10", "9", "10"])
    >>> names, numbers.tolist()
    (('9', '10'), [1, 0, 1])
    """
    found = sorted(set(values))
    if order is not None:
        found = [name for name in order if name in set(found)]
    elif all(name.isdecimal() for name in found):
        found.sort(key=int)
    number_of = {name: number for number, name in enumerate(found)}
    return tuple(found), np.array([number_of[value] for value in values], np.int64)


def join(parts: Sequence[Labelled], label_offsets: Sequence[int]) -> Labelled:
    """One domain after the other: part i becomes domain i, its labels are raised by an offset."""
    return Labelled(
        JoinedImages([part.images for part in parts]),
        np.concatenate(
            [part.labels + offset for part, offset in zip(parts, label_offsets, strict=True)]
        ),
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]).astype(np.int64),
    )


def read_class_folders(folder: Path, class_names: Sequence[str], size: int) -> Labelled:
    """The images of one split that has a folder for each class.

    Args:
        folder: holds a folder for each class.
        class_names: names of those folders, in the order of the labels.
        size: side of the images, in pixels.

    Raises:
        InputError: a class has no folder, or its folder holds no image.
    """
    names: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        own = image_names(folder / class_name)
        if not own:
            found = "no image" if (folder / class_name).is_dir() else "no such folder"
            raise InputError(
                f"{folder / class_name}: expected images of class '{class_name}', got {found}; "
                "get the files again, or remove the class"
            )
        names += [f"{class_name}/{name}" for name in own]
        labels += [label] * len(own)
    return Labelled.of(ImageFiles(folder, names, size), np.array(labels, np.int64))


def without_bad_images(name: str, published: Published, options: ImageOptions) -> Published:
    """Decode every file once and leave out those that do not decode, if the options say `skip`.

    Args:
        name: of the data set, for messages.
        published: the splits to look at.
        options: whether to skip, and how images are read.

    Returns:
        The published splits; what was left out is counted in their notes.
    """
    if options.on_bad_image == "refuse":
        return published
    notes = list(published.notes)
    kept: dict[str, Labelled] = {}
    for which in SPLITS:
        split: Labelled | None = getattr(published, which)
        if split is None or not isinstance(split.images, ImageFiles | EncodedImages):
            continue
        bad = split.images.undecodable()
        if len(bad):
            notes.append(
                f"{name}: {len(bad)} of {len(split)} {which} images do not decode and are left "
                f"out, the first is {split.images.name_of(bad[0])}"
            )
            kept[which] = split.take(np.setdiff1d(np.arange(len(split)), bad))
    return dataclasses.replace(published, **kept, notes=tuple(notes))  # type: ignore[arg-type]
