"""Types of arrays, and small pure functions on them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def member_means(values: Array, labels: Indices, number: int) -> Array:
    """(number, d) mean of the values that share a label; zero without any.

    Args:
        values: (N, d)
        labels: (N,) from 0 to number - 1.
        number: of labels.

    >>> member_means(np.array([[1.0], [3.0], [7.0]]), np.array([0, 0, 2]), 3)
    array([[2.],
           [0.],
           [7.]])
    """
    counts = np.maximum(np.bincount(labels, minlength=number), 1)
    result = np.zeros((number, values.shape[1]))
    # Divided first, so that the sum of very large values stays finite.
    np.add.at(result, labels, values / counts[labels, None])
    return result


def lexicographic(rows: Array) -> Indices:
    """Indices that sort rows number by number, first column first.

    >>> lexicographic(np.array([[2.0, 0.0], [1.0, 9.0], [1.0, 3.0]]))
    array([2, 1, 0])
    """
    order = np.argsort(rows[:, 0], kind="stable")
    first = rows[order, 0]
    if (first[1:] != first[:-1]).all():  # as good as always, and much faster
        return order
    values = rows.tolist()
    return np.array(sorted(range(len(values)), key=values.__getitem__), dtype=np.int64)


def standard_units(values: Array) -> tuple[Array, float]:
    """Mean (d,) and standard deviation over all coordinates of (N, d) values; 0 if all are equal.

    >>> standard_units(np.array([[1.0, 5.0], [3.0, 5.0]]))[0]
    array([2., 5.])
    >>> round(standard_units(np.array([[0.0, 0.0], [2e200, 2e200]]))[1] / 1e200, 6)
    1.0
    """
    centre = values.mean(axis=0)
    residual = values - centre
    largest = float(np.abs(residual).max())
    if largest == 0:
        return centre, 0.0
    residual /= largest
    return centre, largest * math.sqrt(
        float(np.einsum("nd,nd->", residual, residual)) / values.size
    )
