"""Who owns which sample: label lists in, one index array per client out. Pure NumPy.

A partitioner is a function of (labels, clients, seed) alone and gives each sample to exactly one
client. Two kinds differ: `long_tail` leaves samples out, which is its purpose, and `file` gives
what the file holds. `natural`, `long_tail` and `file` divide a task as a whole and may look at more
columns than the labels (`WholePartitioner`); the others divide each visual domain by itself
(`split_by_group`). What they share is here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedprompt.core.checks import check_integer, is_integer
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.core.registry import Registry
from fedprompt.core.seeding import derive_seed
from fedprompt.data.task import Origin, Task

Indices = NDArray[np.int64]
Partitioner = Callable[[Indices, int, int], list[Indices]]

partitioners: Registry[Partitioner] = Registry("partition", "fedprompt.data.partition")

LARGEST_LABEL = 10**6


def create(name: str, /, **options: object) -> Partitioner:
    """A partitioner by name: `create("dirichlet", alpha=0.5)(labels, num_clients, seed)`.

    Raises:
        ConfigError: unknown name or option, or an option out of range.
    """
    return partitioners.create(name, **options)


@dataclasses.dataclass(frozen=True)
class Columns:
    """What is known of the samples that are divided, one value each."""

    labels: Indices
    """(N,)"""
    groups: Indices | None = None
    """(N,) visual domain."""
    owners: Indices | None = None
    """(N,) who owns the sample, where the data name an owner."""
    origin: Origin | None = None
    """Where the samples stand in the split as it was published."""


class WholePartitioner:
    """A partitioner that divides all domains at once, because it may look at more than the labels.

    Call it with the columns that it needs: `create("natural")(labels, 4, 0, groups=domains)`.

    Args:
        divide: (columns, clients, seed) -> one index array per client.
        by_owner: whether, for data that name owners, these are what it deals to the clients.
        listed: how many images a file lists, of which some may be held out; None if all that are
            listed are training images.
    """

    def __init__(
        self,
        divide: Callable[[Columns, int, int], list[Indices]],
        by_owner: bool = False,
        listed: int | None = None,
    ) -> None:
        self._divide = divide
        self.by_owner = by_owner
        self.listed = listed

    def __call__(
        self,
        labels: Indices,
        num_clients: int,
        seed: int,
        *,
        groups: Indices | None = None,
        owners: Indices | None = None,
        origin: Origin | None = None,
    ) -> list[Indices]:
        """Divide (N,) samples.

        Raises:
            ConfigError: the samples cannot be divided as asked.
            InputError: a column has another length than the labels.
        """
        labels = check_request(labels, num_clients, seed)
        for name, column in (("groups", groups), ("owners", owners)):
            if column is not None and np.shape(column) != labels.shape:
                raise InputError(
                    f"{name}: expected one value for each of {len(labels)} labels, "
                    f"got an array of shape {np.shape(column)}"
                )
        return self._divide(Columns(labels, groups, owners, origin), num_clients, seed)


def split_task(partitioner: Partitioner, task: Task, num_clients: int, seed: int) -> list[Indices]:
    """Partition the training split of a task: each domain by itself, or all at once where the
    partitioner is of that kind.

    Args:
        partitioner: how to divide.
        task: whose training split is divided.
        num_clients: clients of all domains together.
        seed: of the run.

    Raises:
        ConfigError: the split cannot be partitioned as asked; the message names the domain.
    """
    train = task.train
    if isinstance(partitioner, WholePartitioner):
        return partitioner(
            train.labels,
            num_clients,
            seed,
            groups=train.groups,
            owners=train.clients,
            origin=train.origins(),
        )
    return split_by_group(
        partitioner, train.labels, train.groups, num_clients, seed, task.group_names
    )


def left_out(partitioner: Partitioner, parts: Sequence[Indices]) -> list[str]:
    """What the user should read about images that a file lists and no client trains on.

    Args:
        partitioner: that divided.
        parts: what the clients got.
    """
    listed = getattr(partitioner, "listed", None)
    missing = 0 if listed is None else listed - sum(map(len, parts))
    if not missing:
        return []
    return [
        f"partition: {missing} of {listed} images that the file lists are held out of the training "
        "split, for validation, for the test or by a limit, and no client has them"
    ]


def split_by_group(
    partitioner: Partitioner,
    labels: Indices,
    groups: Indices,
    num_clients: int,
    seed: int,
    group_names: Sequence[str] = (),
) -> list[Indices]:
    """Partition each visual domain by itself, as the paper does with its 4-dataset.

    The clients are dealt to the domains as evenly as possible, earlier domains first. Each domain's
    seed is derived from the run's seed: partitioners raise their seed by 1 to draw again, so that
    neighbouring seeds could end in the same partition. A domain's classes count from its lowest.

    Args:
        partitioner: how to partition one domain.
        labels: (N,) class of each sample.
        groups: (N,) domain of each sample.
        num_clients: clients of all domains together.
        seed: of the run.
        group_names: for messages.

    Raises:
        ConfigError: fewer clients than domains, or a domain cannot be partitioned.
    """
    labels = check_request(labels, num_clients, seed)
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
        own = labels[members] - labels[members].min()
        try:
            drawn = partitioner(own, count, derive_seed(seed, "partition", position))
        except ConfigError as error:
            if len(names) == 1:
                raise
            name = group_names[group] if len(group_names) else group
            raise ConfigError(f"{error} (domain '{name}', which has {count} clients)") from error
        parts += [members[part] for part in drawn]
    return parts


# What the partitioners share


def check_request(
    labels: ArrayLike, num_clients: int, seed: int, min_samples: int = 0, key: str = "clients.count"
) -> Indices:
    """The labels as int64, after everything that can be refused without a draw was refused.

    Args:
        labels: (N,) class numbers from 0.
        num_clients: clients to serve.
        seed: an integer >= 0.
        min_samples: what each client gets at least.
        key: the option that messages about too many clients name.

    Raises:
        InputError: labels or seed are of a wrong kind.
        ConfigError: not enough samples for so many clients.
    """
    values = np.asarray(labels)
    if values.ndim != 1 or not (np.issubdtype(values.dtype, np.integer) or not len(values)):
        raise InputError(
            f"labels: expected a list of class numbers, got shape {values.shape} of {values.dtype}"
        )
    if len(values) and not 0 <= values.min() <= values.max() <= LARGEST_LABEL:
        raise InputError(
            f"labels: expected class numbers from 0 to at most {LARGEST_LABEL}, "
            f"got {values.min()} to {values.max()}"
        )
    check_integer("clients.count", num_clients, 1)
    if not is_integer(seed) or seed < 0:
        raise InputError(f"seed: expected an integer >= 0, got {seed}")
    if not len(values):
        raise ConfigError(f"data: expected samples to give to {num_clients} clients, got none")
    if num_clients * min_samples > len(values):
        raise ConfigError(
            f"{key}: {num_clients} clients with at least {min_samples} sample(s) each need "
            f"{num_clients * min_samples} samples, but the training split has {len(values)}; "
            f"lower {key} to at most {len(values) // min_samples}"
        )
    return values.astype(np.int64)


def class_members(labels: Indices) -> list[Indices]:
    """For each class from 0 to the highest, its samples in ascending order; maybe none.

    >>> [members.tolist() for members in class_members(np.array([2, 0, 2]))]
    [[1], [], [0, 2]]
    """
    order = np.argsort(labels, kind="stable").astype(np.int64)
    sizes = np.bincount(labels)
    return [order[stop - size : stop] for size, stop in zip(sizes, np.cumsum(sizes), strict=True)]


def collect(samples: Indices, owners: Indices, num_clients: int) -> list[Indices]:
    """Each client's samples, in the order in which they come.

    Args:
        samples: (N,) indices.
        owners: (N,) the client of each.
        num_clients: how many arrays come back; a client without samples gets an empty one.

    >>> parts = collect(np.array([7, 5, 6]), np.array([1, 0, 1]), 3)
    >>> [part.tolist() for part in parts]
    [[5], [7, 6], []]
    """
    in_order = samples[np.argsort(owners, kind="stable")].astype(np.int64, copy=False)
    stops = np.cumsum(np.bincount(owners, minlength=num_clients)).tolist()
    return [in_order[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def log_gamma_shares(
    generator: np.random.Generator, alpha: float, rows: int, columns: int
) -> NDArray[np.float64]:
    """Dirichlet(alpha) draws, one a row: (rows, columns); without NaN for any alpha > 0.

    A Gamma(alpha) variable is a Gamma(alpha + 1) variable times U^(1 / alpha) (Marsaglia and Tsang,
    "A simple method for generating gamma variables", 2000, section 6). Its logarithm stays a number
    where the variable itself is below what a float can hold.

    Args:
        generator: source of the draws.
        alpha: concentration of each row.
        rows: how many draws.
        columns: shares in each, which add up to 1.
    """
    alpha = max(alpha, 1e-12)  # below, all of a row lies in one place anyway
    shares = generator.random((rows, columns))
    np.log(np.subtract(1.0, shares, out=shares), out=shares)  # U in (0, 1]
    shares /= alpha
    gammas = generator.standard_gamma(alpha + 1, (rows, columns))
    shares += np.log(gammas, out=gammas)
    del gammas  # with many clients each of these is 100 MB
    shares -= shares.max(axis=1, keepdims=True)
    np.exp(shares, out=shares)
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def round_to_sum(values: NDArray[np.float64], total: int) -> Indices:
    """Integers with the sum `total` next to non-negative values with about that sum.

    Largest remainders: all are rounded down, then those that lost most get 1 back.

    >>> round_to_sum(np.array([1.6, 1.5, 0.9]), 4)
    array([2, 1, 1])
    """
    sizes = np.floor(values).astype(np.int64)
    missing = total - int(sizes.sum())
    if missing < 0:  # by rounding errors alone
        sizes[np.argmax(sizes)] += missing
    elif missing:
        first = np.argsort(-(values - sizes), kind="stable")[:missing]
        sizes[first] += 1
    return sizes


def class_counts(parts: list[Indices], labels: Indices, num_classes: int) -> NDArray[np.int64]:
    """How many samples of each class each client owns: (clients, classes).

    Args:
        parts: each client's indices into `labels`.
        labels: (N,) classes.
        num_classes: columns of the result.
    """
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    cells = owners * num_classes + labels[np.concatenate(parts)]
    counts = np.bincount(cells, minlength=len(parts) * num_classes)
    return cast("NDArray[np.int64]", counts.reshape(len(parts), num_classes).astype(np.int64))


def check_none_empty(parts: list[Indices]) -> None:
    """Refuse clients without samples, who cannot train.

    Raises:
        ConfigError: says how many there are.
    """
    empty = [client for client, part in enumerate(parts) if not len(part)]
    if empty:
        raise ConfigError(
            f"partition: expected at least 1 sample for each of {len(parts)} clients, got none for "
            f"{len(empty)} of them (the first is client {empty[0]}); "
            "set partition.min_samples=1 or lower clients.count"
        )
