"""Work that says how far it is: a generator of its progress, which returns the result."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def done(steps: Generator[object, None, T]) -> T:
    """Do all the work and return its result, for those whom the progress does not concern.

    >>> def work():
    ...     yield "half way"
    ...     return 42
    >>> done(work())
    42
    """
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
