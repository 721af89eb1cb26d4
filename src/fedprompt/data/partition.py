"""Who owns which sample: label lists in, one index array per client out. Pure NumPy.

Every partitioner gives each sample to exactly one client and is a function of (labels, clients,
seed) alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedprompt.errors import ConfigError
from fedprompt.registry import Registry
from fedprompt.seeding import derive_seed

Indices = NDArray[np.int64]
Partitioner = Callable[[Indices, int, int], list[Indices]]

partitioners: Registry[Partitioner] = Registry("partition", "fedprompt.data")

MAX_REDRAWS = 1000


def create(name: str, /, **options: Any) -> Partitioner:
    """A partitioner by name: `create("dirichlet", alpha=0.5)(labels, num_clients, seed)`.

    Raises:
        ConfigError: unknown name or option, or an option out of range.
    """
    return partitioners.create(name, **options)


@dataclasses.dataclass(frozen=True)
class IidOptions:
    """No options: samples are dealt at random, equally many to each client."""


@partitioners.register("iid", IidOptions)
def iid(options: IidOptions) -> Partitioner:
    """Shuffle and deal: client sizes differ by at most one."""

    def split(labels: Indices, num_clients: int, seed: int) -> list[Indices]:
        _check_feasible(len(labels), num_clients, 1)
        order = np.random.default_rng(seed).permutation(len(labels))
        return [np.sort(part).astype(np.int64) for part in np.array_split(order, num_clients)]

    return split


@dataclasses.dataclass(frozen=True)
class DirichletOptions:
    """Options of `dirichlet`."""

    alpha: float = 0.5
    """Concentration: small values give each class to few clients."""
    min_samples: int = 1
    """Every client gets at least this many samples; the seed is raised by 1 until it holds."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(
                f"partition.alpha: expected a number > 0, got {self.alpha}; try partition.alpha=0.5"
            )
        if self.min_samples < 1:
            raise ConfigError(
                f"partition.min_samples: expected an integer >= 1, got {self.min_samples}"
            )


@partitioners.register("dirichlet", DirichletOptions)
def dirichlet(options: DirichletOptions) -> Partitioner:
    """One Dirichlet over clients per class, index by index as in PFPT's released code.

    Per class the samples in ascending order are cut at the integer part of (cumulative share x
    class size).
    """

    def draw(labels: Indices, num_clients: int, seed: int) -> list[Indices]:
        classes = np.unique(labels)
        # The legacy generator is what the released partitions were drawn with; it is local, not the
        # global one.
        shares = np.random.RandomState(seed).dirichlet([options.alpha] * num_clients, len(classes))
        pieces: list[list[Indices]] = [[] for _ in range(num_clients)]
        for share, label in zip(shares, classes, strict=True):
            members = np.flatnonzero(labels == label)
            cuts = (np.cumsum(share)[:-1] * len(members)).astype(int)
            for client, piece in enumerate(np.split(members, cuts)):
                pieces[client].append(piece)
        return [np.concatenate(piece).astype(np.int64) for piece in pieces]

    def split(labels: Indices, num_clients: int, seed: int) -> list[Indices]:
        _check_feasible(len(labels), num_clients, options.min_samples)
        # The legacy generator takes 32 bits only.
        start = seed % (2**32 - MAX_REDRAWS)
        for attempt in range(MAX_REDRAWS):
            parts = draw(labels, num_clients, start + attempt)
            if min(len(part) for part in parts) >= options.min_samples:
                return parts
        raise ConfigError(
            f"partition.min_samples: no Dirichlet({options.alpha}) draw gave all "
            f"{num_clients} clients "
            f"at least {options.min_samples} of {len(labels)} samples in {MAX_REDRAWS} tries; "
            f"raise partition.alpha, or lower partition.min_samples or clients.count"
        )

    return split


def split_by_group(
    partitioner: Partitioner, labels: Indices, groups: Indices, num_clients: int, seed: int
) -> list[Indices]:
    """Partition each visual domain by itself, as the paper does with its 4-dataset.

    The clients are dealt to the domains as evenly as possible, earlier domains first. Each domain's
    seed is derived from the run's seed: partitioners raise their seed by 1 to draw again, so that
    neighbouring seeds could end in the same partition.

    Args:
        partitioner: how to partition one domain.
        labels: (N,) class of each sample.
        groups: (N,) domain of each sample.
        num_clients: clients of all domains together.
        seed: of the run.

    Raises:
        ConfigError: fewer clients than domains, or a domain cannot be partitioned.
    """
    names = np.unique(groups)
    if num_clients < len(names):
        raise ConfigError(
            f"clients.count: expected at least one client for each of {len(names)} domains, "
            f"got {num_clients}"
        )
    parts: list[Indices] = []
    for position, group in enumerate(names):
        members = np.flatnonzero(groups == group).astype(np.int64)
        count = num_clients // len(names) + (position < num_clients % len(names))
        drawn = partitioner(labels[members], count, derive_seed(seed, "partition", position))
        parts += [members[part] for part in drawn]
    return parts


def class_counts(parts: list[Indices], labels: Indices, num_classes: int) -> NDArray[np.int64]:
    """How many samples of each class each client owns: (clients, classes)."""
    rows = [np.bincount(labels[part], minlength=num_classes) for part in parts]
    return cast("NDArray[np.int64]", np.stack(rows).astype(np.int64))


def _check_feasible(num_samples: int, num_clients: int, minimum: int) -> None:
    if num_clients < 1:
        raise ConfigError(f"clients.count: expected an integer >= 1, got {num_clients}")
    if num_clients * minimum > num_samples:
        raise ConfigError(
            f"clients.count: {num_clients} clients with at least {minimum} sample(s) each need "
            f"{num_clients * minimum} samples, but the training split has {num_samples}; "
            f"lower clients.count to at most {num_samples // minimum}"
        )
