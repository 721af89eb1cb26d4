"""A control for the value of matching: each client's prompts are dealt to rows at random.

Everything else is as in `mean`. What an aggregator gains over this, it owes to knowing which
prompts belong together.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fedprompt.aggregation.arrays import Array, Indices
from fedprompt.aggregation.base import Aggregation, Aggregator, aggregators
from fedprompt.aggregation.cohort import Cohort
from fedprompt.aggregation.inputs import AggregationInput
from fedprompt.aggregation.mean import weighted_row_mean


@dataclasses.dataclass(frozen=True)
class RandomOptions:
    """Random matching has no options."""


@aggregators.register("random", RandomOptions)
class Random(Aggregator):
    """Row-wise mean under a random matching, injective within a client. Stateless."""

    adds_prompts = False

    def __init__(self, options: RandomOptions) -> None:
        self.options = options

    def merge(self, given: AggregationInput) -> Aggregation:
        """Deal and average; there are as many rows as were broadcast, or as the largest set has."""
        cohort = Cohort.of(given)
        sizes = [span.stop - span.start for span in cohort.spans()]
        number = max([*sizes, 0 if cohort.previous is None else len(cohort.previous)])
        draws = np.random.default_rng(given.draw_seed())
        dealt = [draws.permutation(number)[:size] for size in sizes]
        rows = np.concatenate([np.empty(0, dtype=np.int64), *dealt])
        prompts = _mean(cohort, cohort.prompts, rows, number, cohort.previous)
        new_keys = None
        if cohort.keys is not None:
            new_keys = _mean(cohort, cohort.keys, rows, number, cohort.previous_keys)
        elif cohort.previous_keys is not None:
            new_keys = _mean(
                cohort,
                np.empty((0, cohort.previous_keys.shape[1])),
                rows[:0],
                number,
                cohort.previous_keys,
            )
        return Aggregation(
            prompts=torch.tensor(prompts, dtype=cohort.dtype),
            keys=None if new_keys is None else torch.tensor(new_keys, dtype=cohort.key_dtype),
            assignment=cohort.restore(rows),
            state={},
            diagnostics={"num_prompts": float(number)},
        )


def _mean(
    cohort: Cohort,
    values: Array,
    rows: Indices,
    number: int,
    before: Array | None,
) -> Array:
    """Weighted means of the values of each row; rows without one keep what was broadcast."""
    fallback = np.zeros((number, values.shape[1]))
    if before is not None:
        fallback[: len(before)] = before
    return weighted_row_mean(values, rows, cohort.weights[cohort.owner][: len(rows)], fallback)
