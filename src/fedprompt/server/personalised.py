"""Figures over clients: how well each is served, not how well the average image is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class ClientFigures:
    """Accuracy of each client's own model on its own share of a held-out split."""

    accuracy: Mapping[int, float]
    """By client; clients without held-out images are left out."""

    def summary(self) -> dict[str, Any]:
        """`mean`, `deviation`, `worst_tenth`, `jain`, the number of `clients`, and each one's
        accuracy.
        """
        values = [self.accuracy[client] for client in sorted(self.accuracy)]
        return {
            **describe(values),
            "clients": len(values),
            "by_client": {str(client): self.accuracy[client] for client in sorted(self.accuracy)},
        }


def describe(values: list[float]) -> dict[str, float]:
    """Mean, standard deviation (over all clients, not a sample), mean of the worst tenth (at least
    one client), and Jain's index of fairness: (sum x)^2 / (n sum x^2), 1 if all are served alike
    and 1 / n if one alone is (Jain, Chiu and Hawe, DEC-TR-301, 1984).

    >>> describe([1.0, 0.0])
    {'mean': 0.5, 'deviation': 0.5, 'worst_tenth': 0.0, 'jain': 0.5}
    """
    if not values:
        return dict.fromkeys(("mean", "deviation", "worst_tenth", "jain"), math.nan)
    array = np.sort(np.asarray(values, dtype=np.float64))
    squares = float((array**2).sum())
    return {
        "mean": float(array.mean()),
        "deviation": float(array.std()),
        "worst_tenth": float(array[: math.ceil(len(array) / 10)].mean()),
        "jain": float(array.sum() ** 2 / (len(array) * squares)) if squares else math.nan,
    }
