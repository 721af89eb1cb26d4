"""The matching core: one Hungarian problem per client, swept over clients until nothing changes.

This file moves points between columns and knows nothing of the probability model, which it asks
for scores (`MatchingModel`). Every accepted move raises one objective, so a climb ends. It is
coordinate ascent (PFPT, Algorithm 2) with two more moves: two whole columns are joined, and the
model's own parameters are fitted to the columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from scipy.optimize import linear_sum_assignment

from fedprompt.aggregation.arrays import Array, Indices
from fedprompt.aggregation.pfpt.map.columns import NOWHERE, Columns

FITS = 10
"""Bound on how often the model's parameters are fitted in one climb; two or three suffice."""
JOINED_AT_ONCE = 512
"""Columns that are compared for joining, the smallest first; bounds the table of gains."""


class MatchingModel(Protocol):
    """What the search asks of a probability model."""

    def existing_scores(self, columns: Columns, rows: slice, live: Indices) -> Array:
        """(k, L) gain if a row joins a live column.

        Args:
            columns: in which `rows` are not placed.
            rows: k rows of one client.
            live: (L,) columns.
        """
        ...

    def new_scores(self, columns: Columns, rows: slice) -> Array:
        """(k, k) gain if a row becomes the client's 1st, 2nd, ... k-th new column."""
        ...

    def merge_gains(self, columns: Columns, sources: Indices, targets: Indices) -> Array:
        """(S, T) gain if a source column is poured into a target column.

        Args:
            columns: in which all points are placed.
            sources: (S,) columns that are poured.
            targets: (T,) columns that receive.
        """
        ...

    def objective(self, columns: Columns) -> float:
        """Log joint probability of all points, their columns and the model's parameters."""
        ...

    def fitted(self, columns: Columns) -> MatchingModel:
        """With parameters whose objective for these columns is higher, or itself."""
        ...


@dataclasses.dataclass(frozen=True)
class Search:
    """Where a search ended."""

    columns: Columns
    model: MatchingModel
    history: tuple[float, ...]
    """The objective at the start and after every accepted move; it never falls."""
    sweeps: int
    joins: int = 0
    """Whole columns that were poured into others."""

    @property
    def objective(self) -> float:
        """At the end."""
        return self.history[-1]


def hungarian(scores: Array) -> Indices:
    """The column of each row in the assignment with the greatest total; -inf forbids a pair.

    >>> hungarian(np.array([[5.0, 4.0], [5.0, 1.0]]))
    array([1, 0])
    """
    rows, chosen = linear_sum_assignment(scores, maximize=True)
    result = np.empty(len(scores), dtype=np.int64)
    result[rows] = chosen
    return result


def match_client(
    columns: Columns,
    model: MatchingModel,
    rows: slice,
    rng: np.random.Generator | None = None,
    temperature: float = 0.0,
) -> Indices:
    """Best columns for the rows of one client, not placed yet, the others held fixed (Eq. 27).

    Args:
        columns: all others' points are placed.
        model: gives the scores.
        rows: k rows of one client.
        rng: source of the noise; none is added without.
        temperature: scale of the Gumbel noise that is added to the scores.

    Returns:
        (k,) distinct columns.
    """
    live = columns.live()
    scores = np.concatenate(
        [model.existing_scores(columns, rows, live), model.new_scores(columns, rows)], axis=1
    )
    if rng is not None:
        scores += temperature * rng.gumbel(size=scores.shape)
    candidates = np.concatenate([live, columns.free(len(scores))])
    return candidates[settled(hungarian(scores), len(live))]


def settled(chosen: Indices, known: int) -> Indices:
    """The choice, new columns (`known` and above) going to rows in order.

    New columns are alike, and which row gets which would depend on rounding.

    >>> settled(np.array([4, 1, 3]), 3)
    array([3, 1, 4])
    """
    new = np.flatnonzero(chosen >= known)
    chosen = chosen.copy()
    chosen[new] = known + np.arange(len(new))
    return chosen


def climb(
    columns: Columns, spans: Sequence[slice], model: MatchingModel, max_sweeps: int
) -> Search:
    """Ascend, fit the model's parameters to the columns, and again, until nothing rises.

    Args:
        columns: the start, in which all points are placed; changed in place.
        spans: rows of each client that has some.
        model: gives the scores and the objective.
        max_sweeps: bound on the sweeps between two fits.
    """
    end = ascend(columns, spans, model, max_sweeps)
    for _ in range(FITS):
        model = end.model.fitted(end.columns)
        if not rises(end.objective, model.objective(end.columns)):
            break
        end = continued(end, ascend(end.columns, spans, model, max_sweeps))
    return end


def continued(first: Search, second: Search) -> Search:
    """Two searches, of which the second started where the first ended."""
    return Search(
        second.columns,
        second.model,
        first.history + second.history,
        first.sweeps + second.sweeps,
        first.joins + second.joins,
    )


def ascend(
    columns: Columns, spans: Sequence[slice], model: MatchingModel, max_sweeps: int
) -> Search:
    """Sweep over clients, then join columns, until neither raises the objective.

    Args:
        columns: the start, in which all points are placed; changed in place.
        spans: rows of the clients that are matched anew.
        model: gives the scores and the objective.
        max_sweeps: bound on the sweeps.
    """
    history = [model.objective(columns)]
    sweeps = joins = 0
    for sweep in range(1, max_sweeps + 1):
        moves = len(history)
        for rows in spans:
            _rematch(columns, model, rows, history)
        while _join(columns, model, history):
            joins += 1
        sweeps = sweep
        if len(history) == moves:
            break
    return Search(columns, model, tuple(history), sweeps, joins)


def _rematch(columns: Columns, model: MatchingModel, rows: slice, history: list[float]) -> None:
    """Match one client anew; undo unless the objective rises."""
    before = columns.remove(rows)
    after = match_client(columns, model, rows)
    exists = columns.counts + columns.strength > 0
    if np.array_equal(
        np.where(exists[after], after, NOWHERE), np.where(exists[before], before, NOWHERE)
    ):
        columns.place(rows, before)
        return
    columns.place(rows, after)
    value = model.objective(columns)
    if rises(history[-1], value):
        history.append(value)
    else:
        columns.remove(rows)
        columns.place(rows, before)


def _join(columns: Columns, model: MatchingModel, history: list[float]) -> bool:
    """Pour the newborn column with most gain into another; undo unless the objective rises.

    Remembered prompts receive, but are not poured.
    """
    live, sources = columns.live(), columns.born()
    if len(live) < 2 or len(sources) == 0:
        return False
    sources = sources[np.argsort(columns.counts[sources], kind="stable")[:JOINED_AT_ONCE]]
    gains = join_gains(columns, model, sources, live)
    source, target = np.unravel_index(int(np.argmax(gains)), gains.shape)
    if not gains[source, target] > 0:
        return False
    moved = np.flatnonzero(columns.assignment == sources[source])
    pour(columns, moved, live[target])
    value = model.objective(columns)
    if rises(history[-1], value):
        history.append(value)
        return True
    pour(columns, moved, sources[source])
    return False


def join_gains(columns: Columns, model: MatchingModel, sources: Indices, targets: Indices) -> Array:
    """(S, T) gain of pouring; -inf where a client would have two prompts in one column.

    Args:
        columns: in which all points are placed.
        model: gives the gains.
        sources: (S,) columns that are poured.
        targets: (T,) columns that receive.
    """
    gains = model.merge_gains(columns, sources, targets)
    givers = columns.membership(sources).astype(np.float32)
    takers = columns.membership(targets).astype(np.float32)
    gains[(givers.T @ takers > 0) | (sources[:, None] == targets)] = -np.inf
    return gains


def pour(columns: Columns, rows: Indices, target: np.int64) -> None:
    """Move rows of different clients into one column.

    Args:
        columns: changed in place.
        rows: (k,) points.
        target: the column.
    """
    for row in rows:
        columns.remove(slice(row, row + 1))
        columns.place(slice(row, row + 1), np.array([target]))


def rises(before: float, after: float) -> bool:
    """Whether the gain is more than rounding."""
    return after > before + 1e-9 * max(1.0, abs(before))
