"""How far the keys of one group spread: the key noise tau^2, inferred from the keys alone.

The keys that clients send are matched together with their prompts (docs/pfpt.md, Keyed prompts).
The model is kappa_g ~ N(mu, sigma^2 I) for the key of group g and q_t ~ N(kappa_g, tau^2 I) for the
key of a client t in it; a group is a visual domain. tau^2 decides what counts as one group, and
neither it nor the number of groups is known. Both are read off the keys by comparing partitions
(`partitions`).

Observations are the distinct keys of each client, and the distinct keys of earlier rounds that
the memory holds. The server's own keys are no observations: they depend on what was matched
before, so that a group that was split once would be evidence for the next split.

A server that remembers the key of each client itself says so (`others`), and no memory is needed.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fedprompt.aggregation.arrays import Array, Indices, lexicographic
from fedprompt.aggregation.pfpt.map.metric_groups import Placement, likeliest_groups, place
from fedprompt.aggregation.pfpt.map.partitions import (
    best_partition,
    effective_dimension,
    group_means,
)

MEMORY_SIZE = 64
"""Keys kept from earlier rounds: enough for ten groups of six clients, and 64 kB at q = 128."""
MOST_OTHERS = 256
"""Other clients among whom groups are sought; of more, every so many-th is taken."""
SAME_KEY = 1e-3
"""Keys nearer than this share of the root mean square distance from the mean are equal up to
rounding: far above the rounding of float32, far below any difference between clients."""


@dataclasses.dataclass(frozen=True)
class KeyNoise:
    """What the keys say about themselves."""

    variance: float
    """tau^2 per coordinate, in squared units of the keys; 0 if all keys of each group are equal."""
    between: float
    """sigma^2 per coordinate, the variance of the groups' keys; 0 if all keys are equal. Never less
    than `variance`, and equal to it if there is one group: nothing is known of others then."""
    effective_dimension: float
    """e of the scatter within groups, from 1 to the smaller of q and n - K. It is not corrected for
    the small sample: a spread that few samples show is to be trusted less."""
    groups: int
    """K, among the keys of this cohort and of the memory."""
    labels: Indices
    """(N,) group of each row, numbered from 0 in an order that depends on the keys alone."""
    centres: Array
    """(K, q) mean key of each group, those of the memory included; placed ones with a metric."""
    memory: Array
    """(M, q) distinct keys to be passed to the next call, latest first, M <= `MEMORY_SIZE`."""
    memory_labels: Indices
    """(M,) group of each."""
    placement: Placement | None = None
    """With a metric, the directions in which keys are compared; the variances are in its units."""

    def placed(self, keys: Array) -> Array:
        """(n, q) keys as they are compared: themselves, or (n, D) with a metric."""
        return keys if self.placement is None else self.placement(keys)


def infer_key_noise(
    keys: Array,
    owner: Indices,
    memory: Array | None = None,
    metric: Array | None = None,
    others: Array | None = None,
) -> KeyNoise:
    """Find groups among keys and the variance within them.

    Shifting all keys and the memory, or multiplying them by a positive number, only shifts and
    scales the result (up to rounding). The order of rows and of clients is irrelevant to the last
    bit. Nothing is random.

    Args:
        keys: (N, q) finite keys of all clients' prompts, N >= 1.
        owner: (N,) client of each row; equal keys of one client are one observation.
        memory: (M, q) `KeyNoise.memory` of the previous round; None or empty in the first.
        metric: (q, q) of the clients' queries, if known: groups are then those of `metric_groups`.
        others: (M, q) keys of all other clients that were met, in place of a memory.

    Returns:
        Variances, effective dimension, groups, and the next memory.

    >>> two_groups = np.array([[0.0], [1.0], [2.0], [100.0], [101.0], [102.0]])
    >>> found = infer_key_noise(two_groups, np.arange(6))
    >>> found.groups, round(found.variance, 6)
    (2, 1.0)
    """
    fresh, clients, row_of = _observations(keys, owner)
    if others is None:
        stored = np.empty((0, keys.shape[1])) if memory is None else memory
        stored = _without_repeats(stored, fresh, clients, metric)
        kept = _thinned(len(fresh), MEMORY_SIZE)
        room = MEMORY_SIZE - len(kept)
        kept = np.concatenate([kept, len(fresh) + np.arange(len(stored))[:room]])
    else:
        stored = others[lexicographic(others)][_thinned(len(others), MOST_OTHERS)]
        kept = np.empty(0, dtype=np.int64)  # the server remembers them itself
    points = np.concatenate([fresh, stored])
    points = points - points[0]  # first, so that equal keys become exactly 0
    next_memory = np.concatenate([fresh, stored])[kept]
    centred = points - points.mean(axis=0)
    unit = float(np.abs(centred).max())
    if unit == 0.0:
        labels = np.zeros(len(keys), dtype=np.int64)
        nothing = np.zeros(len(kept), dtype=np.int64)
        return KeyNoise(0.0, 0.0, 1.0, 1, labels, keys[:1].copy(), next_memory, nothing)
    if metric is not None:
        return _by_metric(np.concatenate([fresh, stored]), metric, row_of, kept)
    found = best_partition(centred / unit)
    return KeyNoise(
        variance=found.variance * unit * unit,
        between=found.between * unit * unit,
        effective_dimension=found.dimension,
        groups=int(found.labels.max()) + 1,
        labels=found.labels[row_of],
        centres=group_means(np.concatenate([fresh, stored]), found.labels),
        memory=next_memory,
        memory_labels=found.labels[kept],
    )


def _by_metric(points: Array, metric: Array, row_of: Indices, kept: Indices) -> KeyNoise:
    """Groups of keys in a metric.

    Args:
        points: (n, q) distinct keys of this round and of the memory, not all equal.
        metric: (q, q)
        row_of: (N,) which of them each row is.
        kept: (M,) those to be remembered.
    """
    placement = place(points, metric)
    placed = placement(points)
    found = likeliest_groups(placed, placement.noise)
    centres = group_means(placed, found.labels)
    return KeyNoise(
        variance=found.variance,
        between=found.between,
        effective_dimension=effective_dimension(placed - centres[found.labels]),
        groups=len(centres),
        labels=found.labels[row_of],
        centres=centres,
        memory=points[kept],
        memory_labels=found.labels[kept],
        placement=placement,
    )


def settled_keys(found: KeyNoise, keys: Array) -> Array:
    """Replace each key by the centre of the group that it belongs to, or leave it as it is.

    A key belongs to the nearest group if that explains it better than a group of its own would:
    log N(key | centre, tau^2) > log N(key | mean of centres, tau^2 + sigma^2), the dimension
    being common to both sides.

    Args:
        found: what was inferred.
        keys: (n, q) as they are compared, see `KeyNoise.placed`.

    Returns:
        (n, q)
    """
    if found.variance == 0 or len(keys) == 0:
        return keys.copy()
    q = keys.shape[1]
    distances = ((keys[:, None] - found.centres) ** 2).sum(axis=2) / q
    nearest = distances.argmin(axis=1)
    wide = found.variance + found.between
    apart = ((keys - found.centres.mean(axis=0)) ** 2).sum(axis=1) / q / wide
    alone = apart + np.log(wide / found.variance)
    belongs = distances[np.arange(len(keys)), nearest] / found.variance < alone
    return np.where(belongs[:, None], found.centres[nearest], keys)


def _observations(keys: Array, owner: Indices) -> tuple[Array, Indices, Indices]:
    """Distinct keys (n, q) of every client, sorted by content; (n,) client; (N,) which a row is."""
    order = np.lexsort((owner, *keys.T[::-1]))
    rows, clients = keys[order], owner[order]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (rows[1:] != rows[:-1]).any(axis=1) | (clients[1:] != clients[:-1])
    row_of = np.empty(len(rows), dtype=np.int64)
    row_of[order] = np.cumsum(new) - 1
    return rows[new], clients[new], row_of


def _without_repeats(
    stored: Array, fresh: Array, clients: Indices, metric: Array | None = None
) -> Array:
    """Stored keys less those that a client of this round seems to have sent again.

    A client that takes part twice sends the same key, or nearly so (noise for privacy, new data).
    Counted twice it would look like a group of its own with hardly any spread. Clients of one round
    are certainly different ones; so a stored key that is nearer to a new one than any two clients
    of this round are to each other is taken for the same client's.

    In a metric all clients of a group are about equally far from each other, so that many other
    clients would be taken for one that is there. One that is half as far is another matter.

    Args:
        stored: (M, q) of earlier rounds.
        fresh: (n, q) of this round.
        clients: (n,) whose they are.
        metric: (q, q), if known.
    """
    if len(stored) == 0:
        return stored
    points = np.concatenate([fresh, stored])
    points = points - points[0]
    if metric is not None:
        points = points @ metric
    points -= points.mean(axis=0)
    points /= float(np.abs(points).max()) or 1.0
    ours, theirs = points[: len(fresh)], points[len(fresh) :]
    among = _square_distances(ours, ours)[clients[:, None] != clients]
    nearest = float(among.min()) if among.size else 0.0
    if metric is not None:
        nearest /= 4
    equal = SAME_KEY**2 * float((points**2).sum(axis=1).mean())
    repeated = (_square_distances(theirs, ours) <= max(nearest, equal)).any(axis=1)
    result: Array = stored[~repeated]
    return result


def _square_distances(left: Array, right: Array) -> Array:
    """(l, r) between all rows."""
    squares: Array = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2 * left @ right.T
    return squares


def _thinned(number: int, most: int) -> Indices:
    """At most so many of the rows 0, 1, ... `number` - 1, evenly spaced."""
    if number <= most:
        return np.arange(number)
    result: Indices = np.arange(most) * number // most
    return result
