"""Where the prefix cache is and what it holds.

Without torch: `fedprompt doctor` must report on a machine whose torch is broken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from pathlib import Path

ENTRY_NAME = re.compile(r"[0-9a-f]{64}")
"""Nothing else in the folder is the cache's, and nothing else is counted or deleted."""


@dataclasses.dataclass(frozen=True)
class StoredEntry:
    """An entry as a listing shows it."""

    path: Path
    size: int
    """Bytes."""
    used: float
    """When it was last opened or written, in seconds since 1970."""


def cache_folder(folder: str | None = None) -> Path:
    """Where the cache is, by option, environment or the system's habit; it need not exist."""
    chosen = folder or os.environ.get("FEDPROMPT_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    if sys.platform == "darwin":
        home = "~/Library/Caches"
    elif sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    return Path(home).expanduser() / "fedprompt"


def cache_entries(folder: Path | None = None) -> list[StoredEntry]:
    """All entries, those not used for longest first.

    Raises:
        OSError: the folder lies below one that must not be read.
    """
    found = []
    for path in named(folder or cache_folder(), ENTRY_NAME):
        with contextlib.suppress(OSError):  # just deleted, or no folder
            size = sum(file.stat().st_size for file in path.iterdir())
            found.append(StoredEntry(path, size, path.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def named(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """What a folder holds under names of a kind; nothing if it is not there.

    Raises:
        OSError: it lies below a folder that must not be read.
    """
    return [path for path in folder.glob("*") if names.fullmatch(path.name)]


def cache_size(folder: Path | None = None) -> int:
    """Bytes of all entries."""
    return sum(entry.size for entry in cache_entries(folder))
