"""Label skew by dealt classes: dominant classes (PFPT's imbalance setting) and shards."""

from __future__ import annotations

import dataclasses

import numpy as np

from fedprompt.core.checks import check_integer, check_number
from fedprompt.core.errors import ConfigError
from fedprompt.data.partition.base import (
    Indices,
    Partitioner,
    check_request,
    class_members,
    collect,
    partitioners,
    round_to_sum,
)


@dataclasses.dataclass(frozen=True)
class ImbalanceOptions:
    """Options of `imbalance`."""

    dominated: int = 1
    """Dominant classes of each client."""
    dominant_share: float = 0.99
    """Share of each class that its own clients get; the others get the rest."""
    min_samples: int = 1
    """A partition in which a client has fewer samples is refused."""

    def __post_init__(self) -> None:
        check_integer("partition.dominated", self.dominated, 1)
        check_number("partition.dominant_share", self.dominant_share, 0)
        if self.dominant_share > 1:
            raise ConfigError(
                f"partition.dominant_share: expected a share from 0 to 1, got {self.dominant_share}"
            )
        check_integer("partition.min_samples", self.min_samples, 0)


@partitioners.register("imbalance", ImbalanceOptions)
def imbalance(options: ImbalanceOptions) -> Partitioner:
    """99 % of each class to the clients that it dominates, index by index as in PFPT's released
    code.

    The lists of `dominant_clients` say who they are, also for a class without samples. The
    first floor(0.99 n_c) samples of class c are dealt to them in equal pieces, the rest is cut by
    one Dirichlet(1) over the other clients in shuffled order. If there are no other clients, the
    class's own get all of it.
    """

    def split(labels: Indices, num_clients: int, seed: int) -> list[Indices]:
        labels = check_request(labels, num_clients, seed, options.min_samples)
        members = class_members(labels)
        _check_dominated(options.dominated, len(members), num_clients)
        generator = np.random.RandomState(seed % 2**32)  # as for `dirichlet`
        lists = dominant_clients(options.dominated, num_clients, len(members), generator)
        everybody = np.arange(num_clients)
        owners = []
        for own, samples in zip(lists, members, strict=True):
            others = np.setdiff1d(everybody, own, assume_unique=True)
            share = options.dominant_share if len(others) else 1.0
            dominant = int(share * len(samples))
            owners.append(np.repeat(own, even_sizes(dominant, len(own))))
            if len(others):
                cuts = np.cumsum(generator.dirichlet(np.ones(len(others))))[:-1]
                generator.shuffle(others)
                rest = len(samples) - dominant
                stops = np.minimum((cuts * rest).astype(np.int64), rest)
                owners.append(np.repeat(others, np.diff(stops, prepend=0, append=rest)))
        parts = collect(np.concatenate(members), np.concatenate(owners), num_clients)
        least = min(len(part) for part in parts)
        if least < options.min_samples:
            smallest = min(len(each) for each in members if len(each))
            raise ConfigError(
                f"partition.min_samples: expected at least {options.min_samples} of "
                f"{len(labels)} samples for each of {num_clients} clients, but the smallest class "
                f"has {smallest} and partition=imbalance left a client {least}; "
                "lower clients.count or partition.min_samples"
            )
        return parts

    return split


def dominant_clients(
    dominated: int, num_clients: int, num_classes: int, generator: np.random.RandomState
) -> list[Indices]:
    """For each class the clients that it dominates, equally many up to rounding.

    `dominated` shuffled rows of all clients in a line, cut at the rounded multiples of
    dominated x clients / classes.

    Args:
        dominated: classes that dominate each client.
        num_clients: how many there are.
        num_classes: arrays that come back.
        generator: source of the shuffles.
    """
    rows = np.tile(np.arange(num_clients, dtype=np.int64), (dominated, 1))
    for row in rows:
        generator.shuffle(row)
    cuts = np.rint(np.arange(1, num_classes) * (dominated * num_clients / num_classes))
    return np.split(rows.reshape(-1), cuts.astype(np.int64))


def even_sizes(total: int, count: int) -> Indices:
    """Sizes that differ by at most one, larger ones first, as `numpy.array_split` makes them.

    >>> even_sizes(7, 3)
    array([3, 2, 2])
    """
    return total // count + (np.arange(count) < total % count).astype(np.int64)


def _check_dominated(dominated: int, num_classes: int, num_clients: int) -> None:
    if dominated > num_classes:
        raise ConfigError(
            f"partition.dominated: expected at most as many dominant classes as there are "
            f"({num_classes}), got {dominated}"
        )
    if dominated * num_clients < num_classes:
        raise ConfigError(
            f"partition.dominated: {num_clients} clients with {dominated} dominant class(es) each "
            f"are {dominated * num_clients} in all, but each of {num_classes} classes must "
            f"dominate a client; raise clients.count or partition.dominated"
        )


@dataclasses.dataclass(frozen=True)
class ShardsOptions:
    """Options of `shards`."""

    classes_per_client: int = 2
    """Each client gets one shard of each of so many classes."""

    def __post_init__(self) -> None:
        check_integer("partition.classes_per_client", self.classes_per_client, 1)


@partitioners.register("shards", ShardsOptions)
def shards(options: ShardsOptions) -> Partitioner:
    """The "pathological" partition: each client has k classes and no other.

    McMahan et al., "Communication-efficient learning of deep networks from decentralized data",
    AISTATS 2017, section 3, sort the samples by class, cut them into m k equal shards and deal k to
    each of m clients. Here no shard crosses the border of a class and no client gets two shards of
    one class, so that k classes are exactly k: class c is cut into about m k n_c / N shards of
    equal size, at least 1 and at most m.
    """

    def split(labels: Indices, num_clients: int, seed: int) -> list[Indices]:
        each = options.classes_per_client
        labels = check_request(labels, num_clients, seed, each)
        members = [samples for samples in class_members(labels) if len(samples)]
        counts = shard_counts(np.array([len(samples) for samples in members]), num_clients, each)
        generator = np.random.default_rng(seed)
        order = generator.permutation(len(members))
        dealt = deal_shards(counts[order], num_clients, generator)
        shards_of = np.split(dealt, np.cumsum(counts[order])[:-1])
        owners = [
            np.repeat(clients, even_sizes(len(members[label]), len(clients)))
            for label, clients in zip(order, shards_of, strict=True)
        ]
        samples = [generator.permutation(members[label]) for label in order]
        parts = collect(np.concatenate(samples), np.concatenate(owners), num_clients)
        return [np.sort(part) for part in parts]

    return split


def shard_counts(class_sizes: Indices, num_clients: int, each: int) -> Indices:
    """Into how many shards each class is cut: (C,), in sum clients x `each`.

    In proportion to the class sizes, within the bounds: at least 1, at most one per client and one
    per sample.

    Args:
        class_sizes: (C,) samples of each class, at least 1.
        num_clients: how many there are.
        each: shards of a client.

    Raises:
        ConfigError: the bounds leave too few or too many shards.
    """
    total, num_classes = num_clients * each, len(class_sizes)
    most = np.minimum(class_sizes, num_clients)
    if total < num_classes:
        raise ConfigError(
            f"clients.count: {num_clients} clients x {each} classes each are {total} shards, but "
            f"{num_classes} classes need at least one each; "
            f"raise clients.count or partition.classes_per_client"
        )
    if total > most.sum():
        raise ConfigError(
            f"partition.classes_per_client: {num_clients} clients x {each} classes each are "
            f"{total} shards, but {num_classes} classes of {class_sizes.min()} to "
            f"{class_sizes.max()} samples give at most {most.sum()}, one per client and sample; "
            "lower clients.count or partition.classes_per_client"
        )
    low, high = 0.0, float(total)  # of shards per sample: at `high` every class is at its bound
    for _ in range(100):
        middle = (low + high) / 2
        if np.clip(class_sizes * middle, 1, most).sum() < total:
            low = middle
        else:
            high = middle
    return round_to_sum(np.clip(class_sizes * high, 1, most), total)


def deal_shards(counts: Indices, num_clients: int, generator: np.random.Generator) -> Indices:
    """The client of each shard, shards in order of class; no client twice within a class.

    The shards lie in rows of as many as there are clients, and each row is a shuffle of all
    clients. A class has at most one shard per client, so it reaches into one next row at most; its
    clients there are drawn from those who have no shard of it.

    Args:
        counts: (C,) shards of each class, at most `num_clients`; in sum a multiple of it.
        num_clients: m.
        generator: of all draws.
    """
    stops = np.cumsum(counts)
    rows = [generator.permutation(num_clients)]
    for border in range(num_clients, int(stops[-1]), num_clients):
        crossing = int(np.searchsorted(stops, border, side="right"))
        before = border - int(stops[crossing] - counts[crossing])  # shards in the row above
        after = int(stops[crossing]) - border if before else 0
        free = generator.permutation(rows[-1][: num_clients - before])
        others = np.concatenate([free[after:], rows[-1][num_clients - before :]])
        rows.append(np.concatenate([free[:after], generator.permutation(others)]))
    return np.concatenate(rows).astype(np.int64)
