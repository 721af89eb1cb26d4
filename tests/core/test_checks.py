"""Options that no run can be made with are refused in one line that names the key."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedprompt.core import checks
from fedprompt.core.errors import ConfigError

REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "choice": (
        lambda: checks.check_choice("a.b", "kayed", ("keyed", "all")),
        "a.b: expected one of keyed, all, got 'kayed'; did you mean 'keyed'?",
    ),
    "no text": (
        lambda: checks.check_choice("a.b", 3, ("keyed", "all")),
        "a.b: expected one of keyed, all, got '3'",
    ),
    "small": (
        lambda: checks.check_integer("a.b", 1, 2),
        "a.b: expected an integer >= 2, got 1",
    ),
    "fraction": (
        lambda: checks.check_integer("a.b", 2.5, 2),
        "a.b: expected an integer >= 2, got 2.5",
    ),
    "bool": (
        lambda: checks.check_integer("a.b", True, 0),
        "a.b: expected an integer >= 0, got True",
    ),
    "text": (
        lambda: checks.check_number("a.b", "x", 0),
        "a.b: expected a finite number >= 0, got 'x'",
    ),
    "nan": (
        lambda: checks.check_number("a.b", math.nan, 0),
        "a.b: expected a finite number >= 0, got nan",
    ),
    "infinite": (
        lambda: checks.check_number("a.b", math.inf, 0),
        "a.b: expected a finite number >= 0, got inf",
    ),
    "edge": (
        lambda: checks.check_number("a.b", 0.0, 0, above=True),
        "a.b: expected a finite number > 0, got 0.0",
    ),
    "other edge": (
        lambda: checks.check_number("a.b", 1, 0, below=1),
        "a.b: expected a finite number >= 0 and < 1, got 1",
    ),
    "no flag": (
        lambda: checks.check_flag("a.b", 1),
        "a.b: expected true or false, got 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_key_expectation_and_value(name: str) -> None:
    check, message = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        check()
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(3)])
def test_integers_of_numpy_are_integers(value: Any) -> None:
    checks.check_integer("a.b", value, 2)
    checks.check_number("a.b", value, 2)


@pytest.mark.parametrize("value", [0.0, np.float32(0.5), 0])
def test_numbers_inside_the_bounds_pass(value: Any) -> None:
    checks.check_number("a.b", value, 0, below=1)
