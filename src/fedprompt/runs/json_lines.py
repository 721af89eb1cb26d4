"""A file of JSON objects, one a line, that survives a process which ends within a line."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from fedprompt.core.errors import CheckpointError
from fedprompt.core.files import Json, atomic_write, json_ready

logger = logging.getLogger(__name__)


def append_line(path: Path, record: object) -> None:
    """Add one line and force it to disk; NaN is written as null."""
    line = json.dumps(json_ready(record)) + "\n"
    with path.open("ab+") as file:
        _close_last_line(file)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[Json]:
    """The records in order; a torn last line is left out, null stays None.

    Raises:
        CheckpointError: a line before the last is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    records: list[Json] = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number == len(lines):
            logger.warning("%s: line %d is torn and left out", path, number)
        else:
            raise CheckpointError(
                f"{path}: expected one JSON object with 'round' in line {number}, "
                f"got {line[:40]!r}; delete the line"
            )
    return records


def write_lines(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Replace the file's content."""
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in records))


def _parse(line: bytes) -> Json | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("round"), int) else None


def _close_last_line(file: BinaryIO, block: int = 1 << 16) -> None:
    """Make the next write start on a new line: end a whole last line, cut off a torn one.

    Only the end of the file is read, so that a round costs the same however many went before.
    """
    size = start = file.seek(0, os.SEEK_END)
    line = b""
    while start and b"\n" not in line:
        start = max(0, start - block)
        file.seek(start)
        line = file.read(size - start)
    start += line.rfind(b"\n") + 1
    if start == size:
        return
    file.seek(start)
    if _parse(file.read()) is not None:
        file.write(b"\n")
    else:
        file.truncate(start)
