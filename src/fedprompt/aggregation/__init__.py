"""Aggregators: pure functions that merge the clients' prompt sets. `create(name, **options)`
builds one.
"""

from __future__ import annotations

from fedprompt.aggregation.base import Aggregation, Aggregator, SharedRule, aggregators
from fedprompt.aggregation.cohort import Cohort
from fedprompt.aggregation.inputs import AggregationInput

__all__ = [
    "Aggregation",
    "AggregationInput",
    "Aggregator",
    "Cohort",
    "SharedRule",
    "aggregators",
    "create",
    "names",
]


def create(name: str, **options: object) -> Aggregator:
    """Build the aggregator called `name`.

    Raises:
        ConfigError: unknown name, unknown option, or a value that the options refuse.
    """
    return aggregators.create(name, **options)


def names() -> list[str]:
    """The names of all aggregators."""
    return aggregators.names()
