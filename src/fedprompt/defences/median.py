"""`median`: the coordinate-wise median of the clients' tensors.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
Definition 1. All clients count alike, whatever number of samples they claim.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fedprompt.defences.base import Array, RobustMean, defences


@dataclasses.dataclass(frozen=True)
class MedianOptions:
    """No options."""


@defences.register("median", MedianOptions)
class Median(RobustMean):
    """The middle value of each number."""

    def centre(self, values: Array) -> Array:
        """(D,) of (m, D).

        >>> Median(MedianOptions()).centre(np.array([[1.0, 9.0], [2.0, 0.0], [99.0, 1.0]]))
        array([2., 1.])
        """
        return np.asarray(np.median(values, axis=0))
