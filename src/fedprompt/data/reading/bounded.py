"""Archives of arrays, and JSON, of unknown origin: every length is checked before it is read."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedprompt.data.reading.raster import check_size, file_size

MAX_BYTES = 1 << 28
"""Of the arrays of an archive together: 256 MB, 33 million indices."""
MAX_ARRAYS = 1_000_000
MAX_JSON = 1 << 26
"""Of a JSON file: 64 MB, some 9 million indices."""


def array_names(path: Path) -> list[str]:
    """Names of the arrays in a `.npz` archive.

    Raises:
        ValueError: no archive, or too many arrays.
        OSError: the file cannot be read.
    """
    with _archive(path) as archive:
        return [member.filename.removesuffix(".npy") for member in archive.infolist()]


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of a `.npz` archive; nothing is unpickled.

    Raises:
        ValueError: an array is pickled, damaged, there twice or of another length than its header
            says; or they are too many or too large.
        OSError: the file cannot be read.
    """
    content: dict[str, NDArray[Any]] = {}
    with _archive(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
        check_size(max(total, 1), MAX_BYTES)
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in content:
                raise ValueError(f"two arrays '{name}'")
            with archive.open(member) as stream:
                version = npy.read_magic(stream)  # type: ignore[no-untyped-call]
                read_header = {
                    (1, 0): npy.read_array_header_1_0,
                    (2, 0): npy.read_array_header_2_0,
                }.get(version)
                if read_header is None:
                    raise ValueError(f"an array of version {version}")
                shape, fortran, dtype = read_header(stream)  # type: ignore[no-untyped-call]
                if dtype.hasobject:
                    raise ValueError("pickled objects, which are not read")
                promised = math.prod(shape) * dtype.itemsize
                found = member.file_size - stream.tell()
                if promised != found or not dtype.itemsize:
                    raise ValueError(f"an array '{name}' of {promised} bytes in {found}")
                values = np.frombuffer(stream.read(promised), dtype)
                content[name] = values.reshape(shape, order="F" if fortran else "C")
    return content


def _archive(path: Path) -> zipfile.ZipFile:
    check_size(file_size(path), MAX_BYTES)
    with path.open("rb") as stream:
        if stream.read(6) == npy.MAGIC_PREFIX:
            raise ValueError("one array and no archive")
    archive = zipfile.ZipFile(path)
    if len(archive.infolist()) > MAX_ARRAYS:
        archive.close()
        raise ValueError(f"{len(archive.infolist())} arrays, more than {MAX_ARRAYS}")
    return archive


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: no JSON, too long, or a key is there twice.
        RecursionError: too deep.
        OSError: the file cannot be read.
    """
    check_size(file_size(path), MAX_JSON)
    return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{twice[:40]}' twice")
    return found
