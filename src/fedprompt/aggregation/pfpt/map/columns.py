"""Columns: sets of points, at most one per client, taken for copies of one summarizing prompt.

The N local prompts of all clients are the points.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedprompt.aggregation.arrays import Array, Indices

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
        self.class_counts[known, self.home[known]] = 0.5  # decides where no member is yet

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
