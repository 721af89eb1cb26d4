"""How queries spread within clients: the metric in which a single image says its domain.

Images of one client differ by what they show, clients of two domains by their style as well. The
covariance within clients therefore says which differences between queries mean nothing. With equal
priors, the nearest key in its metric is linear discriminant analysis with the keys as class means:

    d^2(q, k) = (q - k)^T A (q - k),   A = ((1 - s) S / v + s m I)^-1

| here       | symbol | shape  | meaning                                                           |
|------------|--------|--------|-------------------------------------------------------------------|
| query, key | q, k   | (q,)   | of an image; mean query of a client, as it is                     |
| scatter    | S      | (q, q) | sum over clients of sum (q - mean)(q - mean)^T                    |
| freedom    | v      | ()     | sum over clients of their images less one                         |
| share      | s      | ()     | of oracle approximating shrinkage; m is the mean of S's diagonal  |
| metric     | M      | (q, q) | M M^T = A: |(q - k) M| is the distance                            |

Keys stay as clients sent them, so that a metric that improves from round to round changes nothing
that is stored. A client needs no metric: for each key it receives a linear discriminant.

Sources: Chen, Wiesel, Eldar and Hero, Shrinkage algorithms for MMSE covariance estimation, IEEE
Transactions on Signal Processing, 2010, Eq. 23; Fisher, The use of multiple measurements in
taxonomic problems, Annals of Eugenics, 1936.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def triangular_factor(queries: Tensor) -> Tensor:
    """What a client tells of its queries: R of centred queries = Q R, so that R^T R is its scatter.

    Args:
        queries: (n, q) of the client's images.

    Returns:
        `factor_size` numbers, float32: the upper triangle of R (k, q), row by row, k = min(n - 1,
        q). That is less than half a scatter has where n is small.
    """
    values: Array = queries.detach().cpu().numpy().astype(np.float64)
    count, width = values.shape
    rows = min(count - 1, width)
    # A first column of ones takes up the one dimension that centring empties. Without it the row
    # that is empty need not be the last: where leading columns depend on each other, it is not.
    centred = np.column_stack([np.ones(count), values - values.mean(axis=0)])
    factor: Array = np.linalg.qr(centred)[1][1 : rows + 1, 1:]
    return torch.from_numpy(factor[np.triu_indices(rows, 0, width)].astype(np.float32))


def factor_size(count: int, width: int) -> int:
    """Numbers that a client with so many images sends, for queries of so many numbers.

    >>> factor_size(3, 4), factor_size(100, 4)
    (7, 10)
    """
    rows = min(count - 1, width)
    return rows * width - rows * (rows - 1) // 2


def scatter_of(factor: Tensor, count: int, width: int) -> Array:
    """(q, q) scatter of the queries that a factor was made of.

    Args:
        factor: from `triangular_factor`.
        count: images of the client.
        width: q
    """
    rows = min(count - 1, width)
    triangle = np.zeros((rows, width))
    triangle[np.triu_indices(rows, 0, width)] = factor.numpy()
    return triangle.T @ triangle


def metric_of(scatter: Array, freedom: int) -> Array | None:
    """M (q, q), by which keys and queries are multiplied to compare them.

    Args:
        scatter: (q, q) summed over clients.
        freedom: images less clients.

    Returns:
        The metric, or None where nothing is known: no two images of a client differ.
    """
    width = len(scatter)
    if freedom < 1 or not scatter.any():
        return None
    covariance = shrunk(scatter / freedom, freedom)
    lower = np.linalg.cholesky(covariance)
    return np.ascontiguousarray(np.linalg.solve(lower, np.eye(width)).T)


def shrunk(covariance: Array, freedom: int) -> Array:
    """The covariance drawn towards a multiple of the identity, as few samples demand.

    Args:
        covariance: (q, q) of centred samples.
        freedom: how many independent samples it is the mean of.
    """
    width = len(covariance)
    mean = float(np.trace(covariance)) / width
    square = float((covariance**2).mean())
    uneven = (freedom + 1) * (square - mean**2 / width)
    share = min((square + mean**2) / uneven, 1.0) if uneven > 0 else 1.0
    result = (1 - share) * covariance
    result.flat[:: width + 1] += share * mean
    return result


def discriminants(keys: Tensor, metric: Array | None) -> Tensor:
    """Of each key w and b, such that w q + b is -d^2(q, key) / 2 up to a term of q alone.

    Args:
        keys: (n, q)
        metric: M (q, q); None for the identity.

    Returns:
        (n, q + 1) float32: w, then b. As many numbers as the keys, and one more for each.
    """
    values = keys.detach().cpu().numpy().astype(np.float64)
    if not len(values):
        return keys.new_zeros(0, values.shape[1] + 1)
    # Around their mean, so that large terms which all have in common are not rounded.
    centre = values.mean(axis=0)
    centred = values - centre
    weights = centred if metric is None else (centred @ metric) @ metric.T
    biases = -(weights @ centre) - 0.5 * (centred * weights).sum(axis=1)
    return torch.from_numpy(np.concatenate([weights, biases[:, None]], axis=1)).to(keys.dtype)
