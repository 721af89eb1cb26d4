"""What the methods benchmark has measured, in one folder.

FOLDER/
  runs.csv      the runs that are reported, one row each
  rates.csv     those that chose the learning rates
  options.csv   the rest of the configuration that a run had, one row for each that occurs
  prompts/      the summarizing prompts of each round of PFPT with seed 0, for the figures
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.harness import RESULTS, Origin, Table
from benchmarks.methods.grid import Cell

FOLDER = RESULTS / "methods"
Options = dict[str, object]
"""`group.key` -> value"""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run. What a run that diverged does not have is None, and `error` says why."""

    setting: str
    method: str
    seed: int
    scale: float
    """Factor on the learning rates."""
    rounds: int
    accuracy: float | None
    """On the test split, after the last round; None where there is no global model."""
    best_round: int | None
    best_accuracy: float | None
    """In the evaluated round that was best on the validation split."""
    validation_accuracy: float | None
    balanced_accuracy: float | None
    """Mean over classes."""
    alone_accuracy: float | None
    """As `accuracy`, with prompts that each image selects by itself; None in the first runs."""
    alone_validation_accuracy: float | None
    own: float | None
    """Of the clients' test accuracies on their own test images: the mean, and the next three."""
    own_deviation: float | None
    own_worst_tenth: float | None
    own_jain: float | None
    prompts: int | None
    """At the end."""
    bytes_up: int | None
    bytes_down: int | None
    seconds: float | None
    cpu_seconds: float | None
    """Of one thread. The first files had none."""
    train_seconds: float | None
    aggregate_seconds: float | None
    evaluate_seconds: float | None
    accuracy_curve: tuple[float | None, ...]
    """One value for each round; None where it was not evaluated."""
    validation_curve: tuple[float | None, ...]
    loss_curve: tuple[float | None, ...]
    prompts_curve: tuple[int, ...]
    state_sha256: str
    overrides: tuple[str, ...]
    """After the experiment's name, as a user would type them."""
    options: str
    """Row of options.csv; empty where only the overrides are known."""
    origin: Origin
    error: str = ""

    @property
    def cell(self) -> tuple[str, str, int, float]:
        """What names it."""
        return self.setting, self.method, self.seed, self.scale


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What a run's configuration says beside its overrides, its seed and its name."""

    digest: str
    complete: bool
    """Whether that is all of it: the first runs kept what their experiment sets."""
    options: str
    """JSON, keys sorted."""

    @classmethod
    def of(cls, options: Mapping[str, object], complete: bool = True) -> Configuration:
        """Named by its content."""
        text = json.dumps(options, sort_keys=True)
        digest = hashlib.sha256(f"{complete} {text}".encode()).hexdigest()[:12]
        return cls(digest, complete, text)

    def read(self) -> Options:
        """By key."""
        found: Options = json.loads(self.options)
        return found


def rest_of(tree: Mapping[str, object], overrides: Iterable[str]) -> Options:
    """What a whole configuration says beside some overrides, the seed and the name.

    >>> rest_of({"seed": 1, "prompts": {"lr": 0.1, "count": 5}}, ["prompts.lr=0.1"])
    {'prompts.count': 5}
    """
    named = {"seed", "name", *(each.partition("=")[0] for each in overrides)}
    return {key: value for key, value in flatten(tree).items() if key not in named}


def flatten(tree: Mapping[str, object], prefix: str = "") -> Options:
    """Nested groups as `group.key`; an empty group is left out.

    >>> flatten({"a": 1, "b": {"c": {"d": 2}, "e": {}}})
    {'a': 1, 'b.c.d': 2}
    """
    found: Options = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


class Store:
    """Reads and extends a folder of results; each file is read once.

    Args:
        folder: it need not exist.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        key = ("setting", "method", "seed", "scale")
        self._runs = Table(folder / "runs.csv", Run, key[:3])
        self._rates = Table(folder / "rates.csv", Run, key)
        self._options = Table(folder / "options.csv", Configuration, ("digest",))

    @functools.cached_property
    def runs(self) -> dict[tuple[str, str, int], Run]:
        """Reported runs by setting, method and seed."""
        return {(run.setting, run.method, run.seed): run for run in self._runs.read()}

    @functools.cached_property
    def rates(self) -> dict[tuple[str, str, int, float], Run]:
        """Runs that choose a rate, by setting, method, seed and scale."""
        return {run.cell: run for run in self._rates.read()}

    @functools.cached_property
    def options(self) -> dict[str, Configuration]:
        """By digest."""
        return {each.digest: each for each in self._options.read()}

    def find(self, cell: Cell) -> Run | None:
        """The run of a cell, if it has been done."""
        if cell.scale is None:
            return self.runs.get((cell.setting, cell.method, cell.seed))
        return self.rates.get((cell.setting, cell.method, cell.seed, cell.scale))

    def configuration(self, run: Run) -> Configuration:
        """What is known of a run's configuration beside its overrides."""
        return self.options[run.options] if run.options else Configuration.of({}, complete=False)

    def add(self, cell: Cell, run: Run, configuration: Configuration) -> None:
        """Keep a run, in the place of an earlier one of the same cell.

        The configuration goes first: a row that names one is never without it.
        """
        if configuration.digest not in self.options:
            self._options.add(configuration)
            self.options[configuration.digest] = configuration
        if cell.scale is None:
            self._runs.add(run)
            self.runs[run.setting, run.method, run.seed] = run
        else:
            self._rates.add(run)
            self.rates[run.cell] = run

    def pools(self, setting: str) -> Path:
        """Where PFPT's prompts of each round lie, of seed 0."""
        return self.folder / "prompts" / f"{setting.replace('/', '-')}.npz"
