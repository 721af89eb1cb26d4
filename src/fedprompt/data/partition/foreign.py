"""Partitions that other programs wrote: who holds which image, by number or by path.

    {client: [numbers or paths]}        JSON; also below a key `client_dict`, as FedLab calls it
    client -> array of numbers          `.npz`, one array for each client
    users, num_samples, user_data       LEAF's JSON (Caldas et al., arXiv 1812.01097), one file or
                                        a folder of them, where `x` holds paths or numbers

FedLab's dictionary becomes such an archive with
`np.savez(file, **{str(c): ids for c, ids in client_dict.items()})`.

Numbers are positions in the training split as its publisher orders it, before validation images are
cut out of it (`data.task.Origin`). Pickles are not read: a pickle can run a program.
"""

from __future__ import annotations

import dataclasses
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt.core.errors import ConfigError
from fedprompt.data.partition.base import Columns, Indices
from fedprompt.data.reading.bounded import array_names, read_arrays, read_json
from fedprompt.data.reading.files import is_hidden
from fedprompt.data.task import Origin

WRAPPERS = ("client_dict", "data_indices")
"""Keys below which FedLab's programs keep {client: indices}."""
PICKLES = frozenset({".pkl", ".pickle", ".npy", ".pt", ".pth"})


@dataclasses.dataclass(frozen=True)
class ForeignPartition:
    """What such a file says, before it is compared with the data."""

    clients: tuple[str, ...]
    """By number if all are numbers, else in the order of the file."""
    members: tuple[Sequence[int] | Sequence[str], ...]
    """Of each client: numbers or paths; one kind in all."""
    labels: tuple[Sequence[Any], ...] | None = None
    """Of each client: the file's labels, where it has any."""

    @property
    def listed(self) -> int:
        """How many images are listed."""
        return sum(map(len, self.members))


def is_foreign(path: Path) -> bool:
    """Whether a path looks like another program's partition: JSON, a folder of JSON files, an
    archive without our two arrays, or a pickle (which is then refused).
    """
    if path.is_dir():
        return bool(_json_files(path)) and not (path / "manifest.json").exists()
    if path.suffix.lower() == ".json" or path.suffix.lower() in PICKLES:
        return path.exists()
    try:
        return not {"indices", "sizes"} & set(array_names(path))
    except Exception:  # whatever is wrong with it, the reader of our own format says so
        return False


def read_foreign(path: Path) -> ForeignPartition:
    """Read one.

    Raises:
        ConfigError: the file cannot be read, is a pickle, or says something else.
    """
    if path.suffix.lower() in PICKLES:
        raise ConfigError(
            f"partition.file: expected JSON or .npz, got {path.name}, which may be a pickle and "
            "could run a program; write JSON with the program that made it: json.dump({str(c): "
            "[int(i) for i in ids] for c, ids in client_dict.items()}, open('clients.json', 'w'))"
        )
    try:
        if path.is_dir():
            return _joined([_of_json(read_json(file)) for file in _json_files(path)])
        if path.suffix.lower() == ".json":
            return _of_json(read_json(path))
        return _of_mapping({name: each.tolist() for name, each in read_arrays(path).items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"partition.file: expected {{client: [numbers or paths]}}, or users and user_data as "
            f"LEAF writes them, in {path}, got {cause}"
        ) from error


def _json_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() == ".json" and not is_hidden(path.name)
    )


def _of_json(content: Any) -> ForeignPartition:
    if not isinstance(content, Mapping):
        raise ValueError(f"a {type(content).__name__} instead of a mapping")
    if "users" in content and "user_data" in content:
        return _of_leaf(content)
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
    return _of_mapping(content)


def _of_mapping(content: Mapping[str, Any]) -> ForeignPartition:
    names = tuple(content)
    if names and all(name.isdecimal() for name in names):
        names = tuple(sorted(names, key=int))
    return _checked(ForeignPartition(names, tuple(content[name] for name in names)))


def _of_leaf(content: Mapping[str, Any]) -> ForeignPartition:
    users = tuple(content["users"])
    if any(not isinstance(user, str) for user in users) or len(set(users)) < len(users):
        raise ValueError("users that are no names or come twice")
    data = [content["user_data"][user] for user in users]
    members = tuple(each["x"] for each in data)
    if "num_samples" in content and list(map(len, members)) != content["num_samples"]:
        raise ValueError("a num_samples that does not fit user_data")
    labels = tuple(each["y"] for each in data) if all("y" in each for each in data) else None
    if labels is not None and list(map(len, labels)) != list(map(len, members)):
        raise ValueError("other numbers of x and y")
    return _checked(ForeignPartition(users, members, labels))


def _joined(files: Sequence[ForeignPartition]) -> ForeignPartition:
    """Several files as one."""
    labels: list[Sequence[Any]] | None = []
    for each in files:
        labels = None if labels is None or each.labels is None else [*labels, *each.labels]
    whole = ForeignPartition(
        tuple(name for each in files for name in each.clients),
        tuple(members for each in files for members in each.members),
        None if labels is None else tuple(labels),
    )
    if len(set(whole.clients)) < len(whole.clients):
        raise ValueError("a client that is in two files")
    return _checked(whole)


def _checked(partition: ForeignPartition) -> ForeignPartition:
    """Itself, if all members are numbers >= 0, or all are paths."""
    if not partition.clients:
        raise ValueError("no client")
    kinds: set[type] = set()
    for client, members in zip(partition.clients, partition.members, strict=True):
        if not isinstance(members, list):
            raise ValueError(f"a {type(members).__name__} for client '{client[:40]}'")
        kinds |= set(map(type, members))
        if not kinds <= {int, str}:
            raise ValueError(
                f"a {next(iter(kinds - {int, str})).__name__} in the list of client "
                f"'{client[:40]}'; a file that holds the images themselves is no partition"
            )
    if len(kinds) > 1:
        raise ValueError("numbers and paths; write one kind")
    if kinds == {int}:
        for client, members in zip(partition.clients, partition.members, strict=True):
            numbers = [int(each) for each in members]
            if numbers and not 0 <= min(numbers) <= max(numbers) < 2**62:
                raise ValueError(f"a number out of range in the list of client '{client[:40]}'")
    return partition


def resolve(partition: ForeignPartition, columns: Columns, file: str) -> list[Indices]:
    """Rows of the training split for each client; images that are held out of it are left out.

    Args:
        partition: what the file says.
        columns: of the training split.
        file: where the partition is from, for messages.

    Returns:
        One ascending array for each client.

    Raises:
        ConfigError: an image is not there, has two owners or another label, or a client has none
            that is trained on.
    """
    labels = columns.labels
    origin = columns.origin or Origin(
        np.arange(len(labels)), np.empty((len(labels), 0, 0, 3), np.uint8)
    )
    count = origin.published.shape[0]
    positions = _positions(partition, origin, count, file)
    row_of = np.full(count, -1, np.int64)
    row_of[origin.positions] = np.arange(len(origin.positions))
    rows = [row_of[each] for each in positions]
    _check_owners(partition, positions, count, file)
    if partition.labels is not None:
        _check_labels(partition.labels, rows, labels, file)
    for client, each in zip(partition.clients, rows, strict=True):
        if not (each >= 0).any():
            raise ConfigError(
                f"partition.file: client '{client}' of {file} has no image that is trained on, of "
                f"{len(each)} that it lists; set data.validation=0, lift data.max_train, or remove "
                "the client"
            )
    return [np.sort(each[each >= 0]) for each in rows]


def _positions(partition: ForeignPartition, origin: Origin, count: int, file: str) -> list[Indices]:
    """Each client's images as positions in the split as it was published."""
    if any(isinstance(each, str) for members in partition.members for each in members[:1]):
        return _positions_of_paths(partition, origin, file)
    for client, members in zip(partition.clients, partition.members, strict=True):
        if members and int(max(members)) >= count:
            raise ConfigError(
                f"partition.file: client '{client}' of {file} holds image {max(members)}, but the "
                f"training split was published with {count}, counted from 0; use the data that it "
                "was made for"
            )
    return [np.array(members, np.int64) for members in partition.members]


def _positions_of_paths(partition: ForeignPartition, origin: Origin, file: str) -> list[Indices]:
    """Paths are compared from their end: `cat/1.png` is the only image whose path ends so."""
    paths = origin.paths()
    if paths is None:
        raise ConfigError(
            f"partition.file: {file} lists paths, but the images of this data set are no files of "
            "their own; list their numbers instead"
        )
    known: dict[int, dict[str, int]] = {}
    found: list[Indices] = []
    absent: list[str] = []
    for members in partition.members:
        own: list[int] = []
        for path in members:
            parts = posixpath.normpath(str(path)).split("/")
            if len(parts) not in known:
                known[len(parts)] = _by_ending(paths, len(parts))
            position = known[len(parts)].get("/".join(parts))
            if position == -1:
                raise ConfigError(
                    f"partition.file: several training images end in {path}, which {file} lists; "
                    "write more of the path"
                )
            if position is None:
                absent.append(str(path))
            else:
                own.append(position)
        found.append(np.array(own, np.int64))
    if absent:
        raise ConfigError(
            f"partition.file: {len(absent)} of {partition.listed} images that {file} lists are no "
            f"training images, the first is {absent[0]}; use the data that it was made for"
        )
    return found


def _by_ending(paths: Iterable[str], parts: int) -> dict[str, int]:
    """The position of each path by its last parts; -1 where several end alike."""
    found: dict[str, int] = {}
    for position, path in enumerate(paths):
        ending = "/".join(path.split("/")[-parts:])
        found[ending] = -1 if ending in found else position
    return found


def _check_owners(
    partition: ForeignPartition, positions: Sequence[Indices], count: int, file: str
) -> None:
    """Refuse an image that is listed twice."""
    owner = np.full(count, -1, np.int64)
    for number, each in enumerate(positions):
        values, times = np.unique(each, return_counts=True)
        known = owner[values]
        twice = np.flatnonzero((times > 1) | (known >= 0))
        if len(twice):
            first = int(twice[0])
            other = partition.clients[number if times[first] > 1 else known[first]]
            raise ConfigError(
                f"partition.file: expected each image once in {file}, got image {values[first]} "
                f"for clients '{other}' and '{partition.clients[number]}'"
            )
        owner[values] = number


def _check_labels(
    given: Sequence[Sequence[Any]], rows: Sequence[Indices], labels: Indices, file: str
) -> None:
    """Refuse a file whose labels are not those of the data under other names.

    Args:
        given: of each client, the file's labels.
        rows: of each client, rows of the training split, -1 for images that are not in it.
        labels: (N,) of the training split.
        file: for the message.
    """
    meaning: dict[str, int] = {}
    for own, of_client in zip(given, rows, strict=True):
        for value, row in zip(own, of_client.tolist(), strict=True):
            if row < 0:
                continue
            label = int(labels[row])
            if meaning.setdefault(str(value), label) != label:
                raise ConfigError(
                    f"partition.file: the labels in {file} do not fit the data: {value} stands for "
                    f"classes {meaning[str(value)]} and {label}; use the data and the order that "
                    "it was made for"
                )
