"""Aggregation by clustering: what the baselines `gmm` and `kmeans` have in common.

All local prompts are thrown into one bag and clustered, whichever client they come from. The rule
that a client has at most one copy of each summarizing prompt is not used, and may be broken: two
prompts of one client can end in one cluster.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from fedprompt.aggregation.arrays import Array, Indices, lexicographic, member_means
from fedprompt.aggregation.base import Aggregation
from fedprompt.aggregation.cohort import Cohort, previous_of


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a clustering method returns. N points, K clusters, some of which may be empty."""

    labels: Indices
    """(N,) cluster of each point, from 0 to K - 1."""
    centroids: Array
    """(K, d) in the units of the points given."""
    figures: Mapping[str, float]
    """For `Aggregation.diagnostics`."""


FitPoints = Callable[[Array, int, int], Fit]
"""(N, d) standardised points, bound on the number of clusters (less than N), seed."""


@dataclasses.dataclass(frozen=True)
class Standardised:
    """Points = `unit` * (`centre` + `spread` * `values`); any scale of the points gives the same
    values, up to rounding.
    """

    values: Array
    """(N, d), mean square 1, mean 0."""
    centre: Array
    """(d,)"""
    spread: float
    unit: float

    def restore(self, values: Array) -> Array:
        """Back into the units of the points; within their range, so never infinite."""
        scaled: Array = np.clip(self.centre + self.spread * values, -1.0, 1.0) * self.unit
        return scaled


def standardise(points: Array) -> Standardised:
    """Divide by the largest number, subtract the mean, divide by the root mean square.

    >>> standardise(np.array([[0.0], [4e300]])).values
    array([[-1.],
           [ 1.]])
    """
    unit = float(np.abs(points).max(initial=0.0)) or 1.0
    scaled = points / unit
    centre = scaled.mean(axis=0)
    values = scaled - centre
    # In two steps, because the squares of very small differences would vanish.
    largest = float(np.abs(values).max(initial=0.0)) or 1.0
    values = values / largest
    root = float(np.sqrt((values**2).mean())) or 1.0
    return Standardised(values / root, centre, root * largest, unit)


def aggregate_clusters(cohort: Cohort, bound: int, fit: FitPoints, seed: int) -> Aggregation:
    """Cluster all local prompts; a cluster's key is the mean of its members' keys.

    With no more different prompts than `bound` there is nothing to merge: each becomes a cluster.
    The rows of the result are in the order of their content. Empty clusters vanish.

    Args:
        cohort: N local prompts (N, d), and their keys (N, q) if there are any.
        bound: on the number of clusters.
        fit: the clustering method.
        seed: of its random draws.

    Raises:
        InputError: only empty sets were returned and nothing was broadcast.
    """
    if len(cohort.prompts) == 0:
        return _nothing_returned(cohort)
    found = _cluster(cohort.prompts, bound, fit, seed)
    used, members = np.unique(found.labels, return_inverse=True)
    prompts = found.centroids[used]
    keys = None if cohort.keys is None else member_means(cohort.keys, members, len(used))
    content = prompts if keys is None else np.concatenate([prompts, keys], axis=1)
    order = np.array(lexicographic(content), dtype=np.int64)
    row_of = np.empty_like(order)
    row_of[order] = np.arange(len(order))
    return Aggregation(
        prompts=torch.tensor(prompts[order], dtype=cohort.dtype),
        keys=None if keys is None else torch.tensor(keys[order], dtype=cohort.key_dtype),
        assignment=cohort.restore(row_of[members]),
        state={},
        diagnostics={
            "num_prompts": float(len(used)),
            "dropped": float(len(found.centroids) - len(used)),
            **found.figures,
        },
    )


def _cluster(points: Array, bound: int, fit: FitPoints, seed: int) -> Fit:
    """Clusters of points of any scale, centroids in their units."""
    standard = standardise(points)
    _, first, labels = np.unique(standard.values, axis=0, return_index=True, return_inverse=True)
    if len(first) <= bound:
        return Fit(labels.reshape(-1), points[first], {"iterations": 0.0})
    with warnings.catch_warnings():
        # Not converged in so many iterations: the figures say how many there were.
        warnings.simplefilter("ignore")
        found = fit(standard.values, bound, seed)
    return dataclasses.replace(found, centroids=standard.restore(found.centroids))


def largest_set(cohort: Cohort) -> int:
    """The number of prompts of the client that has most."""
    return int(np.bincount(cohort.owner, minlength=1).max())


def _nothing_returned(cohort: Cohort) -> Aggregation:
    """Every client returned an empty set: nothing changes."""
    previous = previous_of(cohort)
    keys: Tensor | None = None
    if cohort.previous_keys is not None:
        keys = torch.tensor(cohort.previous_keys, dtype=cohort.key_dtype)
    return Aggregation(
        prompts=torch.tensor(previous, dtype=cohort.dtype),
        keys=keys,
        assignment=cohort.restore(np.empty(0, dtype=np.int64)),
        state={},
        diagnostics={
            "num_prompts": float(len(previous)),
            "dropped": 0.0,
            "iterations": 0.0,
        },
    )
