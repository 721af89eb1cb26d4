"""One writer a folder: a lock that ends with its process, in whatever way that ends.

The folder itself is locked, so that no file has to be left in it. A file system without locks, such
as some shared ones, lets everybody in.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedprompt.core.errors import ConfigError
from fedprompt.core.files import lock

PAUSE = 0.05


@contextmanager
def sole_writer(folder: Path, what: str = "run_dir", seconds: float = 0.0) -> Iterator[None]:
    """While entered, this process is the only one that writes in the folder.

    Args:
        folder: exists.
        what: the option that names it, for the message.
        seconds: how long to wait for another, which may be about to end.

    Raises:
        ConfigError: another process holds it.
    """
    if os.name != "posix":  # folders cannot be opened there
        yield
        return
    deadline = time.monotonic() + seconds
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        while not lock(descriptor, exclusive=True, wait=False):
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"{what} {folder}: expected a folder that no one writes in, got one that "
                    f"another process is at work in; wait for it or stop it, or use another {what}"
                )
            time.sleep(PAUSE)
        yield
    finally:
        os.close(descriptor)


def check_free(folder: Path, what: str = "run_dir") -> None:
    """Refuse a folder that another process writes in now; one that is not there is free.

    Raises:
        ConfigError: another process holds it.
    """
    if folder.is_dir() and os.access(folder, os.R_OK):
        with sole_writer(folder, what):
            pass
