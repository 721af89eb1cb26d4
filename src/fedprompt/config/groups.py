"""The groups of a config, `group: name`, and the sections: which keys there are and what they take.

A file `conf/GROUP/NAME.yaml` holds what differs from the defaults of the entry's dataclass.
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from fedprompt.aggregation import aggregators
from fedprompt.attacks import attacks
from fedprompt.client.recipe import TrainingOptions
from fedprompt.config import files
from fedprompt.config.files import FILE_NAME, read_yaml
from fedprompt.config.typed import Tree, as_name, section, shown, typed
from fedprompt.core.errors import ConfigError, suggest
from fedprompt.core.plugins import conf_folders
from fedprompt.core.registry import Registry
from fedprompt.data.partition.base import partitioners
from fedprompt.data.prefix.cache import CacheOptions
from fedprompt.data.task import datasets
from fedprompt.defences import defences
from fedprompt.models.adaptation import tunings
from fedprompt.models.head import HeadOptions
from fedprompt.models.options import ModelOptions
from fedprompt.models.selection import PromptOptions
from fedprompt.objectives import objectives
from fedprompt.prompt_generators import generators
from fedprompt.runtime import runtimes
from fedprompt.runtime.base import RuntimeOptions
from fedprompt.server.privacy import PrivacyOptions
from fedprompt.server.virtual import SystemOptions
from fedprompt.tracking.callbacks import run_callbacks
from fedprompt.tracking.loggers import loggers

REGISTRIES: dict[str, Registry[Any]] = {
    "aggregator": aggregators,
    "objective": objectives,
    "data": datasets,
    "partition": partitioners,
    "runtime": runtimes,
    "generator": generators,
    "tuning": tunings,
    "defence": defences,
    "attack": attacks,
}
LISTS: dict[str, Registry[Any]] = {"loggers": loggers, "callbacks": run_callbacks}
"""Keys that take a list, of names and of sections with a name."""
NEWER = {"defence": "none", "attack": "none"}
"""Groups that the `config.yaml` of an older run may lack, with what it ran with."""
GROUPS = (*REGISTRIES, "head", "model")
"""Keys that take the name of a file in `conf/GROUP`, or a section."""
SECTIONS: dict[str, type] = {
    "runtime": RuntimeOptions,
    "head": HeadOptions,
    "model": ModelOptions,
    "prompts": PromptOptions,
    "clients": TrainingOptions,
    "cache": CacheOptions,
    "system": SystemOptions,
    "privacy": PrivacyOptions,
}
"""Keys whose options are the same whatever is named."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """An entry of a registry with its options."""

    name: str
    options: Any
    """Instance of the entry's options dataclass."""

    def tree(self) -> Tree:
        """As a plain mapping."""
        return {"name": self.name, **dataclasses.asdict(self.options)}


@dataclasses.dataclass(frozen=True)
class Scalars:
    """The top-level values that are no sections, with their defaults."""

    method: str
    """A preset of `conf/method`: which rules and options the leading method has."""
    name: str = "experiment"
    """Of the experiment; it names the run's folder."""
    seed: int = 0
    """Of every draw, from 0."""
    rounds: int = 10
    """Communication rounds."""
    eval_every: int = 1
    """Rounds from one evaluation to the next; the last round is always measured."""
    eval_clients: str = "last"
    """When each client's own model is measured on its share of the held-out splits: after the
    `last` round, at `every` evaluation, or `never`."""
    eval_alone: str = "last"
    """When the global model is measured once more with prompts that each test image selects by
    itself: after the `last` round, at `every` evaluation, or `never`."""
    run_dir: str | None = None
    """Where the run is written; null: `runs/`, with the experiment's name and the time."""
    note: str | None = None
    """What the reader of the result should know; shown under the summary table."""
    compare: list[str] = dataclasses.field(default_factory=list)
    """Methods that run after the leading one, on the same data."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Files and modules of your own that add names."""


def load_group(group: str, name: str) -> Tree:
    """One file of a group.

    Raises:
        ConfigError: no such file, and nothing registered under the name.
    """
    path = _group_file(group, name)
    if path is not None:
        return read_yaml(path)
    registry = REGISTRIES.get(group)
    if registry is not None:
        registry.entry(name)  # raises for an unknown name, with the names that exist
    path = _group_file(group, name, installed=True)
    if path is not None:
        return read_yaml(path)
    if registry is not None:
        return {"name": name}
    roots = (files.conf_root(), *conf_folders())
    names = sorted({file.stem for root in roots for file in (root / group).glob("*.yaml")})
    raise ConfigError(
        f"unknown {group} '{name}': expected one of {', '.join(names)}{suggest(name, names)}"
    )


def _group_file(group: str, name: str, installed: bool = False) -> Path | None:
    """The file of a name: the package's own, or that of a plug-in."""
    if not FILE_NAME.fullmatch(name):
        return None
    roots = (files.conf_root(), *conf_folders(installed))
    found = (root / group / f"{name}.yaml" for root in roots)
    return next((path for path in found if path.is_file()), None)


def choice_of(group: str, value: object) -> Choice:
    """An entry of a group's registry with its options, from a section."""
    options = section(value, group, named=True)
    entry = REGISTRIES[group].entry(as_name(options.pop("name", None) or NEWER.get(group)))
    return Choice(entry.name, typed(entry.options, options, group))


def choices_of(key: str, value: object) -> tuple[Choice, ...]:
    """Entries of a registry with their options, from a list of names and of sections.

    Args:
        key: of `LISTS`.
        value: what stands under the key; a name alone is a list of one.

    Raises:
        ConfigError: it is no such list, or an entry is unknown or has wrong options.
    """
    given = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)):
        example = LISTS[key].names()[0]
        raise ConfigError(
            f"{key}: expected a list of names and of sections with a name, such as [{example}] or "
            f"[{{name: {example}}}], got {shown(value)}"
        )
    choices = []
    for each in given:
        options = {"name": each} if isinstance(each, str) else section(each, key, named=True)
        if "name" not in options:
            raise ConfigError(f"{key}: expected a section with a name, got {shown(each)}")
        entry = LISTS[key].entry(as_name(options.pop("name")))
        choices.append(Choice(entry.name, typed(entry.options, options, entry.name)))
    return tuple(choices)


def option_types(key: str) -> list[type]:
    """The options dataclasses that a section may hold."""
    if key in SECTIONS:
        return [SECTIONS[key]]
    registry = REGISTRIES.get(key)
    return [registry.entry(name).options for name in registry.names()] if registry else []


def owners(key: str) -> str:
    """`"; did you mean 'partition.alpha'?"` for a key that was written without its section."""
    dotted = [
        f"'{place}.{key}'"
        for place in (*SECTIONS, *(each for each in REGISTRIES if each not in SECTIONS))
        if any(key in typing.get_type_hints(options) for options in option_types(place))
    ]
    return f"; did you mean {' or '.join(dotted)}?" if dotted else ""
