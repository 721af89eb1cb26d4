"""Partitions on disk: who holds what, with the recipe that made it, to be used again.

A partition file is a NumPy archive (`.npz`, nothing pickled):

    indices  (n,) int64     the rows of the training split, client after client
    sizes    (clients,) int64   how many of them each client has
    recipe   text           JSON: name, options, seed, clients, samples, labels_sha256

`indices` and `sizes` are enough to read one, so that other programs can write it easily; what else
there is, is checked. Formats of other programs are in `data.partition.foreign`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt.core.errors import ConfigError
from fedprompt.core.files import Json
from fedprompt.data.partition.base import (
    Columns,
    Indices,
    Partitioner,
    WholePartitioner,
    partitioners,
)
from fedprompt.data.partition.foreign import is_foreign, read_foreign, resolve
from fedprompt.data.reading.bounded import read_arrays

FILE_NAME = "partition.npz"


@dataclasses.dataclass(frozen=True)
class SavedPartition:
    """What a partition file holds."""

    parts: list[Indices]
    recipe: Json
    """Empty when the file has none."""


def labels_digest(labels: Indices) -> str:
    """SHA-256 of the labels as little-endian int64: what a partition knows its data by."""
    return hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()


def make_recipe(
    name: str, options: Json, seed: int, parts: Sequence[Indices], labels: Indices
) -> Json:
    """How a partition came about and for which data; for a reloaded one, what its file says, too.

    Args:
        name: of the partitioner.
        options: of the partitioner.
        seed: of the run.
        parts: one index array per client.
        labels: (N,) of the training split.
    """
    recipe = {
        "name": name,
        "options": dict(options),
        "seed": seed,
        "clients": len(parts),
        "samples": len(labels),
        "labels_sha256": labels_digest(labels),
    }
    if name == "file":
        with contextlib.suppress(ConfigError):  # a run may overwrite the one that it reads from
            recipe["origin"] = read_partition(options["file"]).recipe
    return recipe


def partition_bytes(parts: Sequence[Indices], recipe: Mapping[str, object]) -> bytes:
    """The content of a partition file."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        indices=np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64),
        sizes=np.array([len(part) for part in parts], np.int64),
        recipe=np.array(json.dumps(recipe)),
    )
    return buffer.getvalue()


def read_partition(path: str | Path) -> SavedPartition:
    """Read a partition file, or that of a run directory.

    Raises:
        ConfigError: there is none, or it is damaged or no partition.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    if not file.is_file():
        raise ConfigError(
            f"partition.file: expected a run directory or its {FILE_NAME}, got {path}, "
            f"where there is no {'such file' if file == Path(path) else FILE_NAME}"
        )
    try:
        content = read_arrays(file)
        parts = _parts(content)
        recipe = json.loads(str(content["recipe"])) if "recipe" in content else {}
        if not isinstance(recipe, dict):
            raise ValueError(f"a recipe that is a {type(recipe).__name__}")
    except Exception as error:  # a damaged archive can raise anything
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"partition.file: expected a partition (.npz with `indices` and `sizes`) in {file}, "
            f"got {cause}"
        ) from error
    if "labels" in content and "labels_sha256" not in recipe:
        labels = content["labels"]
        recipe |= {"samples": len(labels), "labels_sha256": labels_digest(labels)}
    return SavedPartition(parts, recipe)


def _parts(content: Mapping[str, Any]) -> list[Indices]:
    """The clients' indices from the arrays of a file; ValueError if they are not what they should
    be.
    """
    indices, sizes = content["indices"], content["sizes"]
    for array in (indices, sizes):
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"an array of shape {array.shape} of {array.dtype}")
    if not len(sizes) or sizes.min() < 0 or sizes.sum() != len(indices):
        raise ValueError(f"{len(indices)} indices for clients of {sizes.sum()} in all")
    within = not len(indices) or 0 <= indices.min() <= indices.max() < 2**63
    if not within or len(np.unique(indices)) != len(indices):
        raise ValueError("an index that is out of range or comes twice")
    stops = np.cumsum(sizes).tolist()
    whole = indices.astype(np.int64)
    return [whole[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


@dataclasses.dataclass(frozen=True)
class FileOptions:
    """Options of `file`."""

    file: str | None = None
    """A run directory, or a partition file: ours, {client: [numbers or paths]} as JSON or `.npz`,
    or LEAF's JSON. Made absolute, so that the config holds anywhere."""

    def __post_init__(self) -> None:
        if self.file is not None:
            object.__setattr__(self, "file", str(Path(self.file).resolve()))


@partitioners.register("file", FileOptions)
def from_file(options: FileOptions) -> Partitioner:
    """The partition that a file holds, index by index; `partition.file=PATH` is enough to pick it.

    It must fit the labels of the training split and `clients.count`; the seed does not matter.
    """
    if options.file is None:
        raise ConfigError(
            "partition.file: expected the path of a run directory or a partition file, got nothing;"
            " set partition.file=runs/NAME"
        )
    file = options.file
    if is_foreign(Path(file)):
        foreign = read_foreign(Path(file))

        def divide_foreign(columns: Columns, num_clients: int, seed: int) -> list[Indices]:
            _check_count(file, len(foreign.clients), num_clients)
            return resolve(foreign, columns, file)

        return WholePartitioner(divide_foreign, listed=foreign.listed)
    saved = read_partition(file)

    def divide(columns: Columns, num_clients: int, seed: int) -> list[Indices]:
        check_fits(saved, columns.labels, file)
        _check_count(file, len(saved.parts), num_clients)
        return [part.copy() for part in saved.parts]

    return WholePartitioner(divide, by_owner=_went_by_owner(saved.recipe))


def _check_count(file: str, expected: int, num_clients: int) -> None:
    if expected != num_clients:
        raise ConfigError(
            f"clients.count: the partition in {file} is for {expected} clients, got {num_clients}; "
            f"set clients.count={expected}"
        )


def _went_by_owner(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe, or the one that it was read with, is that of `natural` by clients."""
    origin, options = recipe.get("origin"), recipe.get("options")
    if isinstance(origin, Mapping):
        return _went_by_owner(origin)
    by = options.get("by") if isinstance(options, Mapping) else None
    return recipe.get("name") == "natural" and by in ("auto", "client")


def check_fits(saved: SavedPartition, labels: Indices, path: str) -> None:
    """Refuse a partition of other data.

    Args:
        saved: what the file holds.
        labels: (N,) classes of the training split.
        path: of the file, for messages.

    Raises:
        ConfigError: says what differs.
    """
    made_for = saved.recipe.get("samples", len(labels))
    if made_for != len(labels):
        raise ConfigError(
            f"partition.file: {path} divides {made_for} samples, but the training split has "
            f"{len(labels)}; use the data that it was made for"
        )
    largest = max((int(part.max()) for part in saved.parts if len(part)), default=-1)
    if largest >= len(labels):
        raise ConfigError(
            f"partition.file: {path} holds sample {largest}, but the training split ends at "
            f"{len(labels) - 1}; use the data that it was made for"
        )
    digest = saved.recipe.get("labels_sha256")
    if digest not in (None, labels_digest(labels)):
        raise ConfigError(
            f"partition.file: {path} was made for other labels (expected sha256 "
            f"{str(digest)[:12]}, got {labels_digest(labels)[:12]}); use the data that it was made "
            "for, with the same options"
        )
