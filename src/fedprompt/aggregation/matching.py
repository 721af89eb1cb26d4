"""The matching core: one Hungarian problem per client, swept over clients until nothing changes.

The N local prompts of all clients are points; a *column* is a set of points, at most one per
client, that are taken for noisy copies of one summarizing prompt. This file moves points between
columns and knows nothing of the probability model, which it asks for scores (`MatchingModel`).

Every accepted move raises one objective, so the search ends. It is coordinate ascent (PFPT,
Algorithm 2) with three more moves: two whole columns are joined; a few neighbouring columns are
dissolved and dealt anew; the model's own parameters are fitted to the columns. Where the first
two starts agree and no point's column is in doubt the problem is easy and the search is over;
elsewhere, unless there is one client alone, it is annealed. Random draws come from a fixed seed:
same input, same result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from fedprompt.aggregation.arrays import Array, Indices

NOWHERE = -1
"""Column of a point that is not placed yet."""
FITS = 10
"""Bound on how often the model's parameters are fitted in one climb; two or three suffice."""
JOINED_AT_ONCE = 512
"""Columns that are compared for joining, the smallest first; bounds the table of gains."""
TEMPERATURES = np.linspace(1.0, 0.0, 20, endpoint=False)
"""Scale of the noise in the sweeps of an annealing; at 1 moves are about as random as posterior
draws."""
CLEAR = 3.0
"""Log odds, 20 to 1, at which a point's column is beyond doubt."""
WORK = 1e9
"""Multiplications that the annealings may cost."""


class Columns:
    """Which point is in which column, with the sufficient statistics of every column.

    Columns 0 to n-1 stand for remembered summarizing prompts and exist without members if their
    `strength` is positive; the others are born when a point enters and vanish with their last
    member.

    Args:
        points: (N, D), the rows of a client adjacent.
        owner: (N,) client of each point.
        strength: (n,) pseudo-count of each remembered prompt.
        classes: (N,) points of one class are expected in one column; None if nothing is expected.
        home: remembered column where a class is expected while it has no members, -1 for none; one
            for each class.
    """

    def __init__(
        self,
        points: Array,
        owner: Indices,
        strength: Array,
        classes: Indices | None = None,
        home: Indices | None = None,
    ) -> None:
        size = len(strength) + len(points)
        self.points = points
        self.owner = owner
        self.num_remembered = len(strength)
        self.strength = np.concatenate([strength, np.zeros(len(points))])
        self.assignment = np.full(len(points), NOWHERE, dtype=np.int64)
        self.counts = np.zeros(size)
        self.sums = np.zeros((size, points.shape[1]))
        # Random words, one per client: the exclusive or of its members' words names the set of
        # clients that a column has.
        words = np.random.default_rng(0).integers(
            1, 2**63, size=int(owner.max(initial=-1)) + 1, dtype=np.uint64
        )
        self._words = words[owner]
        self.signatures = np.zeros(size, dtype=np.uint64)
        self.classes = classes
        self.home = np.empty(0, dtype=np.int64) if home is None else home
        self.class_counts = np.zeros((len(self.home), size if len(self.home) else 0))
        known = np.flatnonzero(self.home >= 0)
        self.class_counts[known, self.home[known]] = 0.5  # decides where nobody is yet

    def place(self, rows: slice, targets: Indices) -> None:
        """Put rows of one client into distinct columns."""
        self.assignment[rows] = targets
        self.counts[targets] += 1
        self.sums[targets] += self.points[rows]
        self.signatures[targets] ^= self._words[rows]
        if self.classes is not None:
            self.class_counts[self.classes[rows], targets] += 1

    def remove(self, rows: slice) -> Indices:
        """Take placed rows of one client out, and say where they were."""
        before = self.assignment[rows].copy()
        self.assignment[rows] = NOWHERE
        self.counts[before] -= 1
        self.sums[before] -= self.points[rows]
        self.signatures[before] ^= self._words[rows]
        if self.classes is not None:
            self.class_counts[self.classes[rows], before] -= 1
        self.sums[before[self.counts[before] == 0]] = 0.0  # no rounding is left behind
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

    def expected(self, rows: slice) -> Indices | None:
        """(k,) the column with most members of each row's class, or its home; -1 for neither."""
        if self.classes is None:
            return None
        counts = self.class_counts[self.classes[rows]]
        return np.where(counts.any(axis=1), counts.argmax(axis=1), NOWHERE)

    def faithful(self) -> float:
        """Points that are where most of their class are; half of one more for being at home."""
        return float(self.class_counts.max(axis=1, initial=0.0).sum())

    def membership(self, columns: Indices) -> NDArray[np.bool_]:
        """(m, L) whether a client has a point in a column."""
        position = np.full(len(self.counts) + 1, -1)  # the last entry is for NOWHERE
        position[columns] = np.arange(len(columns))
        place = position[self.assignment]
        inside = place >= 0
        table = np.zeros((int(self.owner.max(initial=-1)) + 1, len(columns)), dtype=bool)
        table[self.owner[inside], place[inside]] = True
        return table

    def copy(self) -> Columns:
        """The same points in the same columns, to be changed on its own."""
        twin = object.__new__(Columns)
        twin.__dict__.update(self.__dict__)
        for name in ("assignment", "counts", "sums", "signatures", "class_counts"):
            setattr(twin, name, getattr(self, name).copy())
        return twin

    def same_partition(self, other: Columns) -> bool:
        """Whether the same points are together, and with the same remembered prompts."""
        return np.array_equal(self._canonical(), other._canonical())

    def _canonical(self) -> Indices:
        """(N,) the remembered column of each point, or else the first point of its column."""
        first = np.full(len(self.counts), len(self.points))
        np.minimum.at(first, self.assignment, np.arange(len(self.points)))
        born = self.assignment >= self.num_remembered
        return np.where(born, self.num_remembered + first[self.assignment], self.assignment)


class MatchingModel(Protocol):
    """What the search asks of a probability model."""

    def existing_scores(self, columns: Columns, rows: slice, live: Indices) -> Array:
        """(k, L) gain if a row joins a live column; the client's rows are not placed."""
        ...

    def new_scores(self, columns: Columns, rows: slice) -> Array:
        """(k, k) gain if a row becomes the client's 1st, 2nd, ... k-th new column."""
        ...

    def merge_gains(self, columns: Columns, sources: Indices, targets: Indices) -> Array:
        """(S, T) gain if a source column is poured into a target column."""
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
    rows, picked = linear_sum_assignment(scores, maximize=True)
    result = np.empty(len(scores), dtype=np.int64)
    result[rows] = picked
    return result


def match_client(
    columns: Columns,
    model: MatchingModel,
    rows: slice,
    rng: np.random.Generator | None = None,
    temperature: float = 0.0,
) -> Indices:
    """Best columns for the rows of one client, not placed yet, the others held fixed (Eq. 27).

    With a temperature, Gumbel noise of that scale is added to the scores.
    """
    live = columns.live()
    scores = np.concatenate(
        [model.existing_scores(columns, rows, live), model.new_scores(columns, rows)], axis=1
    )
    if rng is not None:
        scores += temperature * rng.gumbel(size=scores.shape)
    candidates = np.concatenate([live, columns.free(len(scores))])
    return candidates[settled(hungarian(scores), len(live))]


def settled(picked: Indices, known: int) -> Indices:
    """The picks, new columns (`known` and above) going to rows in order.

    New columns are alike, and which row gets which would depend on rounding.

    >>> settled(np.array([4, 1, 3]), 3)
    array([3, 1, 4])
    """
    new = np.flatnonzero(picked >= known)
    picked = picked.copy()
    picked[new] = known + np.arange(len(new))
    return picked


def search(
    columns: Columns,
    spans: Sequence[slice],
    models: Sequence[MatchingModel],
    starts: Sequence[Indices],
    max_sweeps: int,
    restarts: int,
) -> Search:
    """The best end of several climbs.

    Args:
        columns: without any placed point.
        spans: rows of each client that has some; the first start matches clients in this order.
        models: give the scores and the objective; they differ in what a climb fits, and there is
            a climb from each.
        starts: (N,) assignments to begin with besides, injective within each client.
        max_sweeps: bound on the sweeps between two fits of one climb.
        restarts: annealings, and as many dozens of regroupings, where the problem is not easy.
    """
    ends = [climb(in_order(columns, model, spans), spans, model, max_sweeps) for model in models]
    for start in starts:
        given = placed(columns, spans, start)
        ends.append(climb(given, spans, models[0].fitted(given), max_sweeps))
    best = highest(ends)
    model = next((m for m, end in zip(models, ends, strict=False) if end is best), models[0])
    sweep_cost = columns.points.size * max(len(best.columns.live()), 1)
    restarts = min(restarts, int(WORK / (len(TEMPERATURES) * sweep_cost)))
    if restarts == 0:
        return best
    backwards = climb(in_order(columns, model, spans[::-1]), spans, model, max_sweeps)
    dense = crowded(columns, model, spans)
    ends = [best, backwards, climb(dense, spans, model.fitted(dense), max_sweeps)]
    agree = backwards.columns.same_partition(best.columns)
    best = highest(ends)
    if len(spans) == 1 or (agree and least_odds(best.columns, best.model, spans) > CLEAR):
        return best
    rng = np.random.default_rng(0)
    for _ in range(restarts):
        best = highest([best, annealed(best, spans, max_sweeps, rng)])
    return regrouped(best, spans, max_sweeps, 12 * restarts, rng)


def highest(ends: Sequence[Search]) -> Search:
    """The end with the greatest objective, of nearly equal ones the first."""
    best = ends[0]
    for end in ends[1:]:
        if rises(best.objective, end.objective):
            best = end
    return best


def in_order(columns: Columns, model: MatchingModel, order: Iterable[slice]) -> Columns:
    """Match one client after another to those before it."""
    columns = columns.copy()
    for rows in order:
        columns.place(rows, match_client(columns, model, rows))
    return columns


def crowded(columns: Columns, model: MatchingModel, spans: Iterable[slice]) -> Columns:
    """Open a column only where a client has more prompts than there are columns.

    In the order of `in_order` a single true prompt is not seen: its copies are the whole cloud.
    """
    columns = columns.copy()
    for rows in spans:
        live = columns.live()
        number = rows.stop - rows.start
        scores = model.existing_scores(columns, rows, live)
        missing = max(number - len(live), 0)
        scores = np.concatenate([scores, np.full((number, missing), scores.min(initial=0.0))], 1)
        picked = settled(hungarian(scores), len(live))
        columns.place(rows, np.concatenate([live, columns.free(missing)])[picked])
    return columns


def placed(columns: Columns, spans: Sequence[slice], assignment: Indices) -> Columns:
    """Place all points as given."""
    columns = columns.copy()
    for rows in spans:
        columns.place(rows, assignment[rows])
    return columns


def climb(
    columns: Columns, spans: Sequence[slice], model: MatchingModel, max_sweeps: int
) -> Search:
    """Ascend, fit the model's parameters to the columns, and again, until nothing rises."""
    end = ascend(columns, spans, model, max_sweeps)
    for _ in range(FITS):
        model = end.model.fitted(end.columns)
        if not rises(end.objective, model.objective(end.columns)):
            break
        end = continued(end, ascend(end.columns, spans, model, max_sweeps))
    return end


def continued(first: Search, second: Search) -> Search:
    """Two searches, of which the second began where the first ended."""
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
    """Sweep over clients, then join columns, until neither raises the objective; in place."""
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


def least_odds(columns: Columns, model: MatchingModel, spans: Iterable[slice]) -> float:
    """Least log odds of a point's column against its next best, other clients held fixed."""
    least = np.inf
    for rows in spans:
        before = columns.remove(rows)
        live = columns.live()
        scores = np.concatenate(
            [model.existing_scores(columns, rows, live), model.new_scores(columns, rows)[:, :1]], 1
        )
        columns.place(rows, before)
        own = np.where(np.isin(before, live), np.searchsorted(live, before), len(live))[:, None]
        held = np.take_along_axis(scores, own, axis=1)[:, 0]
        np.put_along_axis(scores, own, -np.inf, axis=1)
        least = min(least, float((held - scores.max(axis=1)).min()))
    return least


def annealed(
    start: Search, spans: Sequence[slice], max_sweeps: int, rng: np.random.Generator
) -> Search:
    """Sweep with Gumbel noise on the scores, less and less of it, and climb from where that ends.

    A point that had the choice alone would so draw its column from the posterior (perturb and MAP,
    Papandreou and Yuille, ICCV 2011). This leaves optima that every ordered start falls into.
    """
    columns, model = start.columns.copy(), start.model
    for temperature in TEMPERATURES:
        for t in rng.permutation(len(spans)):
            columns.remove(spans[t])
            matched = match_client(columns, model, spans[t], rng, float(temperature))
            columns.place(spans[t], matched)
        model = model.fitted(columns)
    return climb(columns, spans, model, max_sweeps)


def regrouped(
    best: Search, spans: Sequence[slice], max_sweeps: int, attempts: int, rng: np.random.Generator
) -> Search:
    """Deal a few neighbouring columns anew, again and again; keep what raises the objective.

    This mends what sweeps cannot: two columns that each hold halves of the same two prompts.
    """
    for _ in range(attempts):
        columns = best.columns.copy()
        live = columns.live()
        if len(live) < 2:
            break
        anchor = rng.integers(len(live))
        gains = best.model.merge_gains(columns, live[[anchor]], live)[0]
        gains[anchor] = np.inf
        number = int(rng.integers(2, min(5, len(live) + 1)))
        chosen = live[np.argsort(-gains, kind="stable")[:number]]
        affected = [rows for rows in spans if np.isin(columns.assignment[rows], chosen).any()]
        for rows in affected:
            columns.remove(rows)
        for t in rng.permutation(len(affected)):
            columns.place(affected[t], match_client(columns, best.model, affected[t]))
        end = ascend(columns, affected, best.model, 3)
        if rises(best.objective, end.objective):
            best = continued(best, climb(end.columns, spans, best.model, max_sweeps))
    return best


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
    """(S, T) gain of pouring; -inf where a client would have two prompts in one column."""
    gains = model.merge_gains(columns, sources, targets)
    givers = columns.membership(sources).astype(np.float32)
    takers = columns.membership(targets).astype(np.float32)
    gains[(givers.T @ takers > 0) | (sources[:, None] == targets)] = -np.inf
    return gains


def pour(columns: Columns, rows: Indices, target: np.int64) -> None:
    """Move rows of different clients into one column."""
    for row in rows:
        columns.remove(slice(row, row + 1))
        columns.place(slice(row, row + 1), np.array([target]))


def rises(before: float, after: float) -> bool:
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
