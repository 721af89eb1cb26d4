"""A folder that Hugging Face `datasets` wrote with `save_to_disk`: one data set, or its splits.

Images come as encoded bytes and are decoded like all others; nothing in the folder is run. Needs
the package `datasets`: the extra `huggingface`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt.core.errors import ConfigError, FedpromptError, InputError, suggest
from fedprompt.data.reading.files import data_folder, signature
from fedprompt.data.reading.images import EncodedImages, Indices
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

FILES = ("dataset_dict.json", "state.json")
"""One of them says that a folder is of this kind: several splits, or one."""


@dataclasses.dataclass(frozen=True)
class HuggingFaceOptions(ImageOptions, ValidationOptions):
    """Options of `huggingface`."""

    image_column: str | None = None
    """Column of the images; null takes the only one."""
    label_column: str | None = None
    """Column of the classes; null takes the only one of type ClassLabel."""
    domain_column: str | None = None
    """Column of the visual domains, if there are several."""
    client_column: str | None = None
    """Column of the owners, if the data name any."""
    test: float = 0.2
    """Share of each class that becomes the test split where the data have none."""

    @property
    def several_domains(self) -> bool:
        """Whether a column names domains."""
        return self.domain_column is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("test", self.test)


@datasets.register("huggingface", HuggingFaceOptions)
def huggingface(options: HuggingFaceOptions) -> Task:
    """Whatever the columns say; splits are those of the folder."""
    root = data_folder(options.root, "huggingface")
    if not any((root / name).is_file() for name in FILES):
        raise ConfigError(
            f"huggingface: no data in {root}: expected a folder that datasets' save_to_disk wrote "
            f"(with {' or '.join(FILES)}); say where it is with data.root=FOLDER"
        )
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            "data=huggingface needs the package datasets, not installed here; "
            "pip install 'fedprompt[huggingface]'"
        )
    with _one_line(root):
        published = without_bad_images("huggingface", _read(root, options), options)
        return build_task("huggingface", published, options, options.validation)


@contextlib.contextmanager
def _one_line(root: Path) -> Iterator[None]:
    """Whatever the library raises about a damaged folder, as one line."""
    try:
        yield
    except FedpromptError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{root}: expected a folder that datasets' save_to_disk wrote, got one that does not "
            f"open ({cause}); write it again"
        ) from error


def _read(root: Path, options: HuggingFaceOptions) -> Published:
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(str(root))
    found = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    meaning = {name: SPLIT_NAMES.get(str(name)) for name in found}
    used = [which for which in meaning.values() if which]
    if None in meaning.values() or "train" not in used or len(set(used)) < len(used):
        raise InputError(
            f"{root}: expected the splits train and, as you like, validation (or val, valid) and "
            f"test, got {', '.join(map(str, found))}; write the folder again with those alone"
        )
    tables = {str(meaning[name]): table for name, table in found.items()}
    columns = _columns(root, tables["train"], options)
    texts = {
        which: {key: _texts(root, table, columns[key]) for key in columns if key != "image"}
        for which, table in tables.items()
    }
    names, numbers = {}, {}
    for key in columns.keys() - {"image"}:
        values = [text for each in texts.values() for text in each[key]]
        kind = tables["train"].features[columns[key]]
        names[key], every = numbered(values, getattr(kind, "names", None))
        cuts = np.cumsum([len(each[key]) for each in texts.values()])[:-1]
        numbers[key] = dict(zip(texts, np.split(every, cuts), strict=True))
    splits = {
        which: Labelled(
            _images(root, which, table, columns["image"], options.size),
            numbers["label"][which],
            numbers["domain"][which] if "domain" in numbers else np.zeros(len(table), np.int64),
            numbers["client"][which] if "client" in numbers else None,
        )
        for which, table in tables.items()
    }
    domains = names.get("domain")
    return with_test("huggingface", names["label"], splits, options, options.test, domains)


def _columns(root: Path, table: Any, options: HuggingFaceOptions) -> dict[str, str]:
    """Names of the columns to read: image and label, and domain and client where asked for.

    Raises:
        ConfigError: there is no such column, or one has to be named.
    """
    from datasets import ClassLabel, Image

    chosen: dict[str, str] = {}
    for key, kind in (("image", Image), ("label", ClassLabel), ("domain", None), ("client", None)):
        option = f"{key}_column"
        name = getattr(options, option)
        if name is None and kind is not None:
            fitting = [name for name, each in table.features.items() if isinstance(each, kind)]
            if len(fitting) != 1:
                raise ConfigError(
                    f"data.{option}: expected one column of type {kind.__name__} in {root}, got "
                    f"{', '.join(fitting) or 'none'} of {', '.join(table.column_names)}; name the "
                    f"column with data.{option}=NAME"
                )
            name = fitting[0]
        if name is None:
            continue
        if name not in table.column_names:
            raise ConfigError(
                f"data.{option}: expected a column of {root} ({', '.join(table.column_names)}), "
                f"got '{name}'{suggest(name, table.column_names)}"
            )
        if key == "image" and not isinstance(table.features[name], Image):
            raise ConfigError(
                f"data.image_column: expected a column of type Image, got '{name}' of type "
                f"{type(table.features[name]).__name__}"
            )
        chosen[key] = name
    return chosen


def _texts(root: Path, table: Any, column: str) -> list[str]:
    """The values of a column as text; those of a ClassLabel by name.

    Raises:
        InputError: a row has none.
    """
    from datasets import ClassLabel

    kind = table.features.get(column)
    values = table.select_columns([column]).with_format(None)[:][column]
    known: Sequence[str] | None = kind.names if isinstance(kind, ClassLabel) else None
    for row, value in enumerate(values):
        if value is None or (known is not None and not 0 <= value < len(known)):
            raise InputError(
                f"{root}: expected a value in each row of column '{column}', got {value} in row "
                f"{row}; leave such rows out"
            )
    return [str(value) if known is None else known[value] for value in values]


def _images(root: Path, which: str, table: Any, column: str, size: int) -> EncodedImages:
    from datasets import Image

    where = f"{root}, {which}"
    encoded = table.select_columns([column]).with_format(None)
    return EncodedImages(
        partial(_read_rows, encoded.cast_column(column, Image(decode=False)), column, where),
        where,
        f"{signature(Path(each['filename']) for each in table.cache_files)} {column}",
        len(table),
        size,
    )


def _read_rows(table: Any, column: str, where: str, index: Indices) -> list[bytes]:
    """The encoded images of some rows.

    Args:
        table: the split.
        column: of the images.
        where: the split, for messages.
        index: (k,) rows.

    Raises:
        InputError: a row has none.
    """
    rows: list[Mapping[str, Any] | None] = table[index.tolist()][column]
    found: list[bytes] = []
    for row, each in zip(index.tolist(), rows, strict=True):
        if each is None or not isinstance(each["bytes"], bytes):
            raise InputError(
                f"{where}, row {row}: expected the image itself, got "
                f"{'nothing' if each is None else 'the path of a file'}; write the folder again "
                "with save_to_disk, which puts images into it"
            )
        found.append(each["bytes"])
    return found
