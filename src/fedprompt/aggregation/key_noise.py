"""How far the keys of one group spread: the key noise tau^2, inferred from the keys alone.

The keys that clients send are matched together with their prompts (docs/pfpt.md, Keyed prompts).
The model is kappa_g ~ N(mu, sigma^2 I) for the key of group g and q_t ~ N(kappa_g, tau^2 I) for the
key of a client t in it; a group is a visual domain. tau^2 decides what counts as one group, and
neither it nor the number of groups is known. Both are read off the keys by comparing partitions.

1. Observations are the distinct keys of each client, and the distinct keys of earlier rounds that
   the memory holds. The server's own keys are no observations: they depend on what was matched
   before, so that a group that was split once would be evidence for the next split.
2. Candidates are the n partitions of the Ward tree (least growth of the scatter W within groups).
3. Each is scored by its log evidence in the model above with mu and tau^2 integrated out (flat
   and Jeffreys prior) and the ratio r = sigma^2 / tau^2 averaged over a grid. With n_k keys of mean
   m_k in group k of K, a_k = n_k / (1 + n_k r), m = sum a_k m_k / sum a_k:

       log p(X | K) = log mean_r exp( -e/2 [ (n - 1) log(W + sum_k a_k |m_k - m|^2)
                                             + sum_k log(1 + n_k r) + log(sum_k a_k) ] )
       log p(K)     = sum_k log (n_k - 1)! - log n!          (Chinese restaurant process, mass 1)

4. e is the effective dimension. The q coordinates of a key are strongly correlated, so that q terms
   of log density would count the same thing many times. With the spectrum lambda of the scatter
   within groups, e = (sum lambda)^2 / sum lambda^2: q for a sphere, 1 for a line; the log density
   is raised to the power e / q. As e depends on the partition and the partition on e, the two are
   found in turn, starting from one group. For this comparison the bias of e in small samples is
   removed, and e is at least that of the whole scatter: few residuals span few directions.
5. Keys of one group differ in few directions, keys of two groups in any. So that members far out
   in those few directions are no group of their own, 2 to 4 are repeated in coordinates in which
   the spread within the groups found is even (`_evened`), until the groups no longer change.
6. tau^2 = W / (q (n - K)), the unbiased pooled variance within the groups of the best partition,
   and sigma^2 the variance of its m_k less tau^2 mean(1 / n_k), in the coordinates of the keys.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.special import gammaln, logsumexp

from fedprompt.aggregation.arrays import Array, Indices

RATIOS: Array = 10.0 ** (np.arange(17) / 4)
"""Grid of sigma^2 / tau^2. From 1, because groups nearer to each other than their own members are
no groups, to where a hundredfold distance makes every partition obvious; four steps per decade."""
MEMORY_SIZE = 64
"""Keys kept from earlier rounds: enough for ten groups of six clients, and 64 kB at q = 128."""
SAME_KEY = 1e-3
"""Keys nearer than this share of the root mean square distance from the mean are equal up to
rounding: far above the rounding of float32, far below any difference between clients."""
MOST_ALTERNATIONS = 10
"""Bound on the alternation between partition and effective dimension; two or three are usual."""
ALL_GROUPS = 64
"""Up to this number of groups every number is tried, beyond it 16 per doubling."""


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
    """(K, q) mean key of each group, those of the memory included."""
    memory: Array
    """(M, q) distinct keys to be passed to the next call, latest first, M <= `MEMORY_SIZE`."""
    memory_labels: Indices
    """(M,) group of each."""


def infer_key_noise(keys: Array, owner: Indices, memory: Array | None = None) -> KeyNoise:
    """Find groups among keys and the variance within them.

    Shifting all keys and the memory, or multiplying them by a positive number, only shifts and
    scales the result (up to rounding). The order of rows and of clients is irrelevant to the last
    bit. Nothing is random.

    Args:
        keys: (N, q) finite keys of all clients' prompts, N >= 1.
        owner: (N,) client of each row; equal keys of one client are one observation.
        memory: (M, q) `KeyNoise.memory` of the previous round; None or empty in the first.

    Returns:
        Variances, effective dimension, groups, and the next memory.

    >>> two_groups = np.array([[0.0], [1.0], [2.0], [100.0], [101.0], [102.0]])
    >>> found = infer_key_noise(two_groups, np.arange(6))
    >>> found.groups, round(found.variance, 6)
    (2, 1.0)
    """
    fresh, clients, row_of = _observations(keys, owner)
    stored = np.empty((0, keys.shape[1])) if memory is None else memory
    stored = _without_repeats(stored, fresh, clients)
    points = np.concatenate([fresh, stored])
    points = points - points[0]  # first, so that equal keys become exactly 0
    kept = _thinned(len(fresh), MEMORY_SIZE)
    kept = np.concatenate([kept, len(fresh) + np.arange(len(stored))[: MEMORY_SIZE - len(kept)]])
    next_memory = np.concatenate([fresh, stored])[kept]
    centred = points - points.mean(axis=0)
    unit = float(np.abs(centred).max())
    if unit == 0.0:
        labels = np.zeros(len(keys), dtype=np.int64)
        nothing = np.zeros(len(kept), dtype=np.int64)
        return KeyNoise(0.0, 0.0, 1.0, 1, labels, keys[:1].copy(), next_memory, nothing)
    found = _partition(centred / unit)
    return KeyNoise(
        variance=found.variance * unit * unit,
        between=found.between * unit * unit,
        effective_dimension=found.dimension,
        groups=int(found.labels.max()) + 1,
        labels=found.labels[row_of],
        centres=_group_means(np.concatenate([fresh, stored]), found.labels),
        memory=next_memory,
        memory_labels=found.labels[kept],
    )


def settled_keys(found: KeyNoise, keys: Array) -> Array:
    """Replace each key by the centre of the group that it belongs to, or leave it as it is.

    A key belongs to the nearest group if that explains it better than a group of its own would:
    log N(key | centre, tau^2) > log N(key | mean of centres, tau^2 + sigma^2), the dimension
    being common to both sides.

    Args:
        found: what was inferred.
        keys: (n, q)

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


def effective_dimension(residuals: Array) -> float:
    """(sum lambda)^2 / sum lambda^2 of the spectrum lambda of residuals' scatter; (n, q) rows.

    >>> effective_dimension(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    2.0
    >>> effective_dimension(np.array([[1.0, 1.0], [-1.0, -1.0]]))
    1.0
    """
    tall = residuals.shape[0] > residuals.shape[1]
    scatter = residuals.T @ residuals if tall else residuals @ residuals.T
    total = float(np.trace(scatter))
    if total <= 0.0:
        return 1.0
    return float(max(1.0 / ((scatter / total) ** 2).sum(), 1.0))


# Observations.


def _observations(keys: Array, owner: Indices) -> tuple[Array, Indices, Indices]:
    """Distinct keys (n, q) of every client, sorted by content; (n,) client; (N,) which a row is."""
    order = np.lexsort((owner, *keys.T[::-1]))
    rows, clients = keys[order], owner[order]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (rows[1:] != rows[:-1]).any(axis=1) | (clients[1:] != clients[:-1])
    row_of = np.empty(len(rows), dtype=np.int64)
    row_of[order] = np.cumsum(new) - 1
    return rows[new], clients[new], row_of


def _without_repeats(stored: Array, fresh: Array, clients: Indices) -> Array:
    """Stored keys less those that a client of this round seems to have sent again.

    A client that takes part twice sends the same key, or nearly so (noise for privacy, new data).
    Counted twice it would look like a group of its own with hardly any spread. Clients of one round
    are certainly different ones; so a stored key that is nearer to a new one than any two clients
    of this round are to each other is taken for the same client's.
    """
    if len(stored) == 0:
        return stored
    points = np.concatenate([fresh, stored])
    points = points - points[0]
    points -= points.mean(axis=0)
    points /= float(np.abs(points).max()) or 1.0
    ours, theirs = points[: len(fresh)], points[len(fresh) :]
    among = _square_distances(ours, ours)[clients[:, None] != clients]
    nearest = float(among.min()) if among.size else 0.0
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


# Partitions.


@dataclasses.dataclass(frozen=True)
class _Partition:
    """The best partition of points, in the units of the points."""

    labels: Indices
    variance: float
    between: float
    dimension: float


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """Everything that the evidence of one partition depends on but the effective dimension."""

    groups: int
    within: float
    """W"""
    terms: Array
    """(len(RATIOS),) the bracket of the evidence, per ratio r; one entry if K = 1."""
    prior: float


def _partition(points: Array) -> _Partition:
    """Alternate between the best partition and the directions in which its groups spread."""
    number, q = points.shape
    if number == 1:
        return _Partition(np.zeros(1, dtype=np.int64), 0.0, 0.0, 1.0)
    labels = _best_labels(points)
    for _ in range(MOST_ALTERNATIONS):
        before, labels = labels, _best_labels(_evened(points, labels))
        if np.array_equal(before, labels):
            break
    groups = int(labels.max()) + 1
    residuals = _residuals(points, labels)
    variance = float(np.einsum("nq,nq->", residuals, residuals)) / (q * max(number - groups, 1))
    between = _between(points - residuals, labels, variance)
    return _Partition(labels, variance, between, effective_dimension(residuals))


def _best_labels(points: Array) -> Indices:
    """Alternate between the best partition and the effective dimension of its residuals."""
    number = len(points)
    merges = linkage(points, "ward")
    candidates = _candidates(points, merges)
    total = effective_dimension(points)
    best = candidates[-1]  # one group
    visited: set[int] = set()
    while len(visited) < MOST_ALTERNATIONS and best.groups not in visited:
        visited.add(best.groups)
        residuals = _residuals(points, _labels(merges, best.groups))
        dimension = max(unbiased_dimension(residuals, number - best.groups), total)
        evidence = [_evidence(candidate, dimension) for candidate in candidates]
        best = candidates[len(evidence) - 1 - int(np.argmax(evidence[::-1]))]  # of equals, fewest
    return _labels(merges, best.groups)


def _evened(points: Array, labels: Indices) -> Array:
    """Points in coordinates in which the estimated covariance within groups is the same all round.

    v residuals show at most v directions. Their covariance S is shrunk towards its mean eigenvalue
    m, C = (1 - s) S + s m I, with the share s of oracle approximating shrinkage (Chen, Wiesel,
    Eldar and Hero, IEEE Transactions on Signal Processing 2010): few residuals change little. The
    coordinates are C^(-1/2) x, up to a common factor.
    """
    residuals, q = _residuals(points, labels), points.shape[1]
    freedom = len(points) - int(labels.max()) - 1
    _, singular, directions = np.linalg.svd(residuals, full_matrices=False)
    spectrum = singular**2 / max(freedom, 1)
    trace, square = float(spectrum.sum()), float((spectrum**2).sum())
    uneven = (freedom + 1 - 2 / q) * (square - trace**2 / q)
    if freedom < 2 or uneven <= 0:
        return points
    share = min(((1 - 2 / q) * square + trace**2) / uneven, 1.0)
    least = share * trace / q
    factors = np.sqrt(least / (least + (1 - share) * spectrum))
    result: Array = points + (points @ directions.T * (factors - 1)) @ directions
    return result / float(np.abs(result).max())


def _between(means: Array, labels: Indices, variance: float) -> float:
    """Variance of the groups' means less the part of it that is noise; (n, q) each point's mean."""
    _, first, counts = np.unique(labels, return_index=True, return_counts=True)
    if len(first) == 1:
        return variance
    of_means = float(means[first].var(axis=0, ddof=1).mean())
    return max(of_means - variance * float((1 / counts).mean()), variance)


def unbiased_dimension(residuals: Array, freedom: int, most: int | None = None) -> float:
    """`effective_dimension` of the covariance that residuals of so many degrees of freedom show.

    The spectrum of v samples is more uneven than that of their covariance S: for Gaussian samples
    with scatter A, v^2 / ((v - 1)(v + 2)) (tr A^2 - (tr A)^2 / v) / v^2 is an unbiased estimate of
    tr S^2, and (tr A)^2 / v^2 - 2 tr S^2 / v one of (tr S)^2 (Bai and Saranadasa, Statistica Sinica
    1996). Partitions differ in v, so comparing them needs an e that does not.

    Args:
        residuals: (n, q) around the means of groups.
        freedom: v
        most: upper bound; what n residuals can show if None.
    """
    if freedom < 2:
        return 1.0
    shown = 1.0 / effective_dimension(residuals)
    square = freedom**2 / ((freedom - 1) * (freedom + 2)) * (shown - 1.0 / freedom)
    if most is None:
        most = min(residuals.shape[1], len(residuals) - 1)
    if square <= 1e-12:
        return float(most)
    return float(np.clip((1.0 - 2.0 * square / freedom) / square, 1.0, most))


def _candidates(points: Array, merges: Array) -> list[_Candidate]:
    """The partitions of a Ward tree, from the finest to one group."""
    number, q = points.shape
    wanted = set(_group_numbers(number))
    sums = np.concatenate([points, np.zeros((number - 1, q))])
    counts = np.concatenate([np.ones(number), merges[:, 3]])
    live = np.arange(2 * number - 1) < number
    within = 0.0
    result = []
    for step in range(number):
        if number - step in wanted:
            result.append(_candidate(sums[live], counts[live], within))
        if step < number - 1:
            left, right = int(merges[step, 0]), int(merges[step, 1])
            sums[number + step] = sums[left] + sums[right]
            live[[left, right]], live[number + step] = False, True
            within += 0.5 * float(merges[step, 2]) ** 2  # what a merge adds to W
    return result


def _group_numbers(number: int) -> list[int]:
    """Numbers of groups to try for so many points."""
    last = min(number, ALL_GROUPS)
    coarse = ALL_GROUPS * 2 ** (np.arange(1, 400) / 16)
    return [*range(1, last + 1), *(int(value) for value in coarse if value <= number)]


def _candidate(sums: Array, counts: Array, within: float) -> _Candidate:
    """(K, q) sums and (K,) sizes of groups."""
    groups, number = len(counts), counts.sum()
    ratios = RATIOS if groups > 1 else np.zeros(1)
    means = sums / counts[:, None]
    shares = counts / (1 + ratios[:, None] * counts)  # (R, K) a_k
    mass = shares.sum(axis=1)
    about = shares @ (means**2).sum(axis=1) - ((shares @ means) ** 2).sum(axis=1) / mass
    scatter = within + np.maximum(about, 0.0)
    terms = (
        (number - 1) * np.log(scatter)
        + np.log1p(ratios[:, None] * counts).sum(axis=1)
        + np.log(mass)
    )
    prior = float(gammaln(counts).sum() - gammaln(number + 1))
    return _Candidate(groups, within, terms, prior)


def _evidence(candidate: _Candidate, dimension: float) -> float:
    exponents = -0.5 * dimension * candidate.terms
    return float(logsumexp(exponents)) - float(np.log(len(exponents))) + candidate.prior


def _labels(merges: Array, groups: int) -> Indices:
    """(n,) group of each leaf when so many groups are left, numbered by first appearance."""
    number = len(merges) + 1
    parent = np.arange(2 * number - 1)
    for step in range(number - groups):
        parent[[int(merges[step, 0]), int(merges[step, 1])]] = number + step
    for node in range(2 * number - 2, -1, -1):  # parents come after their children
        parent[node] = parent[parent[node]]
    _, first, inverse = np.unique(parent[:number], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    result: Indices = rank[inverse].astype(np.int64)
    return result


def _residuals(points: Array, labels: Indices) -> Array:
    """(n, q) deviations from the mean of the group; exactly 0 in a group of equal points."""
    _, first = np.unique(labels, return_index=True)
    points = points - points[first][labels]
    result: Array = points - _group_means(points, labels)[labels]
    return result


def _group_means(points: Array, labels: Indices) -> Array:
    """(K, q)"""
    counts = np.bincount(labels)
    sums = np.zeros((len(counts), points.shape[1]))
    np.add.at(sums, labels, points)
    result: Array = sums / counts[:, None]
    return result
