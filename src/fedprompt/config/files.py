"""The YAML files of `conf/`: where they lie, and how they and a user's files are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprompt.config.typed import Tree, section
from fedprompt.core.conf import FILE_NAME as FILE_NAME
from fedprompt.core.conf import TABLE
from fedprompt.core.conf import conf_root as conf_root
from fedprompt.core.errors import ConfigError, suggest


def read_yaml(path: Path) -> Tree:
    """The content of a YAML file of 'key: value' lines.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(
            f"{path}: expected a YAML file of 'key: value' lines, but reading it failed: {cause}"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def read_value(text: str) -> Any:
    """One value, read as the files are: `1e-3` is a number, which it is not to PyYAML.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    content: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    return content["value"]


def read_experiment(name: str) -> Tree:
    """An experiment by its name in `conf/experiment`, or by the path of its file.

    Raises:
        ConfigError: there is none; the message lists the names that exist.
    """
    folder = conf_root() / "experiment"
    if all(map(FILE_NAME.fullmatch, name.split("/"))):
        path = folder / f"{name}.yaml"
        if path.is_file() and path.stem != TABLE:
            return read_yaml(path)
        table = path.with_name(f"{TABLE}.yaml")
        if table.is_file() and path.stem != TABLE:
            content = read_yaml(table)
            last = name.rpartition("/")[2]
            if last in section(content.get("settings"), "settings"):
                return setting(content, last)
    if Path(name).is_file():
        return read_yaml(Path(name))
    names = list_experiments()
    raise ConfigError(
        f"no experiment '{name}': expected the path of a YAML file, or one of {', '.join(names)}"
        f"{suggest(name, names)}"
    )


def list_experiments() -> list[str]:
    """All names in `conf/experiment`, those in tables included, in alphabetical order."""
    folder = conf_root() / "experiment"
    names: list[str] = []
    for path in folder.rglob("*.yaml"):
        file = path.relative_to(folder).with_suffix("")
        inner = section(read_yaml(path).get("settings"), "settings") if file.name == TABLE else None
        found = [file] if inner is None else [file.with_name(name) for name in inner]
        names += [each.as_posix() for each in found]
    return sorted(names)


def setting(table: Tree, name: str) -> Tree:
    """One experiment of a table: what all share, then its parts, each over the ones before.

    Args:
        table: `shared` (lines of an experiment), `parts` (the same by name) and `settings` (for
            each experiment the names of its parts, or lines of its own).
        name: of the experiment.

    >>> table = {"shared": {"prompts": {"count": 5}}, "parts": {"low": {"prompts": {"lr": 0.1}}},
    ...          "settings": {"low_long": ["low", {"rounds": 9}]}}
    >>> setting(table, "low_long")
    {'name': 'low_long', 'prompts': {'count': 5, 'lr': 0.1}, 'rounds': 9}
    """
    parts = section(table.get("parts"), "parts")
    layers = [section(table.get("shared"), "shared")]
    for part in table["settings"][name]:
        if isinstance(part, str) and part not in parts:
            raise ConfigError(
                f"settings.{name}: unknown part '{part}': expected one of {', '.join(parts)}"
                f"{suggest(part, parts)}"
            )
        layers.append(section(parts[part] if isinstance(part, str) else part, f"settings.{name}"))
    experiment: Tree = {"name": name}
    for layer in layers:
        for key, value in layer.items():
            before = experiment.get(key)
            if isinstance(before, dict) and isinstance(value, dict):
                value = {**before, **value}
            experiment[key] = value
    return experiment
