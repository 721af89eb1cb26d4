"""The figures of a round: one number for each name, the same for every logger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fedprompt.core.files import Json

PER_CLIENT = "by_client"
"""What `personalised` has of each client."""


def figures_of(record: Json, domains: Sequence[str] = ()) -> dict[str, float]:
    """The numbers of a line of `rounds.jsonl`, those of nested objects as `seconds.train`.

    What is null, such as the accuracy of a round without evaluation, is left out, and so is what
    there is of each client and of each class.

    Args:
        record: of a round.
        domains: their names; where there are several, `domain_accuracy.NAME` is among the figures.

    >>> figures_of({"round": 2, "loss": None, "seconds": {"train": 0.5}, "class_accuracy": [1.0]})
    {'round': 2, 'seconds.train': 0.5}
    """
    by_domain = record.get("domain_accuracy") or ()
    if len(domains) > 1 and len(by_domain) == len(domains):
        record = {**record, "domain_accuracy": dict(zip(domains, by_domain, strict=True))}
    return dict(_numbers(record))


def _numbers(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and key != PER_CLIENT:
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
