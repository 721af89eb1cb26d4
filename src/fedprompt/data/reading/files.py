"""Files of published data sets: where they are looked for, and readers that trust none of them.

Nothing is downloaded. A data set that is not there gives one line that says which folder was looked
at, which files were expected in it and where they come from.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import logging
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.reading.archives import unpack

logger = logging.getLogger(__name__)

ENVIRONMENT = "FEDPROMPT_DATA"
"""Environment variable: the folder that holds one folder for each data set."""

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".svg", ".tif", ".tiff", ".webp"}
)

SYSTEM_FOLDERS = frozenset(
    {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
)
"""Folders that systems put beside a user's files, in small letters; some hold copies of images."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way in which a publisher lays out a data set."""

    files: tuple[str, ...]
    """What must be there; a folder ends in `/`."""
    folders: tuple[str, ...] = ()
    """Folders below the root that may hold the files; the root itself always may."""
    archives: tuple[str, ...] = ()
    """Archives in the root that hold the first of `folders`."""
    packed: bool = False
    """Whether each file may be there with `.gz`."""


def data_folder(root: str | None, name: str) -> Path:
    """Where a data set is looked for: `root`, else `$FEDPROMPT_DATA/name`, else `data/name`."""
    return Path(root).absolute() if root else data_home() / name


def data_home() -> Path:
    """The folder that holds one folder for each data set."""
    return Path(os.environ.get(ENVIRONMENT) or "data").expanduser().absolute()


def locate(name: str, root: Path, layouts: Sequence[Layout], source: str) -> tuple[Path, Layout]:
    """The folder that holds a data set, and its layout; an archive is unpacked if it must be.

    Args:
        name: of the data set.
        root: the folder to look into.
        layouts: those that can be read, the preferred one first.
        source: where the files come from, in words.

    Raises:
        ConfigError: the data set is not there, or some of its files are not.
        InputError: its archive cannot be unpacked, or holds something else.
    """
    found = _find(name, root, layouts, source)
    if found is not None:
        return found
    for layout in layouts:
        for archive in (root / each for each in layout.archives):
            if not archive.is_file():
                continue
            folder = root / layout.folders[0]
            if not folder.is_dir() or not any(folder.iterdir()):
                logger.info("unpacking %s", archive)
                unpack(archive, layout.folders[0])
            found = _find(name, root, layouts, source)  # another process may have unpacked it, too
            if found is not None:
                return found
            raise InputError(
                f"{name}: expected {', '.join(layout.files)} in {folder}, got none of them; remove "
                f"that folder to have {archive.name} unpacked, or get the archive again from "
                f"{source}"
            )
    expected = " or ".join(", ".join(layout.files) for layout in layouts)
    archives = [archive for layout in layouts for archive in layout.archives]
    packed = f", or {' or '.join(archives)}" if archives else ""
    raise ConfigError(
        f"{name}: no data in {root}: expected {expected}{packed}; get it from {source} and put it "
        f"there, or say where it is with data.root=FOLDER or the environment variable {ENVIRONMENT}"
    )


def _find(
    name: str, root: Path, layouts: Sequence[Layout], source: str
) -> tuple[Path, Layout] | None:
    """The first layout that is there as a whole, or None if nothing is there.

    Raises:
        ConfigError: some files of one are there, some are not.
    """
    for layout in layouts:
        for inner in ("", *layout.folders):
            folder = root / inner
            absent = [file for file in layout.files if not is_present(folder, file, layout.packed)]
            if not absent:
                return folder, layout
            if len(absent) < len(layout.files):
                raise ConfigError(
                    f"{name}: {', '.join(absent)} missing in {folder}: expected "
                    f"{', '.join(layout.files)} there; get the files from {source}"
                )
    return None


def is_present(folder: Path, file: str, packed: bool = False) -> bool:
    """Whether a folder holds a folder (`name/`) or a file, plain or, if `packed`, with `.gz`.

    Args:
        folder: where to look.
        file: the name; one that ends with `/` is that of a folder.
        packed: whether `.gz` behind the name will do.
    """
    path = folder / file
    if file.endswith("/"):
        return path.is_dir()
    return (plain_or_gz(path) if packed else path).is_file()


def plain_or_gz(path: Path) -> Path:
    """The path, or the one with `.gz` if only that exists."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.is_file() else path


def signature(paths: Iterable[Path]) -> str:
    """SHA-256 over paths, sizes and times of files: another one whenever a file was changed."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        text = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(text.encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of unsigned bytes in an idx file, LeCun's format of MNIST.

    Two zero bytes, 8 for unsigned bytes, the number of dimensions; each dimension in four bytes,
    the highest first; the values.

    Args:
        path: the file; it is decompressed if its name ends in `.gz`, else mapped into memory.
        dimensions: expected number of them.

    Raises:
        InputError: the header is another one, or the file is shorter or longer than it says.
    """
    length = 4 + 4 * dimensions
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(length)
            if len(header) < length or header[:4] != bytes([0, 0, 8, dimensions]):
                raise InputError(
                    f"{path}: expected an idx file of unsigned bytes with {dimensions} "
                    f"dimension(s), got the header {header[:4].hex() or '(empty)'}; "
                    "get the file again"
                )
            shape = tuple(int(each) for each in np.frombuffer(header[4:], ">u4"))
            expected = math.prod(shape)
            # In pieces, so that a header that promises too much costs no memory.
            data = _read_at_most(file, expected + 1) if path.suffix == ".gz" else None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); get the file again") from error
    found = path.stat().st_size - length if data is None else len(data)
    if found != expected:
        more = "at least " if data is not None and found > expected else ""
        raise InputError(
            f"{path}: its header promises {' x '.join(map(str, shape))} = {expected} bytes of "
            f"values, got {more}{found}; get the file again"
        )
    if data is not None:
        return np.frombuffer(data, np.uint8).reshape(shape)
    if expected == 0:
        return np.zeros(shape, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, mode="r", offset=length, shape=shape))


def _read_at_most(file: IO[bytes] | gzip.GzipFile, count: int) -> bytes:
    pieces: list[bytes] = []
    while count > 0 and (piece := file.read(min(count, 1 << 24))):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not empty.

    Raises:
        InputError: the file cannot be read as text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error})") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def read_list(path: Path, first_label: int = 0) -> tuple[list[str], NDArray[np.int64]]:
    """A list file: each line a path, a space and an integer label.

    Args:
        path: the list.
        first_label: the number of the first class; labels are returned from 0.

    Returns:
        Paths as they are written, and labels (N,).

    Raises:
        InputError: a line is another one, a label is too small, or there is no line.
    """
    names: list[str] = []
    labels: list[int] = []
    for number, line in read_lines(path):
        name, _, label = line.rpartition(" ")
        if not name.strip() or not label.isdecimal() or int(label) < first_label:
            raise InputError(
                f"{path}, line {number}: expected a path and a label >= {first_label}, got {line!r}"
            )
        names.append(name.strip())
        labels.append(int(label) - first_label)
    if not names:
        raise InputError(f"{path}: expected lines of a path and a label, got an empty file")
    return names, np.array(labels, np.int64)


def check_labels(path: Path, labels: NDArray[np.integer], num_classes: int, first: int = 0) -> None:
    """Refuse a label that no class has, and name the sample.

    Args:
        path: of the file, for the message.
        labels: (N,) classes, counted from 0.
        num_classes: how many classes there are.
        first: what the file calls class 0, for the message.

    Raises:
        InputError: a label lies outside 0..num_classes-1.
    """
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        sample = int(wrong.argmax())
        raise InputError(
            f"{path}: labels must lie in {first}..{first + num_classes - 1}, got "
            f"{int(labels[sample]) + first} for image {sample}; get the file again"
        )


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no data: its name begins with a dot, or a system made it.

    >>> [is_hidden(name) for name in (".DS_Store", "__MACOSX", ".ipynb_checkpoints", "cat")]
    [True, True, True, False]
    """
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, in alphabetical order; hidden ones are no classes."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)
        )


def check_same_names(path: Path, listed: Sequence[str], folder: Path) -> None:
    """Refuse a list that does not name each image of a folder once.

    Args:
        path: of the list, for the message.
        listed: the names that it holds.
        folder: whose images they should be.

    Raises:
        InputError: counts, and the first name that one of them lacks.
    """
    found = image_names(folder)
    if sorted(listed) == found:
        return
    different = sorted(set(listed) ^ set(found)) or ["(a name is listed twice)"]
    raise InputError(
        f"{path}: expected one line for each image in {folder}, got {len(listed)} lines and "
        f"{len(found)} images that differ in {different[0]}; get the files again"
    )


def is_image_name(name: str) -> bool:
    """Whether a file's name is that of an image, and the file not hidden."""
    return f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES and not is_hidden(name)


def image_names(folder: Path) -> list[str]:
    """Names of the image files in a folder and those below it, sorted, with `/` between parts.

    What is hidden is left out, and what is in hidden folders.
    """
    names: list[str] = []
    for directory, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        inner = Path(directory).relative_to(folder).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        names += [f"{prefix}{file}" for file in files if is_image_name(file)]
    return sorted(names)
