"""Which broadcast row each column continues."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from fedprompt.aggregation.arrays import Array, Indices
from fedprompt.aggregation.cohort import Cohort
from fedprompt.aggregation.pfpt.map.columns import Columns


def label_prompts(columns: Columns, cohort: Cohort, strength: Array) -> Indices:
    """(N,) label of each local prompt: its broadcast row, or n, n + 1, ... for the newborn.

    A broadcast row without strength cannot be matched (nothing is remembered of it, as in the
    first round). It is continued by the newborn column in which most prompts started from it;
    without origins, by the nearest column.

    Args:
        columns: in which all points are placed.
        cohort: the inputs.
        strength: (n,) of the broadcast rows.
    """
    born = columns.born()
    label_of = np.full(len(columns.counts), -1, dtype=np.int64)
    label_of[: columns.num_remembered] = np.arange(columns.num_remembered)
    empty = np.flatnonzero(strength == 0)
    if len(born) and len(empty) and cohort.previous is not None:
        affinity = np.stack(
            [_affinity(cohort, columns.assignment == column, empty) for column in born]
        )
        linked = _best_pairs(affinity)
        label_of[born[linked[:, 0]]] = empty[linked[:, 1]]
    newborn = born[label_of[born] < 0]
    label_of[newborn] = columns.num_remembered + np.arange(len(newborn))
    result: Indices = label_of[columns.assignment]
    return result


def _affinity(cohort: Cohort, members: NDArray[np.bool_], rows: Indices) -> Array:
    """(rows,) how well broadcast rows are continued by a set of local prompts; 0 if not at all."""
    previous = cast(Array, cohort.previous)
    if cohort.origins is not None:
        counts = np.bincount(cohort.origins[members], minlength=len(previous))
        return counts[rows].astype(np.float64)
    distance = ((previous[rows] - cohort.prompts[members].mean(axis=0)) ** 2).mean(axis=1)
    scale = float(np.var(cohort.prompts, axis=0).mean() + distance.min()) or 1.0
    nearness: Array = 1 / (1 + distance / scale)
    return nearness


def _best_pairs(affinity: Array) -> Indices:
    """(P, 2) pairs of the one-to-one assignment with the greatest total; none of affinity 0."""
    rows, chosen = linear_sum_assignment(affinity, maximize=True)
    pairs = np.stack([rows, chosen], axis=1)
    result: Indices = pairs[affinity[rows, chosen] > 0]
    return result
