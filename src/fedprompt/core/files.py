"""Files that are whole or absent, and values as JSON can hold them."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import math
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from fedprompt.core.errors import InputError

# Without it, on Windows, nothing is locked: let one run at a time compute features there.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

Json = dict[str, Any]
"""A JSON object."""

TEMPORARY_FILES = re.compile(r"\..+\.\d+\.tmp")


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` as a whole.

    A reader, or a crash, sees the old content or the new, never a part.

    Args:
        path: file in a folder that exists.
        content: new content; text is written as UTF-8.

    Raises:
        OSError: the file cannot be written; what was there before is untouched.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def new_name(name: str) -> str:
    """A name of a folder for something that starts now; no other start gets the same."""
    return f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def json_ready(value: Any) -> Any:
    """`value` in the types that strict JSON knows; NaN and the infinities become None.

    >>> json_ready({"accuracy": float("nan"), 3: (1, 2.5)})
    {'accuracy': None, '3': [1, 2.5]}

    Raises:
        InputError: JSON has no form for a value of this type.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: json_ready(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, tensors
        return json_ready(value.tolist())
    raise InputError(
        f"expected numbers, text, lists and mappings for a JSON file, got {type(value).__name__}; "
        "convert it first"
    )


def sync_folder(folder: Path) -> None:
    """Make a rename or removal in `folder` survive a power failure, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO[bytes] | int, exclusive: bool, wait: bool) -> bool:
    """Lock an open file until it is closed, or its process ends in whatever way.

    Args:
        file: open, or its descriptor.
        exclusive: True to write or delete; False to read beside other readers.
        wait: whether to wait for other holders.

    Returns:
        False if another holds it and `wait` is false.
    """
    if fcntl is None:
        return True
    flags = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, flags)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
