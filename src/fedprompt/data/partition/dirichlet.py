"""Label skew by Dirichlet draws: over the clients for each class, or over the classes for each
client.

Both are called "Dirichlet(alpha) partition" in papers. PFPT's text describes the second; its
released code, and with it the paper's numbers, does the first (`dirichlet`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedprompt.core.checks import check_integer, check_number
from fedprompt.core.errors import ConfigError
from fedprompt.data.partition.base import (
    Indices,
    Partitioner,
    check_request,
    class_members,
    collect,
    log_gamma_shares,
    partitioners,
)

MAX_REDRAWS = 1000
SEEDS = 2**32 - 1000
"""The legacy generator takes 32 bits only; room is left for the redraws."""
MAX_SHARES = 10**8
"""Shares (classes x clients x redraws) that are drawn before a request is given up, some 10 s."""


@dataclasses.dataclass(frozen=True)
class DirichletOptions:
    """Options of `dirichlet`."""

    alpha: float = 0.5
    """Concentration: small values give each class to few clients."""
    min_samples: int = 1
    """Every client gets at least this many samples; the seed is raised by 1 until it holds."""

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_integer("partition.min_samples", self.min_samples, 0)


@partitioners.register("dirichlet", DirichletOptions)
def dirichlet(options: DirichletOptions) -> Partitioner:
    """One Dirichlet over clients per class, index by index as in PFPT's released code.

    For each class c a share q_c ~ Dirichlet(alpha) over the m clients; the n_c samples of the class
    in ascending order are cut at floor(n_c (q_c1 + .. + q_ci)), and piece i goes to client i. Seed
    s + 1 follows seed s until every client has `min_samples` (the released "more than `least`" is
    min_samples = least + 1).
    """

    def split(labels: Indices, num_clients: int, seed: int) -> list[Indices]:
        labels = check_request(labels, num_clients, seed, options.min_samples)
        members = class_members(labels)
        class_sizes = np.array([len(each) for each in members])
        start = seed % SEEDS
        tries = min(MAX_REDRAWS, max(1, MAX_SHARES // (len(members) * num_clients)))
        clients = np.arange(num_clients)
        for attempt in range(tries):
            held = np.zeros(num_clients, np.int64)
            owners = []
            for sizes in draw_pieces(class_sizes, num_clients, options.alpha, start + attempt):
                held += sizes
                owners.append(np.repeat(clients, sizes))
            if held.min() >= options.min_samples:
                return collect(np.concatenate(members), np.concatenate(owners), num_clients)
        raise ConfigError(
            f"partition.min_samples: no Dirichlet({options.alpha:g}) draw gave all "
            f"{num_clients} clients at least {options.min_samples} of {len(labels)} samples in "
            f"{tries} tries; raise partition.alpha, or lower partition.min_samples or clients.count"
        )

    return split


def draw_pieces(
    class_sizes: Indices, num_clients: int, alpha: float, seed: int
) -> Iterator[Indices]:
    """How many samples of a class go to each client, (m,), class by class.

    Args:
        class_sizes: (C,); a class without samples draws its shares, too, as in the released code.
        num_clients: m.
        alpha: concentration.
        seed: of the legacy generator, below 2^32.
    """
    # The generator that the released partitions were drawn with; a local one, not NumPy's global.
    generator = np.random.RandomState(seed)
    concentration = np.full(num_clients, alpha)
    for label, size in enumerate(class_sizes):
        share = generator.dirichlet(concentration)
        if not abs(share.sum() - 1) < 1e-6:  # all gammas were 0, or their sum was infinite
            other = np.random.default_rng([seed, label])
            share = log_gamma_shares(other, alpha, 1, num_clients)[0]
        cuts = (np.cumsum(share)[:-1] * size).astype(np.int64)
        yield np.diff(np.minimum(cuts, size), prepend=0, append=size)


@dataclasses.dataclass(frozen=True)
class DirichletPerClientOptions:
    """Options of `dirichlet_per_client`."""

    alpha: float = 0.5
    """Concentration: small values give each client few classes."""

    def __post_init__(self) -> None:
        check_alpha(self.alpha)


@partitioners.register("dirichlet_per_client", DirichletPerClientOptions)
def dirichlet_per_client(options: DirichletPerClientOptions) -> Partitioner:
    """Each client draws its class mixture q_i ~ Dirichlet(alpha); all have equally many samples.

    As in Hsu, Qi and Brown, "Measuring the effects of non-identical data distribution for federated
    visual classification", 2019. What the mixtures ask for is not what there is; `hand_out` says
    how each sample is given out once nevertheless.
    """

    def split(labels: Indices, num_clients: int, seed: int) -> list[Indices]:
        labels = check_request(labels, num_clients, seed, 1)
        generator = np.random.default_rng(seed)
        members = [each for each in class_members(labels) if len(each)]
        sizes = (np.arange(num_clients) < len(labels) % num_clients) + len(labels) // num_clients
        mixtures = log_gamma_shares(generator, options.alpha, num_clients, len(members))
        supply = np.array([len(each) for each in members])
        given = hand_out(mixtures, sizes.astype(np.int64), supply, generator)
        clients = np.arange(num_clients)
        owners = np.concatenate([np.repeat(clients, column) for column in given.T])
        samples = np.concatenate([generator.permutation(each) for each in members])
        return [np.sort(part) for part in collect(samples, owners, num_clients)]

    return split


def hand_out(
    mixtures: NDArray[np.float64],
    sizes: Indices,
    supply: Indices,
    generator: np.random.Generator,
) -> NDArray[np.int32]:
    """Give out every sample once, close to each client's mixture.

    In each pass every client that lacks samples draws as many as it lacks from its mixture over the
    classes that are left. Where more is drawn of a class than there is, lots decide among the
    clients, so that none comes before another; those who lost draw again in the next pass.
    Such a class is used up, hence there are no more passes than classes. A client whose mixture has
    nothing left draws from what remains, in its proportion.

    Args:
        mixtures: (m, C) class shares of each client.
        sizes: (m,) samples that each client gets.
        supply: (C,) samples of each class, as many as `sizes` in sum.
        generator: of all draws.

    Returns:
        (m, C) counts with row sums `sizes` and column sums `supply`.
    """
    lacking, left = sizes.copy(), supply.copy()
    given = np.zeros(mixtures.shape, np.int32)  # with many clients the largest array here
    while left.any():
        short = np.flatnonzero(lacking)
        wanted = mixtures[short]
        wanted *= left > 0
        wanted[wanted.sum(axis=1) < 1e-12] = left
        wanted /= wanted.sum(axis=1, keepdims=True)
        drawn = generator.multinomial(lacking[short], wanted)
        del wanted
        for label in np.flatnonzero(drawn.sum(axis=0) > left):
            drawn[:, label] = generator.multivariate_hypergeometric(
                drawn[:, label], left[label], method="marginals"
            )
        given[short] += drawn
        lacking[short] -= drawn.sum(axis=1)
        left -= drawn.sum(axis=0)
    return given


def check_alpha(alpha: float) -> None:
    """Refuse what is no concentration.

    Raises:
        ConfigError: not a finite number > 0.
    """
    try:
        check_number("partition.alpha", alpha, 0, above=True)
    except ConfigError as error:
        raise ConfigError(f"{error}; try partition.alpha=0.5") from error
