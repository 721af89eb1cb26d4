"""The matching core: one Hungarian problem per client, swept over clients until nothing changes.

The N local prompts of all clients are points; a *column* is a set of points, at most one per
client, that are taken for noisy copies of one summarizing prompt. This file moves points between
columns and knows nothing of the probability model, which it asks for scores (`MatchingModel`).

Every accepted move raises one objective, so the search ends; it is coordinate ascent (PFPT,
Algorithm 2) from several starts, with one additional move that joins two whole columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

NOWHERE = -1
"""Column of a point that is not placed yet."""


class Columns:
    """Which point is in which column, with the sufficient statistics of every column.

    Columns 0 to n-1 stand for remembered summarizing prompts and exist without members if their
    `strength` is positive; the others are born when a point enters and vanish with their last
    member.

    Args:
        points: (N, D), the rows of a client adjacent.
        owner: (N,) client of each point.
        strength: (n,) pseudo-count of each remembered prompt.
    """

    def __init__(self, points: Array, owner: Indices, strength: Array) -> None:
        size = len(strength) + len(points)
        self.points = points
        self.owner = owner
        self.num_remembered = len(strength)
        self.strength = np.concatenate([strength, np.zeros(len(points))])
        self.assignment = np.full(len(points), NOWHERE, dtype=np.int64)
        self.counts = np.zeros(size)
        self.sums = np.zeros((size, points.shape[1]))

    def place(self, rows: slice, targets: Indices) -> None:
        """Put the rows of one client into distinct columns."""
        self.assignment[rows] = targets
        self.counts[targets] += 1
        self.sums[targets] += self.points[rows]

    def remove(self, rows: slice) -> Indices:
        """Take the rows of one client out, and say where they were."""
        before = self.assignment[rows].copy()
        placed = before >= 0
        self.assignment[rows] = NOWHERE
        self.counts[before[placed]] -= 1
        self.sums[before[placed]] -= self.points[rows][placed]
        self.sums[before[placed][self.counts[before[placed]] == 0]] = 0.0
        return before

    def live(self) -> Indices:
        """(L,) columns that a point can join: those with members or with remembered strength."""
        return np.flatnonzero(self.counts + self.strength > 0)

    def free(self, number: int) -> Indices:
        """The first unused ids for columns to be born."""
        return (
            self.num_remembered + np.flatnonzero(self.counts[self.num_remembered :] == 0)[:number]
        )

    def born(self) -> Indices:
        """Columns with members that stand for no remembered prompt."""
        return self.num_remembered + np.flatnonzero(self.counts[self.num_remembered :] > 0)

    def scatter(self, part: slice) -> float:
        """Variance of a coordinate within columns (unbiased); 0 if no column has two members."""
        used = np.flatnonzero(self.counts)
        means = np.zeros((len(self.counts), part.stop - part.start))
        means[used] = self.sums[used, part] / self.counts[used, None]
        residual = self.points[:, part] - means[self.assignment]
        freedom = len(self.points) - len(used)
        return (
            float((residual**2).sum(axis=1).sum() / (freedom * residual.shape[1]))
            if freedom
            else 0.0
        )

    def membership(self, columns: Indices) -> NDArray[np.bool_]:
        """(m, L) whether a client has a point in a column."""
        table = np.zeros((int(self.owner.max(initial=-1)) + 1, len(self.counts)), dtype=bool)
        placed = self.assignment >= 0
        table[self.owner[placed], self.assignment[placed]] = True
        return table[:, columns]


class MatchingModel(Protocol):
    """What the search asks of a probability model."""

    def existing_scores(self, columns: Columns, rows: slice, live: Indices) -> Array:
        """(k, L) gain if a row joins a live column; the client's rows are not placed."""
        ...

    def new_scores(self, columns: Columns, rows: slice) -> Array:
        """(k, k) gain if a row becomes the client's 1st, 2nd, ... k-th new column."""
        ...

    def merge_gains(self, columns: Columns, live: Indices) -> Array:
        """(L, L) gain if two columns become one."""
        ...

    def objective(self, columns: Columns) -> float:
        """Log joint probability of points and columns, up to a constant."""
        ...


@dataclasses.dataclass(frozen=True)
class Search:
    """Where the search ended."""

    columns: Columns
    objective_before: float
    """At the start from which the best end was reached."""
    objective_after: float
    sweeps: int
    history: tuple[float, ...]
    """The objective after every accepted move."""


def hungarian(scores: Array) -> Indices:
    """The column of each row in the assignment with the greatest total; -inf forbids a pair.

    >>> hungarian(np.array([[5.0, 4.0], [5.0, 1.0]]))
    array([1, 0])
    """
    rows, picked = linear_sum_assignment(scores, maximize=True)
    result = np.empty(len(scores), dtype=np.int64)
    result[rows] = picked
    return result


def match_client(columns: Columns, model: MatchingModel, rows: slice) -> Indices:
    """Best columns for the rows of one client, not placed yet, the others held fixed (Eq. 27)."""
    live = columns.live()
    scores = np.concatenate(
        [model.existing_scores(columns, rows, live), model.new_scores(columns, rows)], axis=1
    )
    candidates = np.concatenate([live, columns.free(len(scores))])
    return candidates[hungarian(scores)]


def search(
    points: Array,
    owner: Indices,
    spans: Sequence[slice],
    strength: Array,
    model: MatchingModel,
    starts: Sequence[Indices],
    max_sweeps: int,
) -> Search:
    """Coordinate ascent from a sequential start and from each given one; the best end wins.

    Args:
        points: (N, D)
        owner: (N,)
        spans: rows of each client; the sequential start matches clients in this order.
        strength: (n,)
        model: gives the scores and the objective.
        starts: (N,) assignments, injective within each client.
        max_sweeps: bound on the sweeps of one ascent.
    """
    columns = Columns(points, owner, strength)
    for rows in spans:
        columns.place(rows, match_client(columns, model, rows))
    best = ascend(columns, spans, model, max_sweeps)
    for start in starts:
        columns = Columns(points, owner, strength)
        for rows in spans:
            columns.place(rows, start[rows])
        other = ascend(columns, spans, model, max_sweeps)
        if _rises(best.objective_after, other.objective_after):
            best = other
    return best


def ascend(
    columns: Columns, spans: Sequence[slice], model: MatchingModel, max_sweeps: int
) -> Search:
    """Sweep over clients, then join columns, until neither raises the objective."""
    history = [model.objective(columns)]
    sweeps = 0
    for sweep in range(1, max_sweeps + 1):
        moves = len(history)
        for rows in spans:
            _rematch(columns, model, rows, history)
        while _join(columns, model, history):
            pass
        sweeps = sweep
        if len(history) == moves:
            break
    return Search(columns, history[0], history[-1], sweeps, tuple(history))


def _rematch(columns: Columns, model: MatchingModel, rows: slice, history: list[float]) -> None:
    """Match one client anew; undo unless the objective rises."""
    before = columns.remove(rows)
    live = columns.live()
    after = match_client(columns, model, rows)
    stays = np.where(np.isin(after, live), after, NOWHERE)
    stayed = np.where(np.isin(before, live), before, NOWHERE)
    if np.array_equal(stays, stayed):
        columns.place(rows, before)
        return
    columns.place(rows, after)
    value = model.objective(columns)
    if _rises(history[-1], value):
        history.append(value)
    else:
        columns.remove(rows)
        columns.place(rows, before)


def _join(columns: Columns, model: MatchingModel, history: list[float]) -> bool:
    """Pour the newborn column with most gain into another; undo unless the objective rises."""
    live = columns.live()
    if len(live) < 2 or len(columns.born()) == 0:
        return False
    gains = model.merge_gains(columns, live)
    members = columns.membership(live).astype(np.int64)
    gains[(members.T @ members) > 0] = -np.inf  # a client's prompts are distinct
    gains[
        live < columns.num_remembered, :
    ] = -np.inf  # remembered prompts receive, but are not poured
    np.fill_diagonal(gains, -np.inf)
    source, target = np.unravel_index(int(np.argmax(gains)), gains.shape)
    if not gains[source, target] > 0:
        return False
    moved = np.flatnonzero(columns.assignment == live[source])
    for row in moved:
        columns.remove(slice(row, row + 1))
        columns.place(slice(row, row + 1), live[[target]])
    value = model.objective(columns)
    if _rises(history[-1], value):
        history.append(value)
        return True
    for row in moved:
        columns.remove(slice(row, row + 1))
        columns.place(slice(row, row + 1), live[[source]])
    return False


def _rises(before: float, after: float) -> bool:
    """Whether the gain is more than rounding."""
    return after > before + 1e-9 * max(1.0, abs(before))


def peer_distance(points: Array, owner: Indices) -> float | None:
    """Typical squared distance between a point and its counterpart at another client.

    For each point, the nearest point of every other client; of those the k-th smallest with k =
    ceil(m / 20), because the smallest of very many is too small; then the median over points.
    None if there is only one client.

    Args:
        points: (N, D)
        owner: (N,) ascending.
    """
    clients, begins = np.unique(owner, return_index=True)
    if len(clients) < 2:
        return None
    squares = (points**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * points @ points.T, 0.0)
    nearest = np.minimum.reduceat(distances, begins, axis=1)
    nearest[owner[:, None] == clients[None, :]] = np.inf
    rank = min(-(-len(clients) // 20), len(clients) - 1)
    return float(np.median(np.sort(nearest, axis=1)[:, rank - 1]))
