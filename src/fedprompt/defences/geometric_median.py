"""`geometric_median`: the point with the least sum of distances to the clients' tensors.

Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning" (RFA), IEEE Transactions
on Signal Processing 2022, Algorithm 2 (smoothed Weiszfeld). All clients count alike here.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fedprompt.core.checks import check_integer, check_number
from fedprompt.defences.base import Array, RobustMean, defences


@dataclasses.dataclass(frozen=True)
class GeometricMedianOptions:
    """Options of the geometric median."""

    steps: int = 100
    """Most steps of Weiszfeld's algorithm."""
    tolerance: float = 1e-8
    """A step that is shorter than this share of the values' spread is the last; distances below it
    count as it."""

    def __post_init__(self) -> None:
        check_integer("defence.steps", self.steps, 1)
        check_number("defence.tolerance", self.tolerance, 0, above=True)


@defences.register("geometric_median", GeometricMedianOptions)
class GeometricMedian(RobustMean):
    """One centre for all numbers together."""

    options: GeometricMedianOptions

    def centre(self, values: Array) -> Array:
        """(D,) of (m, D), from the coordinate-wise median on.

        >>> five = np.array([[0.0], [1.0], [2.0], [3.0], [1e6]])
        >>> GeometricMedian(GeometricMedianOptions()).centre(five).round(3)
        array([2.])
        """
        point = np.median(values, axis=0)
        distances = np.linalg.norm(values - point, axis=1)
        scale = float(np.median(distances))
        if scale == 0:  # at least half of the clients are there
            return np.asarray(point)
        for _ in range(self.options.steps):
            shares = 1 / np.maximum(distances, self.options.tolerance * scale)
            nearer = (shares / shares.sum()) @ values
            moved = float(np.linalg.norm(nearer - point))
            point, distances = nearer, np.linalg.norm(values - nearer, axis=1)
            if moved < self.options.tolerance * scale:
                break
        return np.asarray(point)
