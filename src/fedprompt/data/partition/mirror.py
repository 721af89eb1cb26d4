"""Each client's own share of a held-out split: what belongs to its owners, where the partition goes
by owners, else the split partitioned as the training split was.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.partition.base import round_to_sum

Indices = NDArray[np.int64]


def mirror_partition(
    parts: Sequence[Indices],
    labels: Indices,
    groups: Indices,
    held_labels: Indices,
    held_groups: Indices,
) -> list[Indices]:
    """Partition held-out samples in the proportions of a training partition.

    The held-out samples of each class of each domain are divided among the clients in proportion to
    their training samples of that class and domain, by largest remainders. Every held-out sample
    goes to exactly one client; those of a class that no client trains on go to no one. A client
    with few samples may get none.

    Args:
        parts: per client the training samples that it owns.
        labels: (N,) class of each training sample.
        groups: (N,) domain of each training sample.
        held_labels: (M,) class of each held-out sample.
        held_groups: (M,) domain of each held-out sample.

    Returns:
        Per client its held-out samples, ascending.

    >>> parts = [np.array([0, 1, 2]), np.array([3, 4])]  # client 0 has 3 of the 4 zeros
    >>> labels, held = np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 0, 1, 1])
    >>> one_domain = np.zeros(6, dtype=np.int64)
    >>> [p.tolist() for p in mirror_partition(parts, labels, one_domain[:5], held, one_domain)]
    [[0, 1, 2], [3, 4, 5]]
    """
    owner = np.full(len(labels), -1, dtype=np.int64)
    for client, part in enumerate(parts):
        owner[part] = client
    shares: list[list[Indices]] = [[] for _ in parts]
    for group in np.unique(held_groups):
        for label in np.unique(held_labels[held_groups == group]):
            members = np.flatnonzero((held_labels == label) & (held_groups == group))
            owners = owner[(labels == label) & (groups == group)]
            counts = np.bincount(owners[owners >= 0], minlength=len(parts)).astype(np.float64)
            if counts.sum() == 0:
                continue
            sizes = round_to_sum(counts / counts.sum() * len(members), len(members))
            # Which goes to whom does not matter, but must be the same for every method and seed.
            order = np.random.default_rng([int(group), int(label)]).permutation(members)
            for client, share in enumerate(np.split(order, np.cumsum(sizes)[:-1])):
                shares[client].append(share)
    empty = np.empty(0, dtype=np.int64)
    return [np.sort(np.concatenate([empty, *own])) for own in shares]


def owned_shares(
    parts: Sequence[Indices], owners: Indices, held_owners: Indices
) -> list[Indices] | None:
    """Each client's held-out samples where clients hold all training samples of their owners.

    Args:
        parts: per client the training samples that it owns.
        owners: (N,) owner of each training sample.
        held_owners: (M,) owner of each held-out sample.

    Returns:
        Per client its owners' held-out samples, ascending; those of an owner who trains with no
        client go to no one. None if an owner's training samples are divided between clients.

    >>> parts, owners = [np.array([0, 3]), np.array([1, 2])], np.array([7, 5, 6, 7])
    >>> [part.tolist() for part in owned_shares(parts, owners, np.array([6, 7, 9, 5])) or ()]
    [[1], [0, 3]]
    """
    clients_of: dict[int, int] = {}
    for client, part in enumerate(parts):
        for owner in np.unique(owners[part]).tolist():
            if clients_of.setdefault(owner, client) != client:
                return None
    holders = np.array([clients_of.get(owner, -1) for owner in held_owners.tolist()], np.int64)
    return [np.flatnonzero(holders == client).astype(np.int64) for client in range(len(parts))]
