"""Words of messages."""

from __future__ import annotations


def counted(count: float, noun: str) -> str:
    """A number and what it counts, in the plural unless it is one.

    >>> counted(1, "node"), counted(0, "round"), counted(2.0, "CPU")
    ('1 node', '0 rounds', '2 CPUs')
    """
    return f"{count:g} {noun}{'' if count == 1 else 's'}"
