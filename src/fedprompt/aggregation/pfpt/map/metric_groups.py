"""Groups among keys whose spread within clients is known (`AggregationInput.metric`).

In the metric M every coordinate of a client's mean query has the same noise. Then groups can be
told apart though they differ in a few of q directions only.

1. **Directions.** Those in which the keys' singular value is above omega(beta) times the median
   one are kept, as what is below may be noise (Gavish and Donoho, The optimal hard threshold for
   singular values is 4 / sqrt 3, IEEE Transactions on Information Theory, 2014, Eq. 4 and 5; beta
   is the shorter over the longer side).
2. **Candidates.** For each number of groups the Ward tree's partition, and what it becomes when the
   spread within its groups is made even (`partitions.evened`) and the tree is grown again.
3. **Evidence.** Keys of a group spread alike in all groups, but not in all directions: clients hold
   different classes. With kappa_g ~ N(mu, r Sigma), q_t ~ N(kappa_g, Sigma), mu flat and Sigma
   inverse Wishart of nu = D + 2 and mean psi I, mu and Sigma integrate out:

       log p(X | K) = log mean_r exp( -1/2 [ (n - 1 + nu) log |W + sum_k a_k (m_k - m)(m_k - m)^T
                                             + psi I| + D (sum_k log(1 + n_k r) + log sum_k a_k) ] )

   with a_k, m_k, m and r as in `partitions`, W (D, D) the scatter within groups, D the directions
   kept, and psi the variance of noise that the median shows. Stretching the space changes nothing,
   which the trace of W cannot say. log p(K) is that of `partitions`.
4. **Use.** Groups that an image could not tell apart become one (`joined`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.special import gammaln, logsumexp

from fedprompt.aggregation.arrays import Array, Indices
from fedprompt.aggregation.pfpt.map.partitions import (
    RATIOS,
    between_groups,
    cut_tree,
    evened,
    group_means,
)

MOST_GROUPS = 32
"""Numbers of groups that are tried."""
MOST_EVENINGS = 4
"""Times that a candidate is made even; two are usual."""
ROUNDING = 1e-6
"""Differences smaller than this share of the largest are those of float32 keys that are equal."""
LEAST_APART = 1.5
"""Groups nearer than this, in standard deviations of one image, become one: of their images nearly
one in four would be taken for the other's (Phi(-3/4))."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """The directions in which keys differ: key -> (key - centre) @ matrix."""

    centre: Array
    """(q,)"""
    matrix: Array
    """(q, D)"""
    noise: float
    """Variance of a coordinate that is noise."""

    def __call__(self, keys: Array) -> Array:
        """(n, q) -> (n, D)"""
        return np.asarray((keys - self.centre) @ self.matrix)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups among keys, and how far they spread."""

    labels: Indices
    """(n,)"""
    variance: float
    """Within groups, per coordinate."""
    between: float
    """Of the groups' centres, per coordinate; at least `variance`."""


def place(keys: Array, metric: Array) -> Placement:
    """Find the directions.

    Args:
        keys: (n, q), not all equal.
        metric: (q, q) M.
    """
    centre = keys.mean(axis=0)
    spread = (keys - centre) @ metric
    _, singular, directions = np.linalg.svd(spread, full_matrices=False)
    shorter, longer = sorted((len(keys) - 1, keys.shape[1]))
    singular = singular[:shorter]
    beta = shorter / longer
    rounding = ROUNDING * float(singular[0])
    median = max(float(np.median(singular)), rounding)
    kept = max(int((singular > threshold_factor(beta) * median).sum()), 1)
    # The median eigenvalue of noise is nearly its mean, as beta is small or few are many.
    noise = float((singular[kept:] ** 2).mean()) if kept < shorter else median**2
    return Placement(centre, metric @ directions[:kept].T, max(noise, rounding**2) / longer)


def threshold_factor(beta: float) -> float:
    """omega(beta), within .02 of the exact factor.

    >>> round(threshold_factor(1.0), 2)
    2.86
    """
    return float(0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43)


def likeliest_groups(points: Array, noise: float) -> Groups:
    """The partition with the highest evidence (of equals, the fewest groups), its groups `joined`.

    Args:
        points: (n, D) placed keys.
        noise: psi
    """
    if len(points) == 1:
        return Groups(np.zeros(1, dtype=np.int64), noise, noise)
    best = -np.inf
    labels: Indices = np.zeros(len(points), dtype=np.int64)
    for candidate in candidates(points):
        value = evidence(points, candidate, noise)
        if value > best:
            best, labels = value, candidate
    labels = joined(points, labels)
    residuals = points - group_means(points, labels)[labels]
    freedom = max(len(points) - int(labels.max()) - 1, 1)
    variance = float((residuals**2).sum()) / (points.shape[1] * freedom) or noise
    return Groups(labels, variance, between_groups(points - residuals, labels, variance))


def joined(points: Array, labels: Indices) -> Indices:
    """Join the two nearest groups until all are `LEAST_APART`.

    Clients of one domain that hold other classes may well be groups among clients. If an image
    cannot tell which of them is its own, they are none for the choice of its prompts.

    Args:
        points: (n, D)
        labels: (n,) groups, from 0 without gaps.
    """
    while labels.max() > 0:
        means = group_means(points, labels)
        squares = ((means[:, None] - means) ** 2).sum(axis=2)
        np.fill_diagonal(squares, np.inf)
        first, second = sorted(np.unravel_index(int(squares.argmin()), squares.shape))
        if squares[first, second] >= LEAST_APART**2:
            break
        labels = np.where(labels == second, first, labels)
        labels = labels - (labels > second)
    return labels


def candidates(points: Array) -> Iterator[Indices]:
    """(n,) labels of partitions worth a look, from one group on."""
    tree = linkage(points, "ward")
    for groups in range(1, min(len(points), MOST_GROUPS) + 1):
        labels = cut_tree(tree, groups)
        yield labels
        if 1 < groups < len(points) and points.shape[1] > 1:  # one direction is even in itself
            for _ in range(MOST_EVENINGS):
                before = labels
                labels = cut_tree(linkage(evened(points, labels), "ward"), groups)
                if np.array_equal(before, labels):
                    break
                yield labels


def evidence(points: Array, labels: Indices, noise: float) -> float:
    """log p(X | K) + log p(K), up to a term of the points' number and width.

    Args:
        points: (n, D)
        labels: (n,) groups, from 0 without gaps.
        noise: psi
    """
    number, width = points.shape
    counts, means = np.bincount(labels), group_means(points, labels)
    residuals = points - means[labels]
    ratios = RATIOS if len(counts) > 1 else np.zeros(1)
    shares = counts / (1 + ratios[:, None] * counts)  # (R, K) a_k
    mass = shares.sum(axis=1)
    apart = means - (shares @ means / mass[:, None])[:, None]  # (R, K, D)
    scatter = (apart * shares[:, :, None]).transpose(0, 2, 1) @ apart
    scatter += residuals.T @ residuals + noise * np.eye(width)
    freedom = number - 1 + width + 2
    terms = freedom * np.linalg.slogdet(scatter)[1]
    terms += width * (np.log1p(ratios[:, None] * counts).sum(axis=1) + np.log(mass))
    prior = float(gammaln(counts).sum() - gammaln(number + 1))
    return float(logsumexp(-0.5 * terms)) - float(np.log(len(terms))) + prior
