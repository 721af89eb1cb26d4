"""`trimmed_mean`: the mean of each number without its largest and smallest values.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
Definition 2. All clients count alike, whatever number of samples they claim.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fedprompt.core.checks import check_number
from fedprompt.defences.base import Array, RobustMean, defences


@dataclasses.dataclass(frozen=True)
class TrimmedMeanOptions:
    """Options of the trimmed mean."""

    share: float = 0.2
    """Share of the clients that is left out at each end, rounded up; at least one client stays."""

    def __post_init__(self) -> None:
        check_number("defence.share", self.share, 0, below=0.5)


@defences.register("trimmed_mean", TrimmedMeanOptions)
class TrimmedMean(RobustMean):
    """The mean of what lies in the middle."""

    options: TrimmedMeanOptions

    def centre(self, values: Array) -> Array:
        """(D,) of (m, D).

        >>> TrimmedMean(TrimmedMeanOptions()).centre(np.array([[1.0], [2.0], [3.0], [5.0], [99.0]]))
        array([3.33333333])
        """
        number = len(values)
        ends = min(math.ceil(self.options.share * number - 1e-9), (number - 1) // 2)
        return np.asarray(np.sort(values, axis=0)[ends : number - ends].mean(axis=0))
