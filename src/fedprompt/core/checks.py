"""Checks of single options; a refusal names the key, what is expected and what was received."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import TypeGuard

from fedprompt.core.errors import ConfigError, suggest


def check_choice(key: str, value: object, choices: Collection[str]) -> None:
    """Refuse what is none of some names.

    Args:
        key: of the configuration, `prompts.selection`.
        value: what was given.
        choices: the names.

    Raises:
        ConfigError: with the nearest name.
    """
    if value not in choices:
        near = suggest(str(value), choices)
        raise ConfigError(f"{key}: expected one of {', '.join(choices)}, got '{value}'{near}")


def check_integer(key: str, value: object, least: int) -> None:
    """Refuse what is not an integer >= `least`.

    Args:
        key: the option's full name, for the message.
        value: what was given.
        least: the smallest that is allowed.

    Raises:
        ConfigError: names the key.
    """
    if not (is_integer(value) and value >= least):
        raise ConfigError(f"{key}: expected an integer >= {least}, got {value!r}")


def check_number(
    key: str, value: object, least: float, *, above: bool = False, below: float = math.inf
) -> None:
    """Refuse what is not a finite number >= `least`, or > `least` if `above`, and < `below`.

    Args:
        key: the option's full name, for the message.
        value: what was given.
        least: the lower bound.
        above: whether `least` itself is refused.
        below: the upper bound, which is refused itself.

    Raises:
        ConfigError: names the key.
    """
    fits = is_number(value) and (value > least if above else value >= least) and value < below
    if not fits:
        bound = "" if below == math.inf else f" and < {below:g}"
        raise ConfigError(
            f"{key}: expected a finite number {'>' if above else '>='} {least:g}{bound}, "
            f"got {value!r}"
        )


def check_flag(key: str, value: object) -> None:
    """Refuse what is neither true nor false.

    Raises:
        ConfigError: names the key.
    """
    if not is_flag(value):
        raise ConfigError(f"{key}: expected true or false, got {value!r}")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite real number and no bool."""
    try:
        fits = isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
    return fits and not is_flag(value)


def is_flag(value: object) -> bool:
    """Whether a value is true or false."""
    return isinstance(value, bool)
