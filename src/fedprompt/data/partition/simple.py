"""Partitions that need no skew model: `iid`, `quantity` and `natural`."""

from __future__ import annotations

import dataclasses

import numpy as np

from fedprompt.core.checks import check_choice, check_integer, check_number
from fedprompt.core.errors import ConfigError
from fedprompt.data.partition.base import (
    Columns,
    Indices,
    Partitioner,
    WholePartitioner,
    check_request,
    collect,
    log_gamma_shares,
    partitioners,
    round_to_sum,
)

# The simple partitioners


@dataclasses.dataclass(frozen=True)
class IidOptions:
    """No options: samples are dealt at random, equally many to each client."""


@partitioners.register("iid", IidOptions)
def iid(options: IidOptions) -> Partitioner:
    """Shuffle and deal: client sizes differ by at most one."""

    def split(labels: Indices, num_clients: int, seed: int) -> list[Indices]:
        check_request(labels, num_clients, seed, 1)
        order = np.random.default_rng(seed).permutation(len(labels))
        return [np.sort(part).astype(np.int64) for part in np.array_split(order, num_clients)]

    return split


@dataclasses.dataclass(frozen=True)
class QuantityOptions:
    """Options of `quantity`."""

    alpha: float = 0.5
    """Concentration of the client sizes: small values give most samples to few clients."""
    min_samples: int = 1
    """Every client gets at least this many samples."""

    def __post_init__(self) -> None:
        check_number("partition.alpha", self.alpha, 0, above=True)
        check_integer("partition.min_samples", self.min_samples, 0)


@partitioners.register("quantity", QuantityOptions)
def quantity(options: QuantityOptions) -> Partitioner:
    """Skewed sizes, all with the same class distribution.

    "Quantity skew" of Li et al., "Federated learning on non-IID data silos", ICDE 2022, with a
    floor instead of redraws: client i gets n_min + q_i (N - m n_min) samples, q ~
    Dirichlet(alpha) over the m clients, rounded to the sum N by largest remainders.
    """

    def split(labels: Indices, num_clients: int, seed: int) -> list[Indices]:
        labels = check_request(labels, num_clients, seed, options.min_samples)
        generator = np.random.default_rng(seed)
        shares = log_gamma_shares(generator, options.alpha, 1, num_clients)[0]
        free = len(labels) - num_clients * options.min_samples
        sizes = options.min_samples + round_to_sum(shares * free, free)
        owners = np.repeat(np.arange(num_clients), sizes)
        # Shuffled owners rather than samples: each client's samples stay in ascending order.
        return collect(np.arange(len(labels)), generator.permutation(owners), num_clients)

    return split


@dataclasses.dataclass(frozen=True)
class NaturalOptions:
    """Options of `natural`."""

    by: str = "auto"
    """`client` (who owns a sample, as the data say), `domain`, or `auto`: the first that the data
    have."""

    def __post_init__(self) -> None:
        check_choice("partition.by", self.by, ("auto", "client", "domain"))


@partitioners.register("natural", NaturalOptions)
def natural(options: NaturalOptions) -> Partitioner:
    """By a column of the data: no value of it (a writer, a hospital, a domain) is divided.

    With as many clients as values, client i has the i-th value in ascending order. With fewer
    clients, the values are shuffled and dealt, equally many to each client.
    """

    def divide(columns: Columns, num_clients: int, seed: int) -> list[Indices]:
        name, column = _natural_column(columns, options.by)
        values, members = np.unique(column, return_inverse=True)
        if num_clients > len(values):
            raise ConfigError(
                f"clients.count: partition=natural divides no {name}, and the training split has "
                f"{len(values)} for {num_clients} clients; set clients.count={len(values)} "
                "or less, or pick another partition"
            )
        clients_of = np.arange(len(values))
        if num_clients < len(values):
            order = np.random.default_rng(seed).permutation(len(values))
            clients_of[order] = np.arange(len(values)) * num_clients // len(values)
        return collect(np.arange(len(column)), clients_of[members], num_clients)

    return WholePartitioner(divide, by_owner=options.by in ("auto", "client"))


def _natural_column(columns: Columns, by: str) -> tuple[str, Indices]:
    choices = {"client": columns.owners, "domain": columns.groups}
    for name, column in choices.items():
        if by in ("auto", name) and column is not None:
            return name, np.asarray(column)
    wanted = "groups= or owners=" if by == "auto" else f"a {by} for each sample"
    raise ConfigError(
        f"partition.by: partition=natural expected {wanted}, but the data have no such column; "
        "pick another partition"
    )
