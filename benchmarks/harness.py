"""What all benchmarks share: where things lie, what is recorded, tables, intervals, one run.

A benchmark is a module with a `main`; `python -m benchmarks.NAME` starts it. It writes either one
JSON document (`header`, `write_json`) or rows of a table (`Table`), each with the date, the commit,
the machine and the versions that it was measured with.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import functools
import io
import json
import math
import os
import re
import shlex
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

import fedprompt
from fedprompt.core.files import Json as Json
from fedprompt.core.files import atomic_write, json_ready
from fedprompt.core.intervals import t_interval
from fedprompt.runs.events import PhaseStarted, Prepared, RoundFinished
from fedprompt.runs.manifest import manifest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
IMAGES = DOCS / "images"


# What is recorded.


def command() -> str:
    """The command line of this process, as a reader would type it.

    `python -m benchmarks.keyed` has the path of the file in `sys.argv`.
    """
    program = Path(sys.argv[0])
    if program.suffix == ".py" and program.is_absolute() and ROOT in program.parents:
        module = ".".join(program.relative_to(ROOT).with_suffix("").parts)
        return shlex.join(["python", "-m", module.removesuffix(".__main__"), *sys.argv[1:]])
    return shlex.join(["python", *sys.argv])


def header(name: str, **more: object) -> Json:
    """How a document of results starts: what was run, where, when, and with which versions.

    Args:
        name: of the benchmark.
        more: what else belongs at the head of this document.
    """
    return {"benchmark": name, "command": command(), **manifest(), **more}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a row of a table comes from."""

    date: str
    commit: str
    """Empty where the package was not in a checkout."""
    dirty: bool
    """Whether tracked files differed from the commit."""
    python: str
    packages: str
    """`name=version`, separated by spaces."""
    platform: str
    cpu: str
    """Empty where it was not recorded."""
    cpu_count: int
    usable_cpus: int

    @classmethod
    def of(cls, about: Json) -> Origin:
        """From what `fedprompt.runs.manifest.manifest` returns."""
        git = about["git"] or {"commit": "", "dirty": False}
        versions = about["packages"].items()
        return cls(
            date=about["date"],
            commit=git["commit"],
            dirty=git["dirty"],
            python=about["python"],
            packages=" ".join(f"{name}={version}" for name, version in versions),
            platform=about["platform"],
            cpu=about.get("cpu") or "",
            cpu_count=about["cpu_count"],
            usable_cpus=about["usable_cpus"],
        )

    @classmethod
    def here(cls) -> Origin:
        """This process."""
        return cls.of(manifest())


# JSON documents.


def read_json(path: Path) -> Json:
    """The document at `path`, or an empty one."""
    if not path.is_file():
        return {}
    found: Json = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Strict JSON, written as a whole; NaN becomes null.

    Objects that hold no more than one more level take one line.
    """
    text = json.dumps(json_ready(document), indent=1, allow_nan=False)
    small = re.compile(r"\{(?:[^{}]|\{[^{}]*\})*\}")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, small.sub(lambda found: re.sub(r"\n\s*", " ", found[0]), text) + "\n")


# Tables.

Row = TypeVar("Row")


def columns_of(kind: type) -> dict[str, object]:
    """Name and type of each column of a dataclass; those of a dataclass in it stand in its place.

    >>> columns_of(Origin)["dirty"]
    <class 'bool'>
    """
    hints = _hints(kind)
    found: dict[str, object] = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        inner = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        found |= columns_of(hint) if inner else {field.name: hint}  # type: ignore[arg-type]
    return found


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    return typing.get_type_hints(kind)


def to_cell(value: object) -> str:
    """A value as it stands in a table; numbers keep every digit.

    >>> [to_cell(each) for each in (None, True, 0.1, "text", (1, None, 2.5))]
    ['', 'true', '0.1', 'text', '1 - 2.5']
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(to_cell(each) or "-" for each in value)
    return repr(value) if isinstance(value, float) else str(value)


def from_cell(text: str, kind: object) -> object:
    """The value of a cell whose column has some type.

    >>> from_cell("0.1", float | None), from_cell("", float | None)
    (0.1, None)
    >>> from_cell("1 -", tuple[int, ...])
    (1, None)
    """
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return tuple(
            None if each == "-" else from_cell(each, arguments[0]) for each in text.split()
        )
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        if text == "":
            return None
        kind = next(each for each in arguments if each is not type(None))
    if kind is bool:
        return {"true": True, "false": False}[text]
    return kind(text) if isinstance(kind, type) else text


def flat(row: object) -> dict[str, object]:
    """The values of a dataclass by name of the column, as in `columns_of`."""
    found: dict[str, object] = {}
    for field in dataclasses.fields(row):  # type: ignore[arg-type]
        value = getattr(row, field.name)
        inner = dataclasses.is_dataclass(value) and not isinstance(value, type)
        found |= flat(value) if inner else {field.name: value}
    return found


def _build(kind: type[Row], cells: Mapping[str, str]) -> Row:
    """A dataclass of the cells of its columns."""
    values: dict[str, object] = {}
    for name, hint in _hints(kind).items():  # type: ignore[arg-type]
        inner = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        values[name] = _build(hint, cells) if inner else from_cell(cells[name], hint)  # type: ignore[arg-type]
    return kind(**values)


class Table(Generic[Row]):
    """A CSV file with one row for each instance of a dataclass, sorted by some columns.

    Args:
        path: of the file; it need not exist.
        kind: the dataclass.
        key: the columns that name a row; there is one row for each key.
    """

    def __init__(self, path: Path, kind: type[Row], key: Sequence[str]) -> None:
        self.path, self.kind, self.key = path, kind, tuple(key)

    def read(self) -> list[Row]:
        """All rows.

        Raises:
            SystemExit: the file has other columns than the dataclass.
        """
        if not self.path.is_file():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            expected = list(columns_of(self.kind))
            if reader.fieldnames != expected:
                raise SystemExit(
                    f"{self.path}: expected the columns {expected}, got {reader.fieldnames}; "
                    "restore the file"
                )
            return [_build(self.kind, cells) for cells in reader]

    def write(self, rows: Sequence[Row]) -> None:
        """Replace the file as a whole."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns_of(self.kind))
        for row in sorted(rows, key=self._key_of):
            writer.writerow(map(to_cell, flat(row).values()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, text.getvalue())

    def add(self, row: Row) -> None:
        """Put a row into the file, in the place of one with the same key.

        Programs that add to one table wait for each other; a reader, or a crash, sees the table
        without the row or with it.
        """
        with _locked(self.path.parent):
            rows = {self._key_of(each): each for each in self.read()}
            self.write([*{**rows, self._key_of(row): row}.values()])

    def _key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(getattr(row, name) for name in self.key)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes that add to tables of a folder out until the end."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# Pages.


def put_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between two marks of a page.

    Args:
        path: the page.
        name: of the marks.
        text: what is to stand there.

    Raises:
        SystemExit: the page has no such marks.
    """
    begin, end = f"<!-- {name}: made from the results; do not edit -->", f"<!-- end of {name} -->"
    page = path.read_text(encoding="utf-8")
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"{path}: expected the marks '{begin}' and '{end}'; put them back")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


# Intervals.


def half_up(value: float, places: str) -> str:
    """A recorded number with fewer decimals, as one rounds by hand.

    >>> half_up(1.275, ".01"), f"{1.275:.2f}"
    ('1.28', '1.27')
    """
    return str(Decimal(repr(value)).quantize(Decimal(places), ROUND_HALF_UP))


def interval(values: Sequence[float], digits: int = 4) -> dict[str, float | None]:
    """Mean and half width of the 95 % interval (Student's t), the latter None for a single value.

    >>> interval([1.0, 2.0, 3.0])
    {'mean': 2.0, 'ci95': 2.4841}
    """
    mean, half = t_interval(values)
    return {"mean": round(mean, digits), "ci95": None if half is None else round(half, digits)}


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval, the latter NaN for a single value.

    >>> mean_and_half([1.0])
    (1.0, nan)
    """
    mean, half = t_interval(values)
    return mean, math.nan if half is None else half


@dataclasses.dataclass(frozen=True)
class Paired:
    """A difference over the seeds that two sides share."""

    mean: float
    half_width: float
    """Of the 95 % interval; NaN for a single seed."""
    p: float
    """Of the two-sided paired t test; NaN where all differences are equal."""
    seeds: int


def paired(own: Mapping[int, float], other: Mapping[int, float]) -> Paired | None:
    """Difference over common seeds; None where there are none.

    Args:
        own: value by seed.
        other: the same of what is taken away.

    >>> gain = paired({0: 2.0, 1: 3.0, 2: 4.5}, {0: 1.0, 1: 1.5, 2: 2.0, 3: 9.0})
    >>> round(gain.mean, 3), round(gain.half_width, 3), round(gain.p, 3), gain.seeds
    (1.667, 1.897, 0.063, 3)
    """
    seeds = sorted(set(own) & set(other))
    if not seeds:
        return None
    differences = [own[seed] - other[seed] for seed in seeds]
    mean, half = mean_and_half(differences)
    p = math.nan
    if len(seeds) > 1 and float(np.std(differences)) > 0:
        from scipy import stats  # takes a while, and only this needs it

        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Paired(mean, half, p, len(seeds))


# One run.


@dataclasses.dataclass(frozen=True)
class Once:
    """An experiment that was run once, in this process, and when things happened."""

    result: fedprompt.RunResult
    """Its files are gone."""
    seconds: float
    cpu_seconds: float
    """Of this process."""
    prepared: float
    """Seconds from the start until data and network were ready, and until the workers were."""
    phase: float
    rounds: tuple[float, ...]
    """Seconds from the start to the end of each round."""


def run_once(
    experiment: str | Mapping[str, object],
    overrides: Sequence[str],
    on_event: Callable[[object, Path], None] | None = None,
) -> Once:
    """Run an experiment in a folder that is removed afterwards.

    Args:
        experiment: name, or what a file would hold.
        overrides: as on the command line.
        on_event: also gets each event, and the run's folder.
    """
    moments: dict[str, float] = {}
    ends: list[float] = []
    started, worked = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"

        def listen(event: object) -> None:
            now = time.perf_counter() - started
            if isinstance(event, Prepared):
                moments["prepared"] = now
            elif isinstance(event, PhaseStarted):
                moments["phase"] = now
            elif isinstance(event, RoundFinished):
                ends.append(now)
            if on_event is not None:
                on_event(event, run_dir)

        changes = [*overrides, f"run_dir={run_dir}"]
        result = fedprompt.run(experiment, changes, on_event=listen)
    return Once(
        result,
        time.perf_counter() - started,
        time.process_time() - worked,
        moments["prepared"],
        moments["phase"],
        tuple(ends),
    )


def one_thread() -> None:
    """As all benchmarks compute but those that say otherwise."""
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
