"""Drawing splits in which every class keeps its share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stratified_parts(
    labels: NDArray[np.int64], shares: tuple[float, ...], generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Divide the indices of `labels` so that each part holds its share of every class.

    Args:
        labels: (N,)
        shares: of all parts but the last, which receives the rest.
        generator: decides who goes where.

    Returns:
        `len(shares) + 1` disjoint sorted index arrays that together hold 0..N-1.

    >>> parts = stratified_parts(np.repeat([0, 1], 10), (0.2,), np.random.default_rng(0))
    >>> [len(part) for part in parts]
    [4, 16]
    """
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(len(shares) + 1)]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(shares) * len(members)).astype(int)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)).astype(np.int64) for part in parts]
