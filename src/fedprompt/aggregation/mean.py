"""FedAvg-PT with selection: a row becomes the weighted mean of the clients that used it.

Without selection, when every client returns all rows, this is federated averaging of the prompt
matrix (McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
Data", AISTATS 2017).
"""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.aggregation.arrays import Array, Indices
from fedprompt.aggregation.base import Aggregation, Aggregator, aggregators
from fedprompt.aggregation.cohort import Cohort
from fedprompt.aggregation.inputs import AggregationInput
from fedprompt.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class MeanOptions:
    """The mean has no options."""


@aggregators.register("mean", MeanOptions)
class Mean(Aggregator):
    """Row-wise weighted mean; rows that no client used keep their previous value."""

    keeps_rows = True

    def __init__(self, options: MeanOptions) -> None:
        self.options = options

    def merge(self, given: AggregationInput) -> Aggregation:
        """Average row by row; without `origins`, sets have equal size and match by position."""
        if given.origins is None:
            given = dataclasses.replace(given, origins=_positions(given))
        cohort = Cohort.of(given)
        rows = cast(Indices, cohort.origins)
        size = int(rows.max(initial=-1)) + 1 if cohort.previous is None else len(cohort.previous)
        row_weights = cohort.weights[cohort.owner]
        used = np.bincount(rows, minlength=size) > 0
        fallback = _fallback("previous", cohort.previous, used, cohort.prompts.shape[1])
        prompts = weighted_row_mean(cohort.prompts, rows, row_weights, fallback)
        new_keys = cohort.previous_keys
        if cohort.keys is not None:
            fallback = _fallback("previous_keys", cohort.previous_keys, used, cohort.keys.shape[1])
            new_keys = weighted_row_mean(cohort.keys, rows, row_weights, fallback)
        return Aggregation(
            prompts=torch.tensor(prompts, dtype=cohort.dtype),
            keys=None if new_keys is None else torch.tensor(new_keys, dtype=cohort.key_dtype),
            assignment=cohort.restore(rows),
            state={},
            diagnostics={"num_prompts": float(size), "updated": float(used.sum())},
        )


def weighted_row_mean(values: Array, rows: Indices, weights: Array, fallback: Array) -> Array:
    """Mean of the values that share a row, weighted; rows without values are taken from `fallback`.

    Args:
        values: (N, d)
        rows: (N,) which of the n rows each value belongs to.
        weights: (N,)
        fallback: (n, d)

    >>> values = np.array([[0.0], [4.0]])
    >>> weighted_row_mean(values, np.array([1, 1]), np.array([3.0, 1.0]), np.array([[7.0], [7.0]]))
    array([[7.],
           [1.]])
    """
    total = np.zeros_like(fallback)
    np.add.at(total, rows, weights[:, None] * values)
    mass = np.bincount(rows, weights=weights, minlength=len(fallback))[:, None]
    return np.where(mass > 0, total / np.where(mass > 0, mass, 1.0), fallback)


def _positions(given: AggregationInput) -> list[Tensor]:
    """Origins 0, 1, 2, ... for every client."""
    sizes = [len(prompts) for prompts in given.prompt_sets]
    expected = sizes[0] if given.previous is None else len(given.previous)
    for client, size in enumerate(sizes):
        if size != expected:
            raise InputError(
                f"client {client}: prompts: expected {expected} rows, got {size}; without origins "
                "rows are matched by position, so pass origins when clients return subsets"
            )
    return [torch.arange(size) for size in sizes]


def _fallback(what: str, values: Array | None, used: NDArray[np.bool_], width: int) -> Array:
    """The values that unused rows keep."""
    if values is not None:
        return values
    if not used.all() or len(used) == 0:
        missing = int(np.argmin(used)) if len(used) else 0
        raise InputError(
            f"{what}: expected the broadcast values because no client used row {missing}, "
            f"got None; pass {what}"
        )
    return np.zeros((len(used), width))
