"""The best partition of keys into groups, by evidence.

The model is that of `key_noise`; W is the scatter within groups.

1. Candidates are the n partitions of the Ward tree (least growth of the scatter W within groups).
2. Each is scored by its log evidence in the model above with mu and tau^2 integrated out (flat
   and Jeffreys prior) and the ratio r = sigma^2 / tau^2 averaged over a grid. With n_k keys of mean
   m_k in group k of K, a_k = n_k / (1 + n_k r), m = sum a_k m_k / sum a_k:

       log p(X | K) = log mean_r exp( -e/2 [ (n - 1) log(W + sum_k a_k |m_k - m|^2)
                                             + sum_k log(1 + n_k r) + log(sum_k a_k) ] )
       log p(K)     = sum_k log (n_k - 1)! - log n!          (Chinese restaurant process, mass 1)

3. e is the effective dimension. The q coordinates of a key are strongly correlated, so that q terms
   of log density would count the same thing many times. With the spectrum lambda of the scatter
   within groups, e = (sum lambda)^2 / sum lambda^2: q for a sphere, 1 for a line; the log density
   is raised to the power e / q. As e depends on the partition and the partition on e, the two are
   found in turn, starting from one group. For this comparison the bias of e in small samples is
   removed, and e is at least that of the whole scatter: few residuals span few directions.
4. Keys of one group differ in few directions, keys of two groups in any. So that members far out
   in those few directions are no group of their own, 1 to 3 are repeated in coordinates in which
   the spread within the groups found is even (`evened`), until the groups no longer change.
5. tau^2 = W / (q (n - K)), the unbiased pooled variance within the groups of the best partition,
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
MOST_ALTERNATIONS = 10
"""Bound on the alternation between partition and effective dimension; two or three are usual."""
ALL_GROUPS = 64
"""Up to this number of groups every number is tried, beyond it 16 per doubling."""


@dataclasses.dataclass(frozen=True)
class Partition:
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


def best_partition(points: Array) -> Partition:
    """Alternate between the best partition and the directions in which its groups spread."""
    number, q = points.shape
    if number == 1:
        return Partition(np.zeros(1, dtype=np.int64), 0.0, 0.0, 1.0)
    labels = _best_labels(points)
    for _ in range(MOST_ALTERNATIONS):
        before, labels = labels, _best_labels(evened(points, labels))
        if np.array_equal(before, labels):
            break
    groups = int(labels.max()) + 1
    residuals = _residuals(points, labels)
    variance = float(np.einsum("nq,nq->", residuals, residuals)) / (q * max(number - groups, 1))
    between = between_groups(points - residuals, labels, variance)
    return Partition(labels, variance, between, effective_dimension(residuals))


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
        residuals = _residuals(points, cut_tree(merges, best.groups))
        dimension = max(unbiased_dimension(residuals, number - best.groups), total)
        evidence = [_evidence(candidate, dimension) for candidate in candidates]
        best = candidates[len(evidence) - 1 - int(np.argmax(evidence[::-1]))]  # of equals, fewest
    return cut_tree(merges, best.groups)


def evened(points: Array, labels: Indices) -> Array:
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


def between_groups(means: Array, labels: Indices, variance: float) -> float:
    """Variance of the groups' means less the part of it that is noise, but at least that.

    Args:
        means: (n, q) of each point's group.
        labels: (n,) groups.
        variance: of a coordinate within groups.
    """
    _, first, counts = np.unique(labels, return_index=True, return_counts=True)
    if len(first) == 1:
        return variance
    of_means = float(means[first].var(axis=0, ddof=1).mean())
    return max(of_means - variance * float((1 / counts).mean()), variance)


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


def cut_tree(merges: Array, groups: int) -> Indices:
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
    result: Array = points - group_means(points, labels)[labels]
    return result


def group_means(points: Array, labels: Indices) -> Array:
    """(K, q)"""
    counts = np.bincount(labels)
    sums = np.zeros((len(counts), points.shape[1]))
    np.add.at(sums, labels, points)
    result: Array = sums / counts[:, None]
    return result
