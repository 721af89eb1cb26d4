"""One entry of the prefix cache: a folder with an `.npy` file per array and a JSON header.

An entry is written into a temporary folder beside its place and renamed when it is whole and on
disk, so that there are no half entries. Reading checks the header's own checksum and each file's
size, shape and time of writing; a file that was touched since is read through and compared with
its SHA-256. Nothing is pickled.

Whoever has an entry open holds a shared lock on its header, which ends with the process; see
`in_use`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.core.errors import InputError
from fedprompt.core.files import Json, lock
from fedprompt.data.prefix.tables import ARRAYS, Chunk, FeatureTable

npy: Any = np.lib.format
Rows = NDArray[Any]
"""Images' rows of an array; the type of its numbers is the array's own."""

FORMAT = 3
HEADER = "header.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a table is mapped from."""

    path: Path
    lease: int
    """Descriptor of the open header, whose lock keeps the entry from being deleted as long as a
    table refers to it.
    """

    def __del__(self) -> None:
        os.close(self.lease)

    def reopen(self) -> tuple[Callable[..., FeatureTable], tuple[object, ...]]:
        """How another process of this machine opens the table."""
        return reopen_entry, (str(self.path),)


# ---------------------------------------------------------------- locks


def in_use(path: Path) -> bool:
    """Whether this or another process has an entry open."""
    try:
        with (path / HEADER).open("rb") as header:
            return not lock(header, exclusive=True, wait=False)
    except OSError:  # damaged: no one has it open
        return False


def remove_entry(path: Path, even_in_use: bool = False) -> bool:
    """Delete an entry at once; processes that have its files mapped keep them.

    Returns:
        False if it is in use, by this process or another, and was left alone.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # damaged: no one has it
            header = stack.enter_context((path / HEADER).open("rb"))
            if not lock(header, exclusive=True, wait=False) and not even_in_use:
                return False
        # Out of sight in one step: no one finds it half deleted.
        dead = path.with_name(f".old-{path.name}-{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            path.rename(dead)
        if dead.is_dir():
            shutil.rmtree(dead, ignore_errors=True)
        else:
            dead.unlink(missing_ok=True)
    return True


# ---------------------------------------------------------------- writing


def write_entry(
    path: Path,
    recipe: Json,
    dtype: str,
    chunks: Iterator[Chunk],
    known: dict[str, NDArray[np.int64]],
    make_room: Callable[[int], None],
) -> Generator[int, None, IO[bytes]]:
    """Write an entry chunk by chunk; nothing is left behind if that fails.

    The caller holds the lock of the entry's key.

    Args:
        path: the entry's folder, named by its key; it must not exist.
        recipe: what the key stands for, kept for the reader; `cut` says which block the tokens
            enter.
        dtype: how tokens are kept.
        chunks: of the whole split.
        known: the arrays that need not be computed, `labels` and `groups`: (N,) each.
        make_room: called with the number of bytes to come, before they are written.

    Yields:
        How many images are written.

    Returns:
        The open header, whose lock keeps the entry from being deleted until it is closed.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    unfinished = path.with_name(f".new-{path.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir()
    try:
        arrays = yield from _write_arrays(unfinished, chunks, known, make_room)
        body = {
            "format": FORMAT,
            "key": path.name,
            "dtype": dtype,
            "arrays": arrays,
            "recipe": recipe,
        }
        with (unfinished / HEADER).open("wb") as file:
            file.write(json.dumps({**body, "sha256": _digest_of(body)}, indent=1).encode())
            _to_disk(file)
        _folder_to_disk(unfinished)
        held = (unfinished / HEADER).open("rb")
        try:
            lock(held, exclusive=False, wait=True)
            unfinished.rename(path)
        except BaseException:
            held.close()
            raise
        _folder_to_disk(path.parent)
        return held
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_arrays(
    folder: Path,
    chunks: Iterator[Chunk],
    known: dict[str, NDArray[np.int64]],
    make_room: Callable[[int], None],
) -> Generator[int, None, dict[str, Json]]:
    """Write all files and describe each; says how many images are written."""
    first = next(chunks)
    samples = {**vars(first), **known}
    count = len(known["labels"])
    make_room(sum(count * each[0].nbytes for each in samples.values()))
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(_ArrayWriter(folder / f"{name}.npy", count, samples[name]))
            for name in ARRAYS
        }
        for name, rows in samples.items():
            writers[name].append(rows)
        written = len(first.features)
        yield written
        for chunk in chunks:
            for name, rows in vars(chunk).items():
                writers[name].append(rows)
            written += len(chunk.features)
            yield written
        for writer in writers.values():
            _to_disk(writer.file)
    return {name: writer.describe() for name, writer in writers.items()}


class _ArrayWriter:
    """An `.npy` file that grows by rows.

    Written as an ordinary file: when the disk is full, that raises an error, whereas writing to a
    memory-mapped one ends the process.
    """

    def __init__(self, path: Path, count: int, sample: Rows) -> None:
        self.path = path
        self.shape = (count, *sample.shape[1:])
        self.dtype = sample.dtype
        self.digest = hashlib.sha256()
        self.file = path.open("xb")
        header = io.BytesIO()
        npy.write_array_header_1_0(
            header,
            {
                "descr": npy.dtype_to_descr(sample.dtype),
                "fortran_order": False,
                "shape": self.shape,
            },
        )
        self._write(header.getbuffer())

    def __enter__(self) -> _ArrayWriter:
        return self

    def __exit__(self, *details: object) -> None:
        self.file.close()

    def append(self, rows: Rows) -> None:
        """Write some rows."""
        self._write(np.ascontiguousarray(rows, self.dtype).data.cast("B"))

    def describe(self) -> Json:
        """What the header says about the closed file."""
        status = self.path.stat()
        return {
            "shape": list(self.shape),
            "dtype": str(self.dtype),
            "bytes": status.st_size,
            "written_ns": status.st_mtime_ns,
            "sha256": self.digest.hexdigest(),
        }

    def _write(self, data: memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    """Make names durable; not every system can open a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------- reading


def open_entry(path: Path, verify: bool = False) -> FeatureTable:
    """Map an entry into memory, and note that it was used.

    Args:
        path: the entry's folder.
        verify: read all files through and compare them with their SHA-256, even if nothing has
            touched them since they were written.

    Raises:
        FileNotFoundError: there is no such entry.
        InputError: it is damaged; the message says how.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    if not path.is_dir():
        raise InputError("it is no folder")
    try:
        lease = os.open(path / HEADER, os.O_RDONLY)
    except FileNotFoundError:
        raise InputError(f"{HEADER} is missing") from None
    try:
        lock(lease, exclusive=False, wait=True)
        header = _read_header(lease, path.name)
        arrays: Json = {
            name: _open_array(path, name, header["arrays"][name], verify) for name in ARRAYS
        }
        table = FeatureTable(**arrays, dtype=header["dtype"], cut=header["recipe"]["cut"])
        object.__setattr__(table, "entry", Entry(path, lease))
    except BaseException:
        os.close(lease)
        raise
    with contextlib.suppress(OSError):  # a cache that can only be read
        os.utime(path)
    return table


def reopen_entry(path: str) -> FeatureTable:
    """Open the entry of a table that another process of this machine has open.

    Raises:
        InputError: it is gone or damaged.
    """
    try:
        return open_entry(Path(path))
    except (FileNotFoundError, InputError) as error:
        cause = "it is gone" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(
            f"cache entry {path}: expected the features that this run began with, but {cause}; "
            "leave the cache alone while a run is going, and continue it with --resume"
        ) from error


def _read_header(descriptor: int, key: str) -> Json:
    try:
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            header = json.loads(file.read())
        expected = header.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{HEADER} is not readable") from None
    if _digest_of(header) != expected:
        raise InputError(f"{HEADER} does not match its checksum")
    if (header["format"], header["key"]) != (FORMAT, key):
        raise InputError(f"{HEADER} is that of another entry")
    return dict(header)


def _open_array(path: Path, name: str, expected: Json, verify: bool) -> Rows:
    file = path / f"{name}.npy"
    try:
        status = file.stat()
        if status.st_size != expected["bytes"]:
            raise InputError(
                f"{file.name} has {status.st_size} bytes instead of {expected['bytes']}"
            )
        touched = status.st_mtime_ns != expected["written_ns"]
        if touched or verify:
            if _digest_of_file(file) != expected["sha256"]:
                raise InputError(f"{file.name} does not match its checksum")
            with contextlib.suppress(OSError):  # so that the next reader need not do it again
                os.utime(file, ns=(expected["written_ns"], expected["written_ns"]))
        array: Rows = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file.name} is not readable ({error})") from error
    if (list(array.shape), str(array.dtype)) != (expected["shape"], expected["dtype"]):
        raise InputError(f"{file.name} holds {array.shape} {array.dtype}")
    return array


def _digest_of(body: Json) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
