"""Sweeps: a search space over config keys, with seeds as repetitions.

This file turns a YAML file of `conf/sweep/` into a fixed list of trials, each a whole experiment
with a run directory of its own, and the finished run directories into one table. Random draws are
made here, from the sweep's own seed, so that the list is the same whenever it is made: a sweep that
was killed goes on from the folders that are there. `tuning.py` has Ray Tune run the list.

SWEEP_DIR/
  sweep.yaml     the sweep, complete; `fedprompt sweep --resume SWEEP_DIR` reads it
  trials/NAME/   one run directory each
  stopped.json   trials that the stopping rule ended, with the round they reached
  table.csv      one row a cell: mean and 95 % interval over its seeds
  table.json     the same, and each trial with its run directory
  figures/       heat map and lines
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich import box
from rich.table import Table

from fedprompt.checkpoint import atomic_write
from fedprompt.checks import check_integer, is_integer
from fedprompt.config import FILE_NAME, ExperimentConfig, Tree, compose, conf_root
from fedprompt.display import percent
from fedprompt.errors import ConfigError, suggest
from fedprompt.records import RunDirectory
from fedprompt.report import comparison_table

MAX_TRIALS = 10_000
MEASURES = ("accuracy", "best_accuracy", "prompts")
"""What the table says of a cell; the first is the one that is drawn."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """The values that one config key takes.

    `grid` and `choice` list values: the grid is walked through, of a choice one is drawn.
    `uniform` and `loguniform` have a lower and an upper bound, `randint` integer ones, the upper
    one left out.
    """

    key: str
    kind: str
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"space.{self.key}: expected one of {', '.join(KINDS)}, got '{self.kind}'"
                f"{suggest(self.kind, KINDS)}"
            )
        if not self.values:
            raise ConfigError(f"space.{self.key}: expected at least one value, got none")
        if self.kind == "grid" and len(set(map(repr, self.values))) < len(self.values):
            raise ConfigError(
                f"space.{self.key}: expected each value once, got {list(self.values)}; "
                "seeds say how often a cell is repeated"
            )
        if self.kind in ("grid", "choice"):
            return
        numbers = [each for each in self.values if isinstance(each, (int, float))]
        whole = self.kind != "randint" or all(isinstance(each, int) for each in numbers)
        ordered = len(numbers) == len(self.values) == 2 and numbers[0] < numbers[1] and whole
        if not ordered or (self.kind == "loguniform" and numbers[0] <= 0):
            above = " above 0" if self.kind == "loguniform" else ""
            raise ConfigError(
                f"space.{self.key}: {self.kind} expects [lower, upper], two "
                f"{'integers' if self.kind == 'randint' else 'numbers'}{above} in order, got "
                f"{list(self.values)}"
            )

    def draw(self, generator: np.random.Generator) -> Any:
        """One value of a random axis, as a plain Python value."""
        if self.kind == "choice":
            return self.values[int(generator.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(generator.integers(low, high))
        if self.kind == "loguniform":
            low, high = math.log(low), math.log(high)
        drawn = float(generator.uniform(low, high))
        # Six digits: what the table shows is what the config gets.
        return float(f"{math.exp(drawn) if self.kind == 'loguniform' else drawn:.6g}")


KINDS = ("grid", "choice", "uniform", "loguniform", "randint")


@dataclasses.dataclass(frozen=True)
class StopRule:
    """When Tune ends a trial early (ASHA): judged by validation accuracy at certain rounds."""

    grace: int = 2
    """Rounds that every trial may do."""
    reduction: int = 3
    """Of the trials that come to a rung, one of so many goes on."""

    def __post_init__(self) -> None:
        check_integer("stop.grace", self.grace, 1)
        check_integer("stop.reduction", self.reduction, 2)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One experiment of a sweep."""

    cell: tuple[tuple[str, Any], ...]
    """Key and value of each axis."""
    seed: int
    folder: str
    """Of its run directory, under `trials/`."""
    config: ExperimentConfig


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A checked sweep."""

    name: str
    experiment: str | Tree
    set: Tree
    """Values that all trials share, over those of the experiment."""
    space: tuple[Axis, ...]
    seeds: tuple[int, ...]
    samples: int
    """Draws of the random axes for each cell of the grid."""
    sampling_seed: int
    stop: StopRule | None
    note: str | None

    def tree(self) -> Tree:
        """As plain mappings; `build_sweep` of it gives an equal sweep."""
        return {
            "name": self.name,
            "experiment": self.experiment,
            "set": dict(self.set),
            "space": {axis.key: {axis.kind: list(axis.values)} for axis in self.space},
            "seeds": list(self.seeds),
            "samples": self.samples,
            "sampling_seed": self.sampling_seed,
            "stop": None if self.stop is None else dataclasses.asdict(self.stop),
            "note": self.note,
        }

    def cells(self) -> list[tuple[tuple[str, Any], ...]]:
        """All combinations of the grid, each with its draws of the random axes; equal draws are one
        cell.
        """
        grid = [axis for axis in self.space if axis.kind == "grid"]
        drawn = [axis for axis in self.space if axis.kind != "grid"]
        generator = np.random.default_rng(self.sampling_seed)
        cells = {}
        for values in itertools.product(*(axis.values for axis in grid)):
            for _ in range(self.samples if drawn else 1):
                chosen = dict(zip([axis.key for axis in grid], values, strict=True))
                chosen.update({axis.key: axis.draw(generator) for axis in drawn})
                cell = tuple((axis.key, chosen[axis.key]) for axis in self.space)
                cells[repr(cell)] = cell
        return list(cells.values())

    def trials(self) -> list[Trial]:
        """The experiments, cell by cell and seed by seed; each is composed and checked.

        Raises:
            ConfigError: an experiment is wrong; the message names its cell.
        """
        cells = self.cells()
        if len(cells) * len(self.seeds) > MAX_TRIALS:
            raise ConfigError(
                f"the sweep has {len(cells)} cells x {len(self.seeds)} seeds; expected at most "
                f"{MAX_TRIALS} trials"
            )
        trials = []
        for number, cell in enumerate(cells):
            short = ",".join(f"{key.split('.')[-1]}={_plain(value)}" for key, value in cell)
            label = re.sub(r"[^\w.,=+-]", "_", short)[:80]
            overrides = [
                *(f"{key}={_yaml_line(value)}" for key, value in self.set.items()),
                *(f"{key}={_yaml_line(value)}" for key, value in cell),
            ]
            try:
                config = compose(self.experiment, overrides)
            except ConfigError as error:
                raise ConfigError(f"sweep cell {describe(cell)}: {error}") from error
            for seed in self.seeds:
                folder = f"{number:03d}-{label},seed={seed}"
                # Composing takes longer than all else here, and the seed changes nothing else.
                trials.append(Trial(cell, seed, folder, dataclasses.replace(config, seed=seed)))
        return trials


# ---------------------------------------------------------------- reading


def load_sweep(name: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep and apply what the command line says.

    Args:
        name: of a file in `conf/sweep/`, or path of a YAML file.
        overrides: `sweep.key=value` sets a value of the sweep, as `sweep.seeds=5`; `key=value` sets
            one of the experiments; a key of the space takes other values, as
            `partition.alpha=[0.1,1]`, or a single one.

    Raises:
        ConfigError: there is no such file, or something in it is wrong.
    """
    tree = _read(name)
    tree.setdefault("name", Path(name).stem)
    for key in ("set", "space", "stop"):
        if tree.get(key) is None:
            continue
        if not isinstance(tree[key], Mapping):
            raise ConfigError(f"{key}: expected 'key: value' lines, got {tree[key]!r}")
        tree[key] = dict(tree[key])
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override '{override}': expected key=value, for example rounds=3")
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{override}': the value is no valid YAML") from error
        if key.startswith("sweep."):
            tree[key.removeprefix("sweep.")] = value
        elif key == "seed":
            raise ConfigError(
                f"seed={text}: a sweep repeats each cell over its seeds; use sweep.seeds=[{text}]"
            )
        elif key in (tree.get("space") or {}):
            tree["space"][key] = {"grid": value if isinstance(value, list) else [value]}
        else:
            tree["set"] = {**(tree.get("set") or {}), key: value}
    return build_sweep(tree)


def build_sweep(tree: Tree) -> Sweep:
    """Check a tree and turn it into dataclasses.

    Raises:
        ConfigError: unknown key or wrong value.
    """
    known = [field.name for field in dataclasses.fields(Sweep)]
    for key in tree:
        if key not in known:
            raise ConfigError(
                f"unknown sweep key '{key}': expected one of {', '.join(known)}"
                f"{suggest(key, known)}"
            )
    space = tree.get("space")
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(
            "space: expected at least one config key with its values, for example "
            "'partition.alpha: {grid: [0.1, 0.5]}', got none"
        )
    shared = dict(tree.get("set") or {})
    for key in ("seed", "run_dir"):
        if key in space or key in shared:
            raise ConfigError(
                f"{key}: a sweep sets it for each trial; "
                + ("use seeds" if key == "seed" else "choose the folder with sweep --dir")
            )
    for key in sorted(set(space) & set(shared)):
        raise ConfigError(f"{key}: it is in the space and in set; remove one")
    return Sweep(
        name=str(tree.get("name", "sweep")),
        experiment=_experiment(tree.get("experiment")),
        set=shared,
        space=tuple(_axis(str(key), value) for key, value in space.items()),
        seeds=_seeds(tree.get("seeds", 1)),
        samples=_integer(tree.get("samples", 1), "samples", 1),
        sampling_seed=_integer(tree.get("sampling_seed", 0), "sampling_seed", 0),
        stop=_stop(tree.get("stop")),
        note=None if tree.get("note") is None else str(tree["note"]),
    )


def _experiment(value: Any) -> str | Tree:
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, str) and value:
        # Another folder may be the current one when the sweep is resumed.
        return os.fspath(Path(value).resolve()) if Path(value).is_file() else value
    raise ConfigError(
        f"experiment: expected the name or file of an experiment, or a mapping, got {value!r}"
    )


def _axis(key: str, value: Any) -> Axis:
    if isinstance(value, list):
        return Axis(key, "grid", tuple(value))
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(
            f"space.{key}: expected one of {', '.join(KINDS)} with its values, for example "
            f"'grid: [1, 2]', got {value!r}"
        )
    ((kind, values),) = value.items()
    if not isinstance(values, list):
        raise ConfigError(f"space.{key}: {kind} expects a list, got {values!r}")
    return Axis(key, str(kind), tuple(values))


def _seeds(value: Any) -> tuple[int, ...]:
    if is_integer(value) and value >= 1:
        return tuple(range(value))
    whole = isinstance(value, list) and value and all(is_integer(s) and s >= 0 for s in value)
    if whole and len(set(value)) == len(value):
        return tuple(value)
    raise ConfigError(
        f"seeds: expected a number of seeds, or a list of different integers >= 0, got {value!r}"
    )


def _stop(value: Any) -> StopRule | None:
    if value is None:
        return None
    known = [field.name for field in dataclasses.fields(StopRule)]
    if not isinstance(value, Mapping):
        raise ConfigError(f"stop: expected null or {', '.join(known)}, got {value!r}")
    for key in value:
        if key not in known:
            raise ConfigError(f"unknown sweep key 'stop.{key}': expected {', '.join(known)}")
    return StopRule(**{key: _integer(item, f"stop.{key}", 0) for key, item in value.items()})


def _integer(value: Any, key: str, least: int) -> int:
    check_integer(key, value, least)
    return int(value)


def _read(name: str) -> Tree:
    named = conf_root() / "sweep" / f"{name}.yaml"
    path = named if FILE_NAME.fullmatch(name) and named.is_file() else Path(name)
    if not path.is_file():
        names = sorted(file.stem for file in (conf_root() / "sweep").glob("*.yaml"))
        raise ConfigError(
            f"no sweep '{name}': expected the path of a YAML file, or one of {', '.join(names)}"
            f"{suggest(name, names)}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _plain(value: Any) -> str:
    return format(value, ".6g") if isinstance(value, float) else str(value)


def _yaml_line(value: Any) -> str:
    """A value as the right side of an override."""
    return value if isinstance(value, str) else json.dumps(value)


def describe(cell: Sequence[tuple[str, Any]]) -> str:
    """A cell in one line.

    >>> describe([("partition.alpha", 0.1), ("prompts.count", 5)])
    'partition.alpha=0.1 prompts.count=5'
    """
    return " ".join(f"{key}={_plain(value)}" for key, value in cell)


# ---------------------------------------------------------------- the folder


class SweepDirectory:
    """Reads and writes the files of one sweep."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.figures_folder = self.path / "figures"

    @classmethod
    def create(cls, path: str | os.PathLike[str], sweep: Sweep) -> SweepDirectory:
        """Make the folder of a new sweep.

        Raises:
            ConfigError: there is something already, or it cannot be written.
        """
        directory = cls(path)
        if directory.path.exists() and (
            not directory.path.is_dir() or any(directory.path.iterdir())
        ):
            more = (
                f"; continue it with 'fedprompt sweep --resume {directory.path}'"
                if (directory.path / "sweep.yaml").is_file()
                else ""
            )
            raise ConfigError(f"--dir {directory.path}: expected a new or empty folder{more}")
        try:
            (directory.path / "trials").mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(sweep.tree(), sort_keys=False, allow_unicode=True)
            atomic_write(directory.path / "sweep.yaml", f"# fedprompt sweep sweep.yaml\n{text}")
        except OSError as error:
            raise ConfigError(
                f"--dir {directory.path}: expected a folder that can be written, got "
                f"'{error.strerror or error}'"
            ) from error
        return directory

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> tuple[SweepDirectory, Sweep]:
        """The sweep that exists at `path`.

        Raises:
            ConfigError: there is none.
        """
        directory = cls(path)
        file = directory.path / "sweep.yaml"
        if not file.is_file():
            raise ConfigError(
                f"{directory.path}: expected the folder of a sweep (it has sweep.yaml), got "
                f"{'another folder' if directory.path.is_dir() else 'nothing there'}"
            )
        return directory, build_sweep(_read(os.fspath(file)))

    def run(self, trial: Trial) -> RunDirectory:
        """The run directory of a trial; it may not exist yet."""
        return RunDirectory(self.path / "trials" / trial.folder)

    def stopped(self) -> dict[str, int]:
        """Trials that the stopping rule ended, by folder, with the last round of each."""
        file = self.path / "stopped.json"
        return dict(json.loads(file.read_text())) if file.is_file() else {}

    def add_stopped(self, trial: Trial, round_index: int) -> None:
        """Remember that a trial is not to be continued."""
        stopped = {**self.stopped(), trial.folder: round_index}
        atomic_write(self.path / "stopped.json", json.dumps(stopped, indent=2) + "\n")

    def unfinished(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials that are still to be done, or to be continued."""
        stopped = self.stopped()
        return [
            trial
            for trial in trials
            if trial.folder not in stopped and not self.run(trial).is_finished()
        ]

    def write_table(self, sweep: Sweep, trials: Sequence[Trial]) -> dict[str, Any]:
        """Write `table.json` and `table.csv`; see `make_table`."""
        table = make_table(self, sweep, trials)
        atomic_write(self.path / "table.json", json.dumps(table, indent=2) + "\n")
        atomic_write(self.path / "table.csv", table_csv(table))
        return table


def default_folder(sweep: Sweep) -> Path:
    """A new folder, named by sweep and time."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"sweep-{Path(sweep.name).name}-{now}"


# ---------------------------------------------------------------- the table


def make_table(directory: SweepDirectory, sweep: Sweep, trials: Sequence[Trial]) -> dict[str, Any]:
    """What a sweep found: no times and no dates, so that it is a function of the trials' results.

    Returns:
        `keys`, `cells` (values, seeds that are done, mean and 95 % interval of each measure) and
        `trials` (values, seed, state, measures, state hash, run directory).
    """
    stopped = directory.stopped()
    rows: list[dict[str, Any]] = []
    for trial in trials:
        run = directory.run(trial)
        measured: dict[str, Any] = dict.fromkeys((*MEASURES, "rounds", "state_sha256"))
        state = run.read_status().get("state", "missing") if run.is_run() else "missing"
        if run.is_run() and run.read_rounds():
            row = comparison_table([run.path])[0]
            measured = {name: row[name] for name in measured}
        rows.append(
            {
                "values": dict(trial.cell),
                "seed": trial.seed,
                "state": "stopped" if trial.folder in stopped else state,
                **measured,
                "run_dir": f"trials/{trial.folder}",
            }
        )
    cells = []
    for values, group in itertools.groupby(rows, key=lambda row: row["values"]):
        members = list(group)
        done = [row for row in members if row["state"] == "finished"]
        cell: dict[str, Any] = {
            "values": values,
            "seeds": [row["seed"] for row in done],
            "stopped": sum(row["state"] == "stopped" for row in members),
            "missing": sum(row["state"] not in ("finished", "stopped") for row in members),
        }
        for name in MEASURES:
            cell[name] = interval([row[name] for row in done if row[name] is not None])
        cell["run_dirs"] = [row["run_dir"] for row in members]
        cells.append(cell)
    return {
        "name": sweep.name,
        "note": sweep.note,
        "keys": [axis.key for axis in sweep.space],
        "cells": cells,
        "trials": rows,
    }


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and half width of the 95 % t-interval; one value has no width.

    >>> interval([1.0, 2.0, 3.0])
    {'mean': 2.0, 'half_width': 2.484138}
    >>> interval([]), interval([0.5])
    ({'mean': None, 'half_width': None}, {'mean': 0.5, 'half_width': None})
    """
    if not values:
        return {"mean": None, "half_width": None}
    mean, half = t_interval(values)
    return {"mean": round(mean, 6), "half_width": None if half is None else round(half, 6)}


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of the 95 % interval of the mean (Student's t); the latter is None for a
    single value.

    >>> mean, half = t_interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    from scipy import stats  # takes a while, and only this needs it

    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def table_csv(table: Mapping[str, Any]) -> str:
    """One row a cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measures = [f"{name}_{part}" for name in MEASURES for part in ("mean", "half_width")]
    writer.writerow([*table["keys"], "seeds", "stopped", "missing", *measures, "run_dirs"])
    for cell in table["cells"]:
        numbers = [cell[name][part] for name in MEASURES for part in ("mean", "half_width")]
        writer.writerow(
            [
                *(cell["values"][key] for key in table["keys"]),
                len(cell["seeds"]),
                cell["stopped"],
                cell["missing"],
                *("" if number is None else number for number in numbers),
                " ".join(cell["run_dirs"]),
            ]
        )
    return text.getvalue()


def render_table(table: Mapping[str, Any]) -> Table:
    """The cells as a table for the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for key in table["keys"]:
        shown.add_column(key)
    for name in ("seeds", "accuracy", "at best val.", "prompts"):
        shown.add_column(name, justify="right", no_wrap=True)
    for cell in table["cells"]:
        prompts = cell["prompts"]["mean"]
        shown.add_row(
            *(_plain(cell["values"][key]) for key in table["keys"]),
            str(len(cell["seeds"])) + (f" + {cell['stopped']} stopped" if cell["stopped"] else ""),
            _with_interval(cell["accuracy"]),
            _with_interval(cell["best_accuracy"]),
            "-" if prompts is None else f"{prompts:.1f}",
        )
    return shown


def _with_interval(measure: Mapping[str, float | None]) -> str:
    half = measure["half_width"]
    suffix = "" if half is None else f" ± {100 * half:.1f}"
    return percent(measure["mean"]).removesuffix(" %") + suffix + " %"
