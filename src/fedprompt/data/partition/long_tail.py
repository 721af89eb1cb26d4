"""A long-tailed class profile over all clients, then any other partition of what is left."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fedprompt.core.checks import check_number
from fedprompt.core.errors import ConfigError
from fedprompt.core.seeding import derive_seed
from fedprompt.data.partition.base import (
    Columns,
    Indices,
    Partitioner,
    WholePartitioner,
    class_members,
    create,
    partitioners,
    split_by_group,
)


@dataclasses.dataclass(frozen=True)
class LongTailOptions:
    """Options of `long_tail`."""

    imbalance_factor: float = 100.0
    """IF: the largest class over the smallest; 1 keeps equally many of each class."""
    then: str = "dirichlet"
    """The partition of the samples that are kept."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its options: `partition.options.alpha=0.1`."""

    def __post_init__(self) -> None:
        check_number("partition.imbalance_factor", self.imbalance_factor, 1)
        if self.then in ("long_tail", "file"):
            raise ConfigError(
                f"partition.then: expected a partition that divides samples by itself, "
                f"got '{self.then}'; try partition.then=dirichlet"
            )
        create(self.then, **{str(key): value for key, value in self.options.items()})


@partitioners.register("long_tail", LongTailOptions)
def long_tail(options: LongTailOptions) -> Partitioner:
    """Keep n_c = floor(n_max IF^(-c / (C - 1))) samples of class c = 0 .. C-1, then partition them.

    The exponential profile of Cui et al., "Class-balanced loss based on effective number of
    samples", CVPR 2019, over all domains together: n_max is the size of the largest class, and a
    class that has fewer samples than its n_c keeps them all. The others are left out: this is the
    one partitioner that does not give every sample to a client. Which are kept is drawn by the
    seed. Classes without samples are not counted.
    """
    then = create(options.then, **options.options)

    def divide(columns: Columns, num_clients: int, seed: int) -> list[Indices]:
        members = [each for each in class_members(columns.labels) if len(each)]
        sizes = np.array([len(each) for each in members])
        generator = np.random.default_rng(derive_seed(seed, "partition/long_tail"))
        wanted = tail_sizes(sizes, options.imbalance_factor)
        kept = np.sort(
            np.concatenate(
                [
                    generator.permutation(each)[:size]
                    for each, size in zip(members, wanted, strict=True)
                ]
            )
        )
        labels = columns.labels[kept]
        groups = None if columns.groups is None else columns.groups[kept]
        owners = None if columns.owners is None else columns.owners[kept]
        if isinstance(then, WholePartitioner):
            origin = None if columns.origin is None else columns.origin.take(kept)
            parts = then(labels, num_clients, seed, groups=groups, owners=owners, origin=origin)
        elif groups is None:
            parts = then(labels, num_clients, seed)
        else:
            parts = split_by_group(then, labels, groups, num_clients, seed)
        return [kept[part] for part in parts]

    return WholePartitioner(divide, by_owner=getattr(then, "by_owner", False))


def tail_sizes(sizes: Indices, imbalance_factor: float) -> Indices:
    """How many samples each class keeps, at least 1: (C,) from its (C,) samples.

    >>> tail_sizes(np.array([500, 500, 500]), 100)
    array([500,  50,   5])
    """
    exponents = np.arange(len(sizes)) / max(len(sizes) - 1, 1)
    profile = sizes.max() * imbalance_factor**-exponents
    # The small sum undoes rounding errors: 49 * (1 / 49) is below 1.
    wanted: Indices = np.minimum(np.floor(profile + 1e-9).astype(np.int64), sizes)
    return np.maximum(wanted, 1)
