"""Sweeps: a search space over config keys, with seeds as repetitions.

This file turns a YAML file of `conf/sweep/` into a fixed list of trials, each a whole experiment
with a run directory of its own, and the finished run directories into one table. Random draws are
made here, from the sweep's own seed, so that the list is the same whenever it is made: a sweep that
was killed continues from the folders that are there. `ray_tune.py` has Ray Tune run the list.

SWEEP_DIR/
  plugins/       the plug-in files of all trials
  sweep.yaml     the sweep, complete; `fedprompt sweep --resume SWEEP_DIR` reads it
  trials/NAME/   one run directory each
  stopped.json   trials that the stopping rule ended, with the round they reached
  table.csv      one row a cell: mean and 95 % interval over its seeds
  table.json     the same, and each trial with its run directory
  figures/       heat map and lines
  report.html    the page
  tune/          what Ray Tune's own loggers wrote, if the sweep has some
"""

from __future__ import annotations

import dataclasses
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

from fedprompt.config import (
    FILE_NAME,
    ExperimentConfig,
    Tree,
    compose,
    conf_root,
    list_experiments,
)
from fedprompt.config.files import read_experiment, read_value, read_yaml
from fedprompt.config.typed import section
from fedprompt.core.checks import check_choice, check_integer, is_integer
from fedprompt.core.errors import ConfigError, suggest
from fedprompt.core.plugins import absolute

MAX_TRIALS = 10_000
TUNE_LOGGERS = ("csv", "json", "tensorboard")


Value = Any
"""What a config key may be set to, as YAML has it."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """The values that one config key takes.

    `grid` and `choice` list values: the grid is walked through, of a choice one is drawn.
    `uniform` and `loguniform` have a lower and an upper bound, `randint` integer ones, the upper
    one left out.
    """

    key: str
    kind: str
    values: tuple[Value, ...]

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

    def draw(self, generator: np.random.Generator) -> Value:
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
    """Of the trials that reach a rung, one in so many continues."""

    def __post_init__(self) -> None:
        check_integer("stop.grace", self.grace, 1)
        check_integer("stop.reduction", self.reduction, 2)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One experiment of a sweep."""

    cell: tuple[tuple[str, Value], ...]
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
    tune_loggers: tuple[str, ...] = ()
    """Loggers of Ray Tune, of `TUNE_LOGGERS`; they write to `tune/` of the sweep's folder."""
    files: dict[str, Tree] = dataclasses.field(default_factory=dict)
    """Files of `conf/` that a sweep which is continued is composed of, by `GROUP/NAME`."""

    def settled(self, trials: Sequence[Trial]) -> Sweep:
        """The sweep with the experiment's lines and the files that were read in place of names, so
        that trials which are started later are of the same experiment.

        Args:
            trials: of this sweep.
        """
        named = self.experiment
        lines = read_experiment(named) if isinstance(named, str) else named
        files = {key: each for t in trials for key, each in t.config.sources.files.items()}
        return dataclasses.replace(self, experiment=lines, files=files)

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
            "tune_loggers": list(self.tune_loggers),
            "files": self.files,
        }

    def cells(self) -> list[tuple[tuple[str, Value], ...]]:
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
            short = ",".join(f"{key.split('.')[-1]}={plain_text(value)}" for key, value in cell)
            label = re.sub(r"[^\w.,=+-]", "_", short)[:80]
            overrides = [
                *(f"{key}={_yaml_line(value)}" for key, value in self.set.items()),
                *(f"{key}={_yaml_line(value)}" for key, value in cell),
            ]
            try:
                config = compose(self.experiment, overrides, self.files)
            except ConfigError as error:
                where = f"sweep cell {describe(cell)}: " if cell else ""
                raise ConfigError(f"{where}{error}") from error
            if self.stop is not None and getattr(config.data.options, "validation", None) == 0:
                raise ConfigError(
                    f"stop: expected trials with a validation split to judge them by, got "
                    f"data.validation=0 in sweep cell {describe(cell)}; set data.validation to a "
                    "share, or sweep.stop=null to let every trial end"
                )
            for seed in self.seeds:
                folder = f"{number:03d}-{label + ',' * bool(label)}seed={seed}"
                # Composing takes longer than all else here, and the seed changes nothing else.
                trials.append(Trial(cell, seed, folder, dataclasses.replace(config, seed=seed)))
        return trials


# ---------------------------------------------------------------- reading


def load_sweep(name: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep and apply what the command line says.

    Args:
        name: of a file in `conf/sweep/` or `conf/experiment/`, or path of a YAML file; an
            experiment is swept over what the overrides say.
        overrides: `sweep.key=value` sets a value of the sweep, as `sweep.seeds=5`; `key=value` sets
            one of the experiments; `key=a,b,c` makes the key one of the space, and `seed=0..4` says
            the seeds; a key of the space takes other values, as `partition.alpha=[0.1,1]`, or a
            single one.

    Raises:
        ConfigError: there is no such file, or something in it is wrong.
    """
    tree = read_named(name)
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
        listed = values_of(key, text)
        try:
            value = read_value(text) if text and not listed else None
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{override}': the value is no valid YAML") from error
        if key.startswith("sweep."):
            tree[key.removeprefix("sweep.")] = listed or value
        elif key == "seed":
            tree["seeds"] = listed or (value if isinstance(value, list) else [value])
        elif listed:
            tree["space"] = {**(tree.get("space") or {}), key: {"grid": listed}}
            tree["set"] = {k: v for k, v in (tree.get("set") or {}).items() if k != key}
        elif key in (tree.get("space") or {}):
            tree["space"][key] = {"grid": value if isinstance(value, list) else [value]}
        else:
            tree["set"] = {**(tree.get("set") or {}), key: value}
    return build_sweep(tree)


WORDS = ("note", "name")
"""Keys whose values are text, which may have commas."""
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def values_of(key: str, text: str) -> list[Value] | None:
    """The values of `a,b,c` or `0..4`, both ends included; None for a single value.

    Commas within brackets or quotes are part of a value.

    Args:
        key: for the message.
        text: the right side of an override.

    >>> values_of("k", "0..3"), values_of("k", "0.1,0.5"), values_of("k", "[1,2]")
    ([0, 1, 2, 3], [0.1, 0.5], None)

    Raises:
        ConfigError: a value is missing, or a range is empty.
    """
    if key.removeprefix("sweep.") in WORDS:
        return None
    match = RANGE.fullmatch(text)
    if match:
        first, last = int(match[1]), int(match[2])
        if last < first or last - first >= MAX_TRIALS:
            raise ConfigError(
                f"{key}={text}: expected a range from a smaller number to a larger, such as 0..4"
            )
        return list(range(first, last + 1))
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in "'\"":
            quote = "" if letter == quote else quote or letter
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    if len(parts) == 1:
        return None
    if not all(part.strip() for part in parts):
        raise ConfigError(f"{key}={text}: expected a value between commas, got none")
    try:
        return [read_value(part.strip()) for part in parts]
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text}: a value is no valid YAML") from error


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
    space = tree.get("space") or {}
    seeds = _seeds(tree.get("seeds", 1))
    if not isinstance(space, Mapping) or (not space and len(seeds) == 1):
        raise ConfigError(
            "space: expected at least one config key with its values, for example "
            "'partition.alpha: {grid: [0.1, 0.5]}', or several seeds, got none; on the command "
            "line 'partition.alpha=0.1,0.5' and 'seed=0..4'"
        )
    shared = dict(tree.get("set") or {})
    for key in ("seed", "run_dir"):
        if key in space or key in shared:
            raise ConfigError(
                f"{key}: a sweep sets it for each trial; "
                + ("use seeds" if key == "seed" else "choose the folder with sweep --dir")
            )
    if "plugins" in space:
        raise ConfigError("plugins: all trials of a sweep have the same; write them under set")
    if isinstance(shared.get("plugins"), list):  # the command line's, or absolute already
        shared["plugins"] = absolute(list(map(str, shared["plugins"])), Path())
    for key in sorted(set(space) & set(shared)):
        raise ConfigError(f"{key}: it is in the space and in set; remove one")
    return Sweep(
        name=str(tree.get("name", "sweep")),
        experiment=_experiment(tree.get("experiment")),
        set=shared,
        space=tuple(_axis(str(key), value) for key, value in space.items()),
        seeds=seeds,
        samples=_integer(tree.get("samples", 1), "samples", 1),
        sampling_seed=_integer(tree.get("sampling_seed", 0), "sampling_seed", 0),
        stop=_stop(tree.get("stop")),
        note=None if tree.get("note") is None else str(tree["note"]),
        tune_loggers=_tune_loggers(tree.get("tune_loggers")),
        files=section(tree.get("files"), "files"),
    )


def _experiment(value: Value) -> str | Tree:
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, str) and value:
        # Another folder may be the current one when the sweep is resumed.
        return os.fspath(Path(value).resolve()) if Path(value).is_file() else value
    raise ConfigError(
        f"experiment: expected the name or file of an experiment, or a mapping, got {value!r}"
    )


def _axis(key: str, value: Value) -> Axis:
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


def _seeds(value: Value) -> tuple[int, ...]:
    if is_integer(value) and value >= 1:
        return tuple(range(value))
    whole = isinstance(value, list) and value and all(is_integer(s) and s >= 0 for s in value)
    if whole and len(set(value)) == len(value):
        return tuple(value)
    raise ConfigError(
        f"seeds: expected a number of seeds, or a list of different integers >= 0, got {value!r}"
    )


def _stop(value: Value) -> StopRule | None:
    if value is None:
        return None
    known = [field.name for field in dataclasses.fields(StopRule)]
    if not isinstance(value, Mapping):
        raise ConfigError(f"stop: expected null or {', '.join(known)}, got {value!r}")
    for key in value:
        if key not in known:
            raise ConfigError(f"unknown sweep key 'stop.{key}': expected {', '.join(known)}")
    return StopRule(**{key: _integer(item, f"stop.{key}", 0) for key, item in value.items()})


def _tune_loggers(value: Value) -> tuple[str, ...]:
    given = [] if value is None else value if isinstance(value, list) else [value]
    for name in given:
        check_choice("tune_loggers", name, TUNE_LOGGERS)
    return tuple(dict.fromkeys(given))


def _integer(value: Value, key: str, least: int) -> int:
    check_integer(key, value, least)
    return int(value)


def read_named(name: str) -> Tree:
    """A sweep by its name or path, or an experiment as a sweep without a space."""
    is_sweep = FILE_NAME.fullmatch(name) and (conf_root() / "sweep" / f"{name}.yaml").is_file()
    path = Path(name)
    if not is_sweep and path.is_file():
        is_sweep = bool({"space", "experiment", "seeds"} & read_yaml(path).keys())
        if not is_sweep:
            return {"experiment": name}
    if not is_sweep and name in list_experiments():
        return {"experiment": name}
    return read_sweep(name)


def read_sweep(name: str) -> Tree:
    """The content of a sweep file, by its name in `conf/sweep` or its path."""
    named = conf_root() / "sweep" / f"{name}.yaml"
    path = named if FILE_NAME.fullmatch(name) and named.is_file() else Path(name)
    if not path.is_file():
        names = sorted(file.stem for file in (conf_root() / "sweep").glob("*.yaml"))
        raise ConfigError(
            f"no sweep '{name}': expected the path of a YAML file, one of {', '.join(names)}, or "
            f"an experiment{suggest(name, [*names, *list_experiments()])}"
        )
    tree = read_yaml(path)
    for part in (tree.get("set"), tree.get("experiment")):
        if isinstance(part, dict) and isinstance(part.get("plugins"), list):
            part["plugins"] = absolute(list(map(str, part["plugins"])), path.parent)
    return tree


def plain_text(value: Value) -> str:
    """A value of the space as tables and names of folders show it."""
    return format(value, ".6g") if isinstance(value, float) else str(value)


def _yaml_line(value: Value) -> str:
    """A value as the right side of an override."""
    return value if isinstance(value, str) else json.dumps(value)


def describe(cell: Sequence[tuple[str, Value]]) -> str:
    """A cell in one line.

    >>> describe([("partition.alpha", 0.1), ("prompts.count", 5)])
    'partition.alpha=0.1 prompts.count=5'
    """
    return " ".join(f"{key}={plain_text(value)}" for key, value in cell)
