"""From YAML values to dataclasses: OmegaConf converts and checks them, this file words the errors.

An error is one line: the key, what was expected, what was received, the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from fedprompt.core.errors import ConfigError, suggest

Tree = dict[str, Any]
"""YAML as mappings, lists and values."""
T = TypeVar("T")

_KINDS: dict[object, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
}


def typed(options: type[T], values: object, prefix: str) -> T:
    """An instance of a dataclass from a mapping: keys checked, values converted by OmegaConf.

    Args:
        options: the dataclass.
        values: a mapping, or None for an empty one.
        prefix: key of the section, for messages; empty at the top.

    Raises:
        ConfigError: unknown key or wrong value.
    """
    given = section(values, prefix)
    schema, hints = _schema(typing.cast(Hashable, options))
    for key, value in given.items():
        dotted = f"{prefix}.{key}" if prefix else key
        if key not in hints:
            raise ConfigError(_unknown_key(options, prefix, key))
        # OmegaConf takes "???" for "no value", and its versions differ in what else they accept.
        missing = isinstance(value, str) and value == "???"
        fraction = isinstance(value, float) and hints[key] in (int, int | None)
        no_list = typing.get_origin(hints[key]) is list and not _is_flat_list(value)
        if missing or fraction or no_list:
            raise ConfigError(f"{dotted}: expected {kind(hints[key])}, got {shown(value)}")
    try:
        built = OmegaConf.to_object(OmegaConf.merge(schema, given))
    except OmegaConfBaseException as error:
        field = re.split(r"\W", str(error.full_key or ""))[0]
        dotted = ".".join(part for part in (prefix, field) if part)
        if field not in hints or isinstance(error, InterpolationResolutionError):
            text = str(error.msg or error).splitlines()[0]
            raise ConfigError(f"{dotted}: {text}" if dotted else text) from error
        raise ConfigError(
            f"{dotted}: expected {kind(hints[field])}, got {shown(given.get(field))}"
        ) from error
    return typing.cast(T, built)


@functools.cache
def _schema(options: Hashable) -> tuple[DictConfig, dict[str, object]]:
    """A dataclass as OmegaConf sees it, and its types: merging copies the one and keeps both."""
    return OmegaConf.structured(options), typing.get_type_hints(options)


def section(value: object, key: str, named: bool = False) -> Tree:
    """A mapping as a new dictionary; None is an empty one.

    Args:
        value: what stands under the key.
        key: for the message.
        named: whether the name of a file in `conf` may stand there as well.

    Raises:
        ConfigError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        what = "the name of a file in conf, or " if named else ""
        raise ConfigError(
            f"{key}: expected {what}a section of 'key: value' lines, got {shown(value)}"
        )
    return {str(name): item for name, item in value.items()}


def as_name(value: object) -> str:
    """A name as it is looked up and quoted in messages."""
    return value if isinstance(value, str) else shown(value)


def shown(value: object) -> str:
    """A value as YAML would write it in one line.

    >>> shown("abc"), shown(None), shown([1])
    ("'abc'", 'null', '[1]')
    """
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


def kind(hint: object) -> str:
    """A type in words.

    >>> kind(int | None), kind(float | int | str)
    ('an integer or null', 'a number or text')
    """
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        members = typing.get_args(hint)
        if float in members:  # an integer is a number
            members = tuple(each for each in members if each is not int)
        kinds = ["null" if each is type(None) else kind(each) for each in members]
        return " or ".join(kinds)
    if typing.get_origin(hint) is list:
        numbers = typing.get_args(hint) == (float,)
        return "a list of numbers" if numbers else "a list of names such as [a, b]"
    return _KINDS.get(hint, str(hint))


def _is_flat_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _unknown_key(options: type, prefix: str, key: str) -> str:
    known = [field.name for field in dataclasses.fields(options)]
    if not known:
        return f"unknown config key '{prefix}.{key}': this {prefix} takes no options; remove it"
    near = suggest(key, known)
    hint = near.replace("'", f"'{prefix}.", 1) if near else ""
    return f"unknown config key '{prefix}.{key}': expected one of {', '.join(known)}{hint}"
