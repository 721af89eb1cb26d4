"""The runs below a folder, with what is known of each."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from fedprompt.core.errors import CheckpointError, ConfigError
from fedprompt.core.files import Json
from fedprompt.runs.directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run in a list."""

    path: Path
    status: str
    methods: tuple[str, ...]
    """Its own, then those that it is compared with."""
    data: str
    partition: str
    seed: int | None
    done: int
    rounds: int | None
    accuracy: float | None
    """On the test split, of the last evaluated round."""
    date: str

    @property
    def method(self) -> str:
        """Its own."""
        return self.methods[0]


SORTS = ("date", "accuracy", "data", "done", "method", "partition", "path", "seed", "status")
"""What a list can be sorted by."""


def find_runs(folder: Path) -> list[Entry]:
    """All runs below a folder, those of sweeps among them; runs within runs are not listed.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"runs: expected a folder with runs, got {folder}, which is none")
    return [entry_of(directory) for directory in _directories(folder)]


def _directories(folder: Path) -> Iterator[RunDirectory]:
    for place, folders, files in os.walk(folder):
        directory = RunDirectory(place)
        if {"status.json", "config.yaml"} & set(files) and directory.is_run():
            folders.clear()
            yield directory
        else:
            folders[:] = sorted(each for each in folders if not each.startswith("."))


def entry_of(directory: RunDirectory) -> Entry:
    """What is known of a run; a damaged file leaves its fields empty."""
    try:
        config = yaml.safe_load(directory.read_config()) or {}
        records = directory.read_rounds()
        manifest = directory.read_manifest()
    except (yaml.YAMLError, CheckpointError):
        config, records, manifest = {}, [], {}
    known = [record["accuracy"] for record in records if record.get("accuracy") is not None]
    compared = [str(each) for each in config.get("compare") or ()]
    status = directory.read_status()
    return Entry(
        directory.path,
        str(status.get("state", "unknown")),
        (str(config.get("method", "-")), *compared),
        _name(config, "data"),
        _name(config, "partition"),
        config.get("seed"),
        records[-1]["round"] if records else 0,
        config.get("rounds"),
        known[-1] if known else None,
        str(manifest.get("date") or status.get("updated") or ""),
    )


def _name(config: Json, group: str) -> str:
    section = config.get(group)
    if not isinstance(section, dict):
        return str(section or "-")
    alpha = section.get("alpha")
    return f"{section.get('name', '-')}" + ("" if alpha is None else f" {alpha}")


def select(
    entries: Sequence[Entry],
    method: str | None = None,
    data: str | None = None,
    status: str | None = None,
    sort: str = "date",
) -> list[Entry]:
    """Some of the runs, in order.

    Args:
        entries: all of them.
        method: one that a run has, be it as a comparison.
        data: the data set.
        status: of `STATES`.
        sort: one of `SORTS`; `-` before it turns the order round. Runs without a value come last.

    Raises:
        ConfigError: unknown key to sort by.
    """
    key = sort.removeprefix("-")
    if key not in SORTS:
        raise ConfigError(f"--sort: expected one of {', '.join(SORTS)}, got '{key}'")
    kept = [
        each
        for each in entries
        if method in (None, *each.methods)
        and data in (None, each.data)
        and status in (None, each.status)
    ]
    known = [each for each in kept if getattr(each, key) not in (None, "")]
    known.sort(key=lambda each: getattr(each, key), reverse=sort != key)
    return known + [each for each in kept if each not in known]
