"""The prefix cache: feature tables on disk, so that a later run need not compute them again.

An entry is known by its content: a SHA-256 over all that decides its bits (see `PrefixCache.key`).
Of several processes that want the same entry, one computes and the others wait. Entries that were
not used for longest are deleted when the cache would outgrow its limit. The folder may be deleted
whenever no run is going.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import logging
import re
import shutil
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import nn

from fedprompt.core.checks import check_choice
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.core.files import Json, lock
from fedprompt.core.steps import done
from fedprompt.data.prefix import tables
from fedprompt.data.prefix.entries import (
    FORMAT,
    in_use,
    open_entry,
    remove_entry,
    write_entry,
)
from fedprompt.data.prefix.listing import (
    ENTRY_NAME,
    StoredEntry,
    cache_entries,
    cache_folder,
    cache_size,
    named,
)
from fedprompt.data.prefix.tables import (
    CHUNK,
    DTYPES,
    Encoder,
    FeatureTable,
    compute_chunks,
    compute_table,
)
from fedprompt.data.task import Split, fingerprint

__all__ = [
    "CHUNK",
    "CacheOptions",
    "FeatureTable",
    "PrefixCache",
    "StoredEntry",
    "cache_entries",
    "cache_folder",
    "cache_size",
    "compute_table",
]

logger = logging.getLogger(__name__)

GB = 10**9
REMAINS = re.compile(rf"\.(new-{ENTRY_NAME.pattern}|old-{ENTRY_NAME.pattern}-\d+)")


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """The `cache` section. Only `dtype` can change a result."""

    enabled: bool = True
    """False computes the features in memory, for every run anew."""
    folder: str | None = None
    """null means the environment's FEDPROMPT_CACHE, or else `fedprompt` in the user's cache
    folder.
    """
    limit_gb: float = 50.0
    """Size in 10^9 bytes beyond which the entries not used for longest are deleted."""
    dtype: str = "float32"
    """How tokens are kept; the shorter types need half the space and round them."""
    verify: bool = False
    """Compare every file with its SHA-256 at each run, not only those touched since they were
    written.
    """

    def __post_init__(self) -> None:
        check_choice("cache.dtype", self.dtype, DTYPES)
        if not self.limit_gb > 0:
            raise ConfigError(f"cache.limit_gb: expected a number above 0, got {self.limit_gb}")
        if self.folder is not None and not self.folder.strip():
            raise ConfigError("cache.folder: expected a folder or null, got an empty text")


class PrefixCache:
    """Feature tables of one backbone.

    Args:
        encoder: a frozen backbone on `device`.
        device: where to compute.
        options: where and how tables are kept.

    `notes` collects what the user should read: an entry that was damaged, a cache that cannot be
    written.
    """

    def __init__(self, encoder: Encoder, device: torch.device, options: CacheOptions) -> None:
        self.encoder = encoder
        self.device = device
        self.options = options
        self.folder = cache_folder(options.folder)
        self.notes: list[str] = []
        self._identity = {
            "format": FORMAT,
            "chunk": CHUNK,
            "dtype": options.dtype,
            "cut": encoder.cut,
            "encoder": encoder_identity(encoder),
            "machine": machine_identity(device),
        }

    def table(self, split: Split) -> FeatureTable:
        """The table of a split: opened if it is there, else computed and kept.

        Raises:
            ConfigError: the disk is full, or the table alone is larger than the cache may be.
        """
        return done(self.steps(split))

    def steps(self, split: Split) -> Generator[int, None, FeatureTable]:
        """The same as `table`, and on the way how many images are done: 0 before the first ones
        are computed; nothing if the table is there.
        """
        if not self.options.enabled:
            yield 0
            return self._compute(split)
        recipe = self.recipe(split)
        path = self.folder / self.key(recipe)
        table = self._open(path)
        if table is not None:
            return table
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_writer_lock(self.folder, path.name))
            except OSError as error:
                if error.errno in _FULL:
                    raise self._full(split) from error
                self._note(
                    f"the features are not kept: cache folder {self.folder} cannot be written "
                    f"({error.strerror}); set cache.folder or FEDPROMPT_CACHE to one that can"
                )
                yield 0
                return self._compute(split)
            # Another process may have made it while this one waited.
            table = self._open(path, say_why=True)
            if table is None:
                # Held until it is open, so that no other process deletes it in between.
                yield 0
                with (yield from self._write(path, recipe, split)):
                    table = open_entry(path)
        return table

    def recipe(self, split: Split) -> Json:
        """All that decides the bits of a table, as plain values; `header.json` shows it."""
        labels = np.stack([split.labels, split.groups]).astype("<i8")
        return {
            **self._identity,
            "images": fingerprint(split.images),
            "shape": list(split.images.shape),
            "labels": hashlib.sha256(labels.tobytes()).hexdigest(),
        }

    @staticmethod
    def key(recipe: Json) -> str:
        """Name of an entry: the SHA-256 of its recipe."""
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()

    def _compute(self, split: Split) -> FeatureTable:
        return compute_table(self.encoder, split, self.device, self.options.dtype)

    def _open(self, path: Path, say_why: bool = False) -> FeatureTable | None:
        """The table of an entry; None if there is none that can be used."""
        try:
            return open_entry(path, self.options.verify)
        except FileNotFoundError:
            return None
        except (InputError, OSError) as error:
            if say_why:
                self._note(f"cache entry {path} was damaged ({error}) and was computed again")
            return None

    def _write(self, path: Path, recipe: Json, split: Split) -> Generator[int, None, IO[bytes]]:
        """Compute and write an entry; it is in use as long as the returned file is open."""
        remove_entry(path, even_in_use=True)  # damaged
        logger.info("computing the features of %d images for %s", len(split), path)

        def make_room(size: int) -> None:
            remove_unfinished(self.folder, path.name)
            self._make_room(size, split)

        try:
            return (
                yield from write_entry(
                    path,
                    recipe,
                    self.options.dtype,
                    compute_chunks(self.encoder, split, self.device, self.options.dtype),
                    {name: getattr(split, name).astype(np.int64) for name in ("labels", "groups")},
                    make_room,
                )
            )
        except OSError as error:
            if error.errno in _FULL:
                raise self._full(split) from error
            raise

    def _make_room(self, size: int, split: Split) -> None:
        """Delete old entries until `size` bytes more are within the limit and fit on the disk."""
        limit = self.options.limit_gb * GB
        if size > limit:
            raise ConfigError(
                f"cache.limit_gb: the features of {len(split)} images take {_gb(size)}, more than "
                f"the limit of {_gb(limit)}; raise it, halve them with cache.dtype=float16, or "
                "compute them in memory with cache.enabled=false"
            )
        stored = cache_entries(self.folder)
        total = sum(entry.size for entry in stored)
        unused = sum(entry.size for entry in stored if not in_use(entry.path))
        if shutil.disk_usage(self.folder).free + unused < size:
            raise self._full(split, size)  # before anything is deleted in vain
        for entry in stored:
            if total + size <= limit and shutil.disk_usage(self.folder).free >= size:
                return
            if remove_entry(entry.path):
                total -= entry.size
        if total + size > limit:
            self._note(
                f"cache folder {self.folder} grows beyond cache.limit_gb={self.options.limit_gb:g},"
                " because everything in it is in use"
            )
        if shutil.disk_usage(self.folder).free < size:
            raise self._full(split, size)

    def _full(self, split: Split, size: int | None = None) -> ConfigError:
        needed = "" if size is None else f" ({_gb(size)})"
        with contextlib.suppress(OSError):
            needed += f"; {_gb(shutil.disk_usage(self.folder).free)} are free"
        return ConfigError(
            f"cache.folder: the disk of {self.folder} has no room for the features of {len(split)} "
            f"images{needed}; free some, name another folder, halve them with "
            "cache.dtype=float16, or compute them in memory with cache.enabled=false"
        )

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            logger.warning("%s", text)


_FULL = (errno.ENOSPC, errno.EDQUOT)


def encoder_identity(encoder: Encoder) -> Json:
    """What an encoder computes with: weights, plain settings, buffers, and the source of its code.

    Settings are found, not listed, so that a new one cannot be forgotten.
    """
    settings = {
        name: repr(value)
        for name, value in sorted(vars(encoder).items())
        if name != "training" and (_is_plain(value) or dataclasses.is_dataclass(value))
    }
    buffers = {}
    if isinstance(encoder, nn.Module):
        for name, buffer in encoder.named_buffers():
            content = buffer.detach().cpu().contiguous().numpy()
            buffers[name] = hashlib.sha256(content.tobytes()).hexdigest()
    return {
        "class": f"{type(encoder).__module__}.{type(encoder).__qualname__}",
        "weights": encoder.checksum(),
        "settings": settings,
        "buffers": buffers,
        "source": _source_digest(type(encoder).__module__),
    }


def machine_identity(device: torch.device) -> Json:
    """What changes bits besides the encoder: versions, device, instruction set, threads."""
    cuda = device.type == "cuda"
    return {
        "versions": {name: _version(name) for name in ("torch", "torchvision", "timm")},
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
    }


def remove_unfinished(folder: Path, own: str = "") -> None:
    """Delete what killed processes have left behind, but not what the key `own` is writing."""
    for path in named(folder, REMAINS):
        key = path.name.removeprefix(".new-")
        if path.name.startswith(".old-"):
            shutil.rmtree(path, ignore_errors=True)
        elif key != own:
            with contextlib.suppress(OSError), _writer_lock(folder, key, wait=False):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _writer_lock(folder: Path, key: str, wait: bool = True) -> Iterator[None]:
    """Held by the one process that writes an entry; some keys share a lock file.

    Raises:
        BlockingIOError: another process has it, and `wait` is false.
        OSError: the folder cannot be written to.
    """
    locks = folder / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / key[:2]).open("wb") as file:
        if not lock(file, exclusive=True, wait=False):
            if not wait:
                raise BlockingIOError(errno.EAGAIN, "locked", str(file.name))
            logger.info("waiting for another process that computes features in %s", folder)
            lock(file, exclusive=True, wait=True)
        yield


def _source_digest(module: str) -> str:
    """SHA-256 over the code that computes a table: an encoder's package, and `tables`."""
    file = getattr(sys.modules.get(module), "__file__", None)
    files = [Path(tables.__file__)]
    if file is not None:
        package = bool(sys.modules[module].__package__)
        files += sorted(Path(file).parent.glob("*.py")) if package else [Path(file)]
    digest = hashlib.sha256()
    for each in files:
        digest.update(each.name.encode() + b"\0" + each.read_bytes())
    return digest.hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _gb(size: float) -> str:
    return f"{size / GB:.3g} GB"
