"""Aggregators: pure functions that merge the clients' prompt sets. `create(name, **options)`
builds one.
"""

from __future__ import annotations

from typing import Any

from fedprompt.aggregation.base import (
    Aggregation,
    Aggregator,
    SharedRule,
    aggregators,
    check_inputs,
)

__all__ = [
    "Aggregation",
    "Aggregator",
    "SharedRule",
    "aggregators",
    "check_inputs",
    "create",
    "names",
]


def create(name: str, **options: Any) -> Aggregator:
    """Build the aggregator called `name`.

    Raises:
        ConfigError: unknown name, unknown option, or a value that the options refuse.
    """
    return aggregators.create(name, **options)


def names() -> list[str]:
    """The names of all aggregators."""
    return aggregators.names()
