"""Your own images: a folder for each class, or a CSV file that says what each image is.

    ROOT/SPLIT/CLASS/*   with splits train, val (or valid, validation) and test
    ROOT/CLASS/*         divided by the seed
    data.csv=FILE        columns path, label and, as you like, group, split, client

Where a folder DOMAIN stands above each CLASS, images have domains (`reading.folders`). A split that
is not there is cut out of the training images by its share of each class of each domain.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt.core.checks import check_choice
from fedprompt.core.errors import ConfigError, FedpromptError, InputError, suggest
from fedprompt.core.words import counted
from fedprompt.data.reading.files import class_folders, data_folder
from fedprompt.data.reading.folders import (
    LAYOUTS,
    in_domains,
    looks_nested,
    names_in_folders,
    recognise,
    some,
)
from fedprompt.data.reading.images import ImageFiles
from fedprompt.data.reading.published import (
    SPLIT_NAMES,
    ImageOptions,
    Labelled,
    Published,
    ValidationOptions,
    build_task,
    check_share,
    numbered,
    with_test,
    without_bad_images,
)
from fedprompt.data.task import Task, datasets

COLUMNS = ("path", "label", "group", "split", "client")


@dataclasses.dataclass(frozen=True)
class ImageFolderOptions(ImageOptions, ValidationOptions):
    """Options of `imagefolder`."""

    test: float = 0.2
    """Share of each class that becomes the test split where the data have none."""
    csv: str | None = None
    """A CSV file; its paths are relative to data.root or, without one, to the file's folder."""
    layout: str = "auto"
    """What the upper folders are: `class`, `domain` (with folders of classes in them), or `auto`,
    which looks and refuses what may be either."""

    @property
    def several_domains(self) -> bool:
        """Whether the images may have domains, after a quick look at the folders."""
        if self.csv is not None or self.layout != "auto":
            return self.csv is not None or self.layout == "domain"
        try:
            root = data_folder(self.root, "imagefolder")
            return looks_nested(_split_folders(root).get("train", root))
        except (FedpromptError, OSError):  # reading it says what is wrong
            return False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("test", self.test)
        check_choice("data.layout", self.layout, LAYOUTS)
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
        f"imagefolder: {counted(len(found), 'animated image')}; the first frame is read. The "
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
    images = {split: names_in_folders(folder) for split, folder in found.items()}
    layout = options.layout
    if layout == "auto":
        prefixes = {
            split: "" if folder == root else f"{folder.name}/" for split, folder in found.items()
        }
        layout = recognise(root, {prefixes[split]: names for split, names in images.items()})
    if layout == "domain":
        return _from_domains(found, images, options)
    names = sorted({name for folder in found.values() for name in class_folders(folder)})
    splits = {
        split: _read_folder(folder, images[split], names, options)
        for split, folder in found.items()
    }
    return with_test("imagefolder", tuple(names), splits, options, options.test)


def _from_domains(
    found: Mapping[str, Path], images: Mapping[str, Sequence[str]], options: ImageFolderOptions
) -> Published:
    """DOMAIN/CLASS/IMAGE in each split; the note says what was read as what.

    Args:
        found: the folder of each split.
        images: names of its images.
        options: of the data set.
    """
    rows = {split: in_domains(folder, images[split]) for split, folder in found.items()}
    for split, folder in found.items():
        if not rows[split]:
            raise InputError(f"{folder}: expected images as DOMAIN/CLASS/IMAGE, got none")
    domains, classes = (
        tuple(sorted({row[column] for own in rows.values() for row in own})) for column in (0, 1)
    )
    domain_number, class_number = (
        {name: number for number, name in enumerate(names)} for names in (domains, classes)
    )
    splits = {
        split: Labelled(
            ImageFiles(found[split], [name for _, _, name in own], options.size),
            np.array([class_number[name] for _, name, _ in own], np.int64),
            np.array([domain_number[name] for name, _, _ in own], np.int64),
        )
        for split, own in rows.items()
    }
    note = (
        f"imagefolder: the upper folders are read as {len(domains)} domains ({some(domains)}), "
        f"the folders in them as {len(classes)} classes ({some(classes)}); data.layout=class reads "
        "the upper folders as classes"
    )
    published = with_test("imagefolder", classes, splits, options, options.test, domains)
    return dataclasses.replace(published, notes=(*published.notes, note))


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits; none where the root holds the classes themselves.

    Raises:
        InputError: some folders look like splits, but not all, or two are the same one.
    """
    names = class_folders(root)
    # A folder `train` without folders in it is a class of that name.
    if not any(name.lower() in SPLIT_NAMES and class_folders(root / name) for name in names):
        return {}
    found = {SPLIT_NAMES[name]: root / name for name in names if name in SPLIT_NAMES}
    if "train" not in found or len(found) < len(names):
        raise InputError(
            f"{root}: expected folders train and, as you like, val (or valid, validation) and test "
            f"and no other, or a folder for each class, got {', '.join(names)}; rename or remove "
            "what does not belong there"
        )
    return found


def _read_folder(
    folder: Path, images: Sequence[str], class_names: Sequence[str], options: ImageFolderOptions
) -> Labelled:
    """The classes that have a folder here; which must have one, the task says.

    Args:
        folder: of the split.
        images: names of its images.
        class_names: of all splits.
        options: of the data set.
    """
    own: dict[str, list[str]] = {name: [] for name in class_names}
    for image in images:
        own.get(image.partition("/")[0], []).append(image)
    names: list[str] = []
    labels: list[int] = []
    for label, (class_name, of_class) in enumerate(own.items()):
        if not (folder / class_name).is_dir():
            continue
        if not of_class:
            raise InputError(
                f"{folder / class_name}: expected images of class '{class_name}', got none; put "
                "some there or remove the folder"
            )
        names += of_class
        labels += [label] * len(of_class)
    if not names:
        raise InputError(f"{folder}: expected a folder for each class, got none")
    return Labelled.of(ImageFiles(folder, names, options.size), np.array(labels, np.int64))


def _from_csv(path: Path, options: ImageFolderOptions) -> Published:
    rows = _read_csv(path)
    root = path.parent if options.root is None else Path(options.root)
    class_names, labels = numbered([row["label"] for row in rows])
    group_names, groups = numbered([row.get("group", "all") for row in rows])
    clients = numbered([row["client"] for row in rows])[1] if "client" in rows[0] else None
    everything = Labelled(
        ImageFiles(root, [row["path"] for row in rows], options.size).all_there(),
        labels,
        groups,
        clients,
    )
    parts = np.array([SPLIT_NAMES[row.get("split", "train")] for row in rows])
    splits = {
        str(split): everything.take(np.flatnonzero(parts == split)).as_published()
        for split in np.unique(parts)
    }
    if "train" not in splits:
        raise InputError(f"{path}: expected rows with split 'train', got none")
    return with_test("imagefolder", class_names, splits, options, options.test, group_names)


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
            rows = [(reader.line_num, _stripped(row)) for row in reader]
            columns = [name.strip() for name in reader.fieldnames or ()]
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
        if row.get("split", "train") not in SPLIT_NAMES:
            raise InputError(
                f"{path}, line {line}: split: expected one of {', '.join(SPLIT_NAMES)}, got "
                f"'{row['split']}'{suggest(row['split'], SPLIT_NAMES)}"
            )
        if row["path"] in seen:
            raise InputError(f"{path}, line {line}: '{row['path']}' is there twice")
        seen.add(row["path"])
    for column in ("label", "group", "client"):
        _check_blanks(path, column, [(line, row[column]) for line, row in rows if column in row])
    return [row for _, row in rows]


def _stripped(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with single blanks inside of values and none around them; a path stays as it is."""
    return {
        name.strip(): " ".join(value.split())
        if isinstance(value, str) and name.strip() != "path"
        else value
        for name, value in row.items()
    }


def _check_blanks(path: Path, column: str, values: Sequence[tuple[int, str]]) -> None:
    """Refuse values that differ in blanks alone.

    Args:
        path: of the file, for the message.
        column: its name.
        values: line and value of each row.

    Raises:
        InputError: names two such values and their lines.
    """
    first: dict[str, tuple[int, str]] = {}
    for line, value in values:
        other, known = first.setdefault("".join(value.split()), (line, value))
        if known != value:
            raise InputError(
                f"{path}, line {line}: {column} '{value}' differs from '{known}' in line {other} "
                "by blanks alone; write both alike"
            )
