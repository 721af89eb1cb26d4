"""Confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of the 95 % interval of the mean (Student's t); the latter is None for a
    single value.

    >>> mean, half = t_interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    from scipy import stats  # takes a while, and only this needs it

    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def share_interval(mean: float, half: float | None) -> tuple[float, float] | None:
    """Ends of the interval of a share's mean that stay within 0 and 1: on the logit scale, by the
    delta method. Narrow intervals are those of `t_interval`; None where that has none.

    Args:
        mean: of the shares, from 0 to 1.
        half: half width of its interval.

    >>> [round(end, 3) for end in share_interval(0.9, 0.01)], share_interval(0.5, None)
    ([0.89, 0.91], None)
    >>> [round(end, 3) for end in share_interval(0.5, 2.0)]
    [0.0, 1.0]
    """
    if half is None:
        return None
    if not half or not 0 < mean < 1:
        return mean, mean
    middle, reach = math.log(mean / (1 - mean)), half / (mean * (1 - mean))
    low, high = (0.5 + 0.5 * math.tanh((middle + side * reach) / 2) for side in (-1, 1))
    return low, high
