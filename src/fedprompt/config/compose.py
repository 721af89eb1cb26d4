"""From an experiment's name and `key=value` overrides to a checked config."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedprompt.config.experiment import ExperimentConfig, build
from fedprompt.config.files import read_experiment
from fedprompt.config.layers import Sources, flatten, merge
from fedprompt.config.overrides import parse_overrides
from fedprompt.config.typed import Tree, section, shown
from fedprompt.core.errors import ConfigError
from fedprompt.core.plugins import load_plugins


def compose(
    config: str | os.PathLike[str] | Mapping[str, object],
    overrides: Sequence[str] = (),
    files: Mapping[str, Tree] | None = None,
) -> ExperimentConfig:
    """Compose and check an experiment; `layers` says which source wins.

    Args:
        config: name of a file in `conf/experiment/`, such as `quickstart` or
            `paper/cifar100_alpha_0.1`, path of a YAML file, or a mapping.
        overrides: `key=value` strings.
        files: those of `conf/` that were read before, by `GROUP/NAME` (see `Sources`).

    Raises:
        ConfigError: a file is missing or no YAML, a key is unknown, or a value is wrong.
    """
    if isinstance(config, Mapping):
        experiment = {str(key): value for key, value in config.items()}
    else:
        experiment = read_experiment(os.fspath(config))
    command = parse_overrides(overrides)
    if "sources" in command:
        raise ConfigError(
            "sources: says what a run was composed of and is no option; expected key=value of the "
            "experiment itself, for example rounds=3"
        )
    _load_plugins(config, experiment, command)
    kept = experiment.pop("sources", None)
    if kept is None:
        sources = Sources(experiment, command, dict(files or {}))
        return build(flatten(sources), sources)
    # A run's config.yaml: complete, and what it was composed of.
    sources = Sources.from_tree(kept)
    for key, lines in (files or {}).items():
        sources.files.setdefault(key, lines)
    known = dict(sources.files)
    complete = flatten(Sources(experiment, {}, known))
    said = build(complete, sources, compared=False).said
    model = command.get("model")
    # Another method or model is not to inherit what the run's own one brought along.
    if "method" in command or isinstance(model, str) or "name" in section(model, "model"):
        return _again(said, experiment, command)
    said = Sources(said.experiment, merge(said.command, command), said.files)
    return build(flatten(Sources(experiment, command, known)), said)


def _again(said: Sources, experiment: Tree, command: Tree) -> ExperimentConfig:
    """The experiment of a `config.yaml` composed anew, with another method."""
    kept: Tree = {key: experiment[key] for key in ("name", "compare") if key in experiment}
    sources = Sources(said.experiment, merge(said.command | kept, command))
    return build(flatten(sources), sources)


def _load_plugins(
    config: str | os.PathLike[str] | Mapping[str, object], experiment: Tree, command: Tree
) -> None:
    """Load the plug-ins, before anything else is looked up, and put their full paths in place."""
    given = command if "plugins" in command else experiment
    specs = given.get("plugins") or []
    if not isinstance(specs, (list, tuple)) or not all(isinstance(each, str) for each in specs):
        raise ConfigError(f"plugins: expected a list such as [rule.py], got {shown(specs)}")
    base = None
    if given is experiment and not isinstance(config, Mapping):
        base = Path(os.fspath(config)).parent
    if specs:
        given["plugins"] = [plugin.key for plugin in load_plugins(specs, base)]
