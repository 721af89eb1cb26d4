"""Checked inputs in one canonical order, so that the order of clients and rows cannot matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.aggregation.arrays import Array, Indices, lexicographic
from fedprompt.aggregation.inputs import AggregationInput
from fedprompt.core.errors import InputError

Scalar = TypeVar("Scalar", bound=np.generic)
Places = tuple[tuple[int, Indices], ...]
"""Per client in canonical order: the caller's index of the client and of each of its rows."""


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Checked inputs as flat float64 arrays in canonical order. N = n_1 + ... + n_m local prompts.

    Clients are ordered by size (largest first), then by content; rows within a client by content.
    Content is compared number by number, so that a common shift or a positive scale of all
    prompts keeps the order.
    """

    prompts: Array
    """(N, d)"""
    keys: Array | None
    """(N, q)"""
    origins: Indices | None
    """(N,)"""
    owner: Indices
    """(N,) canonical index of the client that each row came from, ascending."""
    weights: Array
    """(m,) in canonical client order."""
    previous: Array | None
    """(n, d)"""
    previous_keys: Array | None
    """(n, q)"""
    metric: Array | None
    """(q, q)"""
    others: Array | None
    """(M, q) keys of clients of earlier rounds."""
    dtype: torch.dtype
    key_dtype: torch.dtype
    places: Places

    @classmethod
    def of(cls, given: AggregationInput) -> Cohort:
        """Copy what was received and sort rows within clients, then clients.

        Raises:
            InputError: there are broadcast keys, but no prompts that they belong to.
        """
        given.check_pair()
        prompts = [_array(rows) for rows in given.prompt_sets]
        keys = None if given.keys is None else [_array(rows) for rows in given.keys]
        origins = None if given.origins is None else [_indices(rows) for rows in given.origins]
        weights = _weights(given)
        content = [
            _content(
                rows, None if keys is None else keys[t], None if origins is None else origins[t]
            )
            for t, rows in enumerate(prompts)
        ]
        row_order = [lexicographic(rows) for rows in content]
        client_order = _client_order(content, row_order, weights)
        places = tuple((client, row_order[client]) for client in client_order)
        sizes = [len(rows) for _, rows in places]
        return cls(
            prompts=_stacked(prompts, places),
            keys=None if keys is None else _stacked(keys, places),
            origins=None if origins is None else _stacked(origins, places),
            owner=np.repeat(np.arange(len(places), dtype=np.int64), sizes),
            weights=weights[client_order],
            previous=None if given.previous is None else _array(given.previous),
            previous_keys=None if given.previous_keys is None else _array(given.previous_keys),
            metric=None if given.metric is None else _array(given.metric),
            others=None if given.others is None else _array(given.others),
            dtype=given.prompt_sets[0].dtype,
            key_dtype=_key_dtype(given),
            places=places,
        )

    @property
    def num_clients(self) -> int:
        """m, clients with an empty set included."""
        return len(self.places)

    def spans(self) -> list[slice]:
        """The rows of each client."""
        ends = np.cumsum([len(rows) for _, rows in self.places])
        return [
            slice(int(end) - len(p[1]), int(end)) for end, p in zip(ends, self.places, strict=True)
        ]

    def restore(self, assignment: Indices) -> list[Tensor]:
        """Split an (N,) assignment into one tensor per client, in the caller's order."""
        result = [torch.empty(0, dtype=torch.int64)] * self.num_clients
        for (client, rows), span in zip(self.places, self.spans(), strict=True):
            mine = np.empty(len(rows), dtype=np.int64)
            mine[rows] = assignment[span]
            result[client] = torch.from_numpy(mine)
        return result


def previous_of(cohort: Cohort) -> Array:
    """The broadcast prompts (n, d), which stay as they are when every client returned an empty set.

    Raises:
        InputError: there are none.
    """
    if cohort.previous is None:
        raise InputError(
            "prompt_sets: expected at least one prompt from some client, got only empty sets; "
            "pass previous, so that there is something to keep"
        )
    return cohort.previous


def _content(prompts: Array, keys: Array | None, origins: Indices | None) -> Array:
    """What one client's rows are compared by.

    Args:
        prompts: (n_t, d)
        keys: (n_t, q)
        origins: (n_t,)
    """
    columns = [prompts]
    if keys is not None:
        columns.append(keys)
    if origins is not None:
        columns.append(origins[:, None].astype(np.float64))
    return np.concatenate(columns, axis=1) if len(columns) > 1 else prompts


def _client_order(content: list[Array], row_order: list[Indices], weights: Array) -> list[int]:
    """Clients by size, then by the content of their sorted rows, then by weight."""
    heads = [
        (-len(rows), float(rows[order[0], 0]) if len(rows) else 0.0)
        for rows, order in zip(content, row_order, strict=True)
    ]
    if len(set(heads)) == len(heads):
        return sorted(range(len(heads)), key=heads.__getitem__)
    whole = [
        (-len(rows), rows[order].tolist(), weight)
        for rows, order, weight in zip(content, row_order, weights.tolist(), strict=True)
    ]
    return sorted(range(len(whole)), key=whole.__getitem__)


def _stacked(values: Sequence[NDArray[Scalar]], places: Places) -> NDArray[Scalar]:
    """The clients' rows one after another, in canonical order."""
    return np.concatenate([values[client][rows] for client, rows in places])


def _key_dtype(given: AggregationInput) -> torch.dtype:
    """The dtype of the keys that clients sent, or else of those that were broadcast."""
    if given.keys is not None:
        return given.keys[0].dtype
    return given.prompt_sets[0].dtype if given.previous_keys is None else given.previous_keys.dtype


def _weights(given: AggregationInput) -> Array:
    """(m,) sample counts, or ones."""
    if given.weights is None:
        return np.ones(len(given.prompt_sets))
    return _array(torch.as_tensor(given.weights))


def _array(tensor: Tensor) -> Array:
    """A float64 copy in numpy."""
    return np.array(tensor.detach().cpu().to(torch.float64).numpy(), dtype=np.float64)


def _indices(tensor: Tensor) -> Indices:
    """An int64 copy in numpy."""
    return np.array(tensor.detach().cpu().numpy(), dtype=np.int64)
