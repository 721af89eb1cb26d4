"""An aggregator: the trimmed mean, which a few wrong clients cannot move.

Yin, Chen, Kannan and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
Rates", ICML 2018, Definition 2: in each coordinate the largest and the smallest share of the
clients' values are left out, and the others count alike. It is robust where fewer clients than
that share are wrong. Here it is taken row by row, over the clients that used a row.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fedprompt.aggregation import (
    Aggregation,
    AggregationInput,
    Aggregator,
    Cohort,
    aggregators,
)
from fedprompt.aggregation.arrays import Array
from fedprompt.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TrimmedMeanOptions:
    """Options of `trimmed_mean`."""

    trim: float = 0.1
    """Share of the clients that is left out at each end, rounded down; 0 is the plain mean."""

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise ConfigError(
                f"aggregator.trim: expected a share of at least 0 and below 0.5, got {self.trim}"
            )


@aggregators.register("trimmed_mean", TrimmedMeanOptions)
class TrimmedMean(Aggregator):
    """Each row becomes the trimmed mean of the clients that used it; unused rows stay."""

    keeps_rows = True

    def __init__(self, options: TrimmedMeanOptions) -> None:
        self.options = options

    def merge(self, given: AggregationInput) -> Aggregation:
        """Trim and average row by row; without origins, rows are matched by position."""
        if given.origins is None:
            origins = [torch.arange(len(prompts)) for prompts in given.prompt_sets]
            given = dataclasses.replace(given, origins=origins)
        cohort = Cohort.of(given)
        row_of = cohort.origins
        assert row_of is not None
        number = row_of.max(initial=-1) + 1 if cohort.previous is None else len(cohort.previous)

        def merged(values: Array, broadcast: Array | None) -> Array:
            rows = np.zeros((number, values.shape[1])) if broadcast is None else broadcast.copy()
            for row in np.unique(row_of):
                rows[row] = trimmed_mean(values[row_of == row], self.options.trim)
            return rows

        prompts = merged(cohort.prompts, cohort.previous)
        keys = cohort.previous_keys
        if cohort.keys is not None:
            keys = merged(cohort.keys, cohort.previous_keys)
        return Aggregation(
            prompts=torch.tensor(prompts, dtype=cohort.dtype),
            keys=None if keys is None else torch.tensor(keys, dtype=cohort.key_dtype),
            assignment=cohort.restore(row_of),
            state={},
            diagnostics={"num_prompts": float(number)},
        )


def trimmed_mean(values: Array, trim: float) -> Array:
    """Mean of each column without its largest and smallest values.

    Args:
        values: (N, d)
        trim: share of the N values that is left out at each end.

    >>> trimmed_mean(np.array([[1.0], [2.0], [6.0], [1000.0]]), 0.25)
    array([4.])
    """
    left_out = int(trim * len(values))
    kept: Array = np.sort(values, axis=0)[left_out : len(values) - left_out]
    return np.asarray(kept.mean(axis=0))
