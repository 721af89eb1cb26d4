"""Your own images: a folder for each class, or a CSV file that says what each image is.

    ROOT/SPLIT/CLASS/*   with splits train, val (or valid, validation) and test
    ROOT/CLASS/*         divided by the seed
    data.csv=FILE        columns path, label and, as you like, group, split, client

A split that is not there is cut out of the training images by its share.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedprompt.core.errors import ConfigError, InputError, suggest
from fedprompt.core.seeding import numpy_generator
from fedprompt.data.reading.files import class_folders, data_folder, image_names
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

SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "validation"
)
"""What folders and the `split` column may say, and what it means."""
COLUMNS = ("path", "label", "group", "split", "client")


@dataclasses.dataclass(frozen=True)
class ImageFolderOptions(ImageOptions, ValidationOptions):
    """Options of `imagefolder`."""

    test: float = 0.2
    """Share of each class that becomes the test split where the data have none."""
    csv: str | None = None
    """A CSV file; its paths are relative to data.root or, without one, to the file's folder."""

    @property
    def several_domains(self) -> bool:
        """Whether the images may have domains: only a CSV file can name them."""
        return self.csv is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("test", self.test)
        if self.csv is not None:
            object.__setattr__(self, "csv", str(Path(self.csv).expanduser().absolute()))


@datasets.register("imagefolder", ImageFolderOptions)
def imagefolder(options: ImageFolderOptions) -> Task:
    """Whatever the folders or the CSV file say."""
    if options.csv is not None:
        published = _from_csv(Path(options.csv), options)
    else:
        published = _from_folders(data_folder(options.root, "imagefolder"), options)
    published = _with_animations_noted(without_bad_images("imagefolder", published, options))
    return build_task("imagefolder", published, options, options.validation)


def _with_animations_noted(published: Published) -> Published:
    """Say in the notes how many images are animations, of which the first frame is read."""
    found: list[str] = []
    for split in (published.train, published.validation, published.test):
        if split is not None and isinstance(split.images, ImageFiles):
            files = split.images
            found += [str(files.root / files.names[number]) for number in files.animated()]
    if not found:
        return published
    note = (
        f"imagefolder: {len(found)} of the images are animated; the first frame is read. The "
        f"first is {found[0]}"
    )
    return dataclasses.replace(published, notes=(*published.notes, note))


def _from_folders(root: Path, options: ImageFolderOptions) -> Published:
    if not class_folders(root):
        raise ConfigError(
            f"imagefolder: no data in {root}: expected folders train/CLASS/, test/CLASS/, or "
            "CLASS/, with images in them; say where they are with data.root=FOLDER"
        )
    found = _split_folders(root) or {"train": root}
    names = sorted({name for folder in found.values() for name in class_folders(folder)})
    splits = {split: _read_folder(folder, names, options) for split, folder in found.items()}
    return _complete(tuple(names), splits, options)


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits; none where the root holds the classes themselves.

    Raises:
        InputError: some folders look like splits, but not all, or two are the same one.
    """
    names = class_folders(root)
    # A folder `train` without folders in it is a class of that name.
    if not any(name.lower() in SPLITS and class_folders(root / name) for name in names):
        return {}
    found = {SPLITS[name]: root / name for name in names if name in SPLITS}
    if "train" not in found or len(found) < len(names):
        raise InputError(
            f"{root}: expected folders train and, as you like, val (or valid, validation) and test "
            f"and no other, or a folder for each class, got {', '.join(names)}; rename or remove "
            "what does not belong there"
        )
    return found


def _read_folder(folder: Path, class_names: Sequence[str], options: ImageFolderOptions) -> Labelled:
    """The classes that have a folder here; which must have one, the task says."""
    names: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        if not (folder / class_name).is_dir():
            continue
        own = image_names(folder / class_name)
        if not own:
            raise InputError(
                f"{folder / class_name}: expected images of class '{class_name}', got none; put "
                "some there or remove the folder"
            )
        names += [f"{class_name}/{name}" for name in own]
        labels += [label] * len(own)
    if not names:
        raise InputError(f"{folder}: expected a folder for each class, got none")
    return Labelled.of(ImageFiles(folder, names, options.size), np.array(labels, np.int64))


def _complete(
    class_names: tuple[str, ...],
    splits: dict[str, Labelled],
    options: ImageFolderOptions,
    group_names: tuple[str, ...] | None = None,
) -> Published:
    """Cut the test split out of the training images if there is none."""
    train, test = splits["train"], splits.get("test")
    if test is None:
        generator = numpy_generator(options.seed, "data/imagefolder/test")
        held, kept = stratified_parts(train.strata, (options.test,), generator)
        if not len(held) or not len(kept):
            raise ConfigError(
                f"data.test: expected a share that leaves both splits images, got {options.test} "
                f"of {len(train)} images in {len(class_names)} classes"
            )
        train, test = train.take(kept), train.take(held)
    return Published(class_names, train, test, splits.get("validation"), group_names)


def _from_csv(path: Path, options: ImageFolderOptions) -> Published:
    rows = _read_csv(path)
    root = path.parent if options.root is None else Path(options.root)
    class_names, labels = _numbered([row["label"] for row in rows])
    group_names, groups = _numbered([row.get("group", "all") for row in rows])
    clients = _numbered([row["client"] for row in rows])[1] if "client" in rows[0] else None
    everything = Labelled(
        ImageFiles(root, [row["path"] for row in rows], options.size).all_there(),
        labels,
        groups,
        clients,
    )
    parts = np.array([SPLITS[row.get("split", "train")] for row in rows])
    splits = {
        str(split): everything.take(np.flatnonzero(parts == split)) for split in np.unique(parts)
    }
    if "train" not in splits:
        raise InputError(f"{path}: expected rows with split 'train', got none")
    return _complete(class_names, splits, options, group_names)


def _read_csv(path: Path) -> list[dict[str, str]]:
    """The rows; each column is either full or absent.

    Raises:
        ConfigError: the file is not there.
        InputError: a column is missing or unknown, or a row is incomplete, wrong or there twice.
    """
    if not path.is_file():
        raise ConfigError(f"data.csv: expected a CSV file, got {path}, which does not exist")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="")
            rows = [(reader.line_num, row) for row in reader]
            columns = list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV ({error})") from error
    for column in columns:
        if column not in COLUMNS:
            raise InputError(
                f"{path}: unknown column '{column}': expected path, label and at most "
                f"{', '.join(COLUMNS[2:])}{suggest(column, COLUMNS)}"
            )
    if not {"path", "label"} <= set(columns) or len(set(columns)) != len(columns) or not rows:
        raise InputError(
            f"{path}: expected a first line with path and label and rows below it, got "
            f"{len(rows)} rows of {', '.join(columns) or 'no column'}"
        )
    seen: set[str] = set()
    for line, row in rows:
        if set(row) != set(columns) or not all(row.values()):
            raise InputError(
                f"{path}, line {line}: expected {', '.join(columns)}, each with a value"
            )
        if row.get("split", "train") not in SPLITS:
            raise InputError(
                f"{path}, line {line}: split: expected one of {', '.join(SPLITS)}, got "
                f"'{row['split']}'{suggest(row['split'], SPLITS)}"
            )
        if row["path"] in seen:
            raise InputError(f"{path}, line {line}: '{row['path']}' is there twice")
        seen.add(row["path"])
    return [row for _, row in rows]


def _numbered(values: Sequence[str]) -> tuple[tuple[str, ...], Indices]:
    """The different values in order (as numbers if all are), and each value's number."""
    order = sorted(set(values))
    if all(name.isdecimal() for name in order):
        order.sort(key=int)
    number_of = {name: number for number, name in enumerate(order)}
    return tuple(order), np.array([number_of[value] for value in values], np.int64)
