"""Runs as the lines of a page: those that differ in the seed alone are one, with its interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import yaml

from fedprompt.core.files import Json
from fedprompt.core.intervals import share_interval, t_interval
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.summary import Run, summary_row

UNSAID = (
    *("name", "run_dir", "compare", "note", "sources", "seed", "loggers"),
    *("runtime.name", "runtime.actors", "runtime.cpus", "runtime.driver_node"),
    *("cache.enabled", "cache.folder", "cache.limit_gb", "cache.verify"),
)
"""Keys of a config that change no bit of a result, and the seed."""
SHARES = ("accuracy", "best_accuracy", "balanced_accuracy", "alone_accuracy")
"""Figures of `summary_row` that are shares."""
AMOUNTS = ("prompts", "mb_up", "mb_down", "seconds")
"""Others that are averaged."""

Values = dict[int, tuple[float, float]]
"""By round: place and value."""


@dataclasses.dataclass(frozen=True)
class Mean:
    """A figure of one or several runs."""

    mean: float
    low: float | None = None
    high: float | None = None
    """Ends of the 95 % interval; None for a single run."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Means of a line over its rounds."""

    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


@dataclasses.dataclass(frozen=True)
class Line:
    """Runs that differ in the seed alone."""

    name: str
    runs: tuple[Run, ...]
    config: Mapping[str, object]
    """Keys and values that the runs have in common, without `UNSAID`."""
    seeds: tuple[object, ...]

    def curve(self, read: Callable[[Run], Values], share: bool = False) -> Curve:
        """Means over the rounds that all runs have.

        Args:
            read: of a run, place and value by round.
            share: whether the values are shares, whose intervals stay within 0 and 1.
        """
        found = [read(run) for run in self.runs]
        rounds = sorted(set.intersection(*map(set, found)))
        means = [average([each[index][1] for each in found], share) for index in rounds]
        several = len(self.runs) > 1
        return Curve(
            [float(np.mean([each[index][0] for each in found])) for index in rounds],
            [each.mean for each in means],
            [each.low for each in means if several and each.low is not None],
            [each.high for each in means if several and each.high is not None],
        )

    def figures(self) -> Json:
        """Of `summary_row`: each of `SHARES` and `AMOUNTS` as a `Mean` or None, and the row of the
        first run as `row`.
        """
        rows = [summary_row(run) for run in self.runs]
        found: Json = {"row": rows[0]}
        for name in (*SHARES, *AMOUNTS):
            values = [row[name] for row in rows if row[name] is not None]
            found[name] = average(values, name in SHARES) if len(values) == len(rows) else None
        return found


def average(values: Sequence[float], share: bool) -> Mean:
    """Mean and the ends of its interval.

    Args:
        values: at least one.
        share: whether they are shares, whose interval stays within 0 and 1; else they are amounts.
    """
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return Mean(float(np.mean(values)))
    mean, half = t_interval(values)
    if share:
        ends = share_interval(mean, half)
    else:
        # Amounts are never below zero.
        ends = None if half is None else (max(mean - half, 0.0), mean + half)
    return Mean(mean) if ends is None else Mean(mean, *ends)


def series_of(key: str) -> Callable[[Run], Values]:
    """Reads a key of the records over rounds."""

    def read(run: Run) -> Values:
        rounds, values = run.series(key)
        return {index: (index, value) for index, value in zip(rounds, values, strict=True)}

    return read


def config_of(directory: RunDirectory) -> dict[str, object]:
    """The config of a run, `section.key` by value; empty where there is none that can be read.

    Lists stay as they are.
    """
    try:
        tree = yaml.safe_load(directory.read_config())
    except yaml.YAMLError:
        return {}
    return _flat(tree) if isinstance(tree, Mapping) else {}


def _flat(tree: Mapping[object, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and path != "sources":
            flat.update(_flat(value, f"{path}."))
        else:
            flat[path] = value
    return flat


def lines_of(runs: Sequence[Run]) -> list[Line]:
    """The runs as lines, in the order of their first runs; two with the same seed are two lines."""
    groups: list[tuple[dict[str, object], list[Run], list[object]]] = []
    for run in runs:
        whole = config_of(run.directory)
        seed = whole.get("seed")
        said = {key: value for key, value in whole.items() if key not in UNSAID}
        for config, members, seeds in groups:
            if said and config == said and seed not in seeds:
                members.append(run)
                seeds.append(seed)
                break
        else:
            groups.append((said, [run], [seed]))
    names = _names(groups)
    return [
        Line(name, tuple(members), config, tuple(seeds))
        for name, (config, members, seeds) in zip(names, groups, strict=True)
    ]


def _names(groups: Sequence[tuple[dict[str, object], list[Run], list[object]]]) -> list[str]:
    """A run's own name where it is alone; a group's is the method with what sets it apart."""
    first = [members[0] for _, members, _ in groups]
    if all(len(members) == 1 for _, members, _ in groups):
        return [run.name for run in first]
    methods = [run.name.rpartition("/")[2].partition(" (")[0] for run in first]
    apart = difference([config for config, _, _ in groups])
    names: list[str] = []
    for place, method in enumerate(methods):
        alike = [other for other, each in enumerate(methods) if each == method]
        keys = [
            (key, values[place])
            for key, values in apart.items()
            if len({repr(values[other]) for other in alike}) > 1
        ]
        said = ", ".join(f"{key}={value}" for key, value in keys[:2])
        name = f"{method} ({said})" if said else method
        names.append(name if name not in names else first[place].name)
    return names


def difference(configs: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    """The keys in which configs differ, with the value of each; None where one has no such key.

    Where plug-ins differ, their options are left out: they are not those of the same thing.

    >>> difference([{"a": 1, "m.name": "x", "m.k": 1}, {"a": 2, "m.name": "y"}])
    {'a': [1, 2], 'm.name': ['x', 'y']}
    """
    keys = list(dict.fromkeys(key for config in configs for key in config))
    apart = {
        key: [config.get(key) for config in configs]
        for key in keys
        if len({repr(config.get(key)) for config in configs}) > 1
    }
    other = {key.removesuffix("name") for key in apart if key.endswith(".name")}
    return {
        key: values
        for key, values in apart.items()
        if key.endswith(".name")
        or not any(key.startswith(group) for group in other)
        or all(key in config for config in configs)
    }
