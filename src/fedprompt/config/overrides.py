"""`key=value` on the command line: `group=name`, `group.key=value`, in any order."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import yaml

from fedprompt.config.groups import GROUPS, Scalars, option_types
from fedprompt.config.typed import Tree
from fedprompt.core.errors import ConfigError


def parse_overrides(overrides: Sequence[str]) -> Tree:
    """`["rounds=3", "partition.alpha=0.1"]` -> {"rounds": 3, "partition": {"alpha": 0.1}}.

    Raises:
        ConfigError: one is no `key=value`, or its value no YAML.
    """
    if isinstance(overrides, str):
        raise ConfigError(
            f"overrides: expected a list of key=value, got the text '{overrides}'; "
            f"use ['{overrides}']"
        )
    tree: Tree = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override '{override}': expected key=value, for example rounds=3")
        try:
            value = _read_value(key, text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{override}': the value is no valid YAML") from error
        _assign(tree, key.split("."), value)
    return tree


def _read_value(key: str, text: str) -> object:
    """The value of an override, read as YAML; text stays as it was typed (`run_dir=007`).

    OmegaConf's `from_dotlist` would make a number of it.
    """
    *sections, leaf = key.split(".")
    types_of = [Scalars] if not sections else option_types(".".join(sections))
    hints = [typing.get_type_hints(options).get(leaf) for options in types_of]
    is_text = any(hint in (str, str | None) for hint in hints)
    if is_text and text not in ("", "null", "~") and text[0] not in "'\"":
        return text
    value: object = yaml.safe_load(text) if text else None
    plain = value is None or isinstance(value, (bool, int, float, str, list, dict))
    is_name = not sections and leaf in GROUPS and not isinstance(value, (str, list, dict))
    return text if not plain or (is_name and value is not None) else value


def _assign(tree: Tree, path: Sequence[str], value: object) -> None:
    """Set a value in nested mappings; `group=name` and `group.key=value` may come in any order."""
    *sections, leaf = path
    for section in sections:
        inner = tree.get(section)
        if not isinstance(inner, dict):
            named = section in GROUPS and isinstance(inner, str)
            inner = tree[section] = {"name": inner} if named else {}
        tree = inner
    before = tree.get(leaf)
    if leaf in GROUPS and isinstance(value, str) and isinstance(before, dict):
        value = {"name": value}
    if leaf in GROUPS and isinstance(before, str) and isinstance(value, dict):
        before = {"name": before}
    if isinstance(before, dict) and isinstance(value, dict):
        value = {**before, **value}
    tree[leaf] = value
