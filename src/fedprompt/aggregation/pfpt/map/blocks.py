"""The Gaussian parts of the model: a point is a prompt and perhaps a key, each its own block."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from scipy.optimize import minimize_scalar

from fedprompt.aggregation.arrays import Array, Indices
from fedprompt.aggregation.pfpt.map.columns import Columns

LEAST_BASE = 1e-4
"""Smallest base variance in units of the noise, so that the posterior exists."""
NOISE_FLOOR = 1e-8
"""Smallest noise variance in units of the total variance: identical prompts stay finite."""
NOISE_RANGE = 4.0
"""A fit moves the noise variance by at most this factor; the next fit may move it further."""


LOG_2PI = math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class Block:
    """The part of a point that is its prompt, with its Gaussian model.

    The log density is multiplied by `power`.
    """

    part: slice
    """Coordinates of the block within a point, which are centred at the base mean."""
    noise: float
    """Variance of a coordinate around its summarizing vector."""
    base: float
    """Variance of a coordinate of the summarizing vectors around the base mean."""
    power: float
    prior_mean: Array
    """(n, D) of each remembered column."""
    strength: Array
    """(n,) clients that each remembered mean counts for."""
    total: float = 0.0
    """Noise plus base, of which a fit settles the shares; 0 for a noise that is known."""

    def precision(self, columns: Columns, which: Indices) -> Array:
        """(L,) precision of the columns' vectors before their members, in units of 1 / noise."""
        result = np.full(len(which), self.noise / self.base)
        old = which < columns.num_remembered
        result[old] += self.strength[which[old]]
        return result

    def prior_sum(self, columns: Columns, which: Indices) -> Array:
        """(L, D) what memory adds to the sum of the members; zero for newborn columns."""
        result = np.zeros((len(which), self.part.stop - self.part.start))
        old = which < columns.num_remembered
        result[old] = self.strength[which[old], None] * self.prior_mean[which[old]]
        return result

    def posterior(self, columns: Columns, which: Indices) -> tuple[Array, Array]:
        """Mean (L, D) and variance (L,) of each column's summarizing vector, given its members."""
        precision = self.precision(columns, which) + columns.counts[which]
        total = self.prior_sum(columns, which) + columns.sums[which, self.part]
        return total / precision[:, None], self.noise / precision

    def match_scores(self, columns: Columns, rows: slice, live: Indices) -> Array:
        """(k, L) Eq. 9: log N(omega_tk | phi_i, alpha + s_i) with the posterior's mean and s_i.

        Args:
            columns: in which `rows` are not placed.
            rows: k rows of one client.
            live: (L,) columns.
        """
        mean, variance = self.posterior(columns, live)
        return self.power * log_normal(columns.points[rows, self.part], mean, self.noise + variance)

    def new_scores(self, columns: Columns, rows: slice) -> Array:
        """(k, 1) log N(omega_tk | mu0, noise + base)."""
        points = columns.points[rows, self.part]  # centred, so mu0 is zero
        variance = np.array([self.noise + self.base])
        return self.power * _log_density(squares_of(points)[:, None], variance, points.shape[1])

    def evidence(self, columns: Columns, which: Indices) -> Array:
        """(L,) log density of the members of each column, up to a term of the points alone."""
        prior = self.prior_sum(columns, which)
        squares = squares_of(prior + columns.sums[which, self.part])
        precision = self.precision(columns, which)
        return self.evidence_of(precision, columns.counts[which], squares, squares_of(prior))

    def evidence_of(self, precision: Array, counts: Array, squares: Array, prior: Array) -> Array:
        """D/2 log(p / (p + c)) + (|b + S|^2 / (p + c) - |b|^2 / p) / (2 noise), times the power.

        Args:
            precision: p, before the members.
            counts: c members.
            squares: |b + S|^2, with b the prior's and S the members' sum.
            prior: |b|^2
        """
        dimension = self.part.stop - self.part.start
        quadratic = squares / (precision + counts) - prior / precision
        result: Array = (0.5 * self.power) * (
            dimension * np.log(precision / (precision + counts)) + quadratic / self.noise
        )
        return result

    def joined(self, columns: Columns, sources: Indices, targets: Indices) -> Array:
        """(S, T) evidence of the target columns with a source column poured in.

        Args:
            columns: in which all points are placed.
            sources: (S,) columns that are poured.
            targets: (T,) columns that receive.
        """
        users = columns.counts[sources][:, None] + columns.counts[targets]
        prior = self.prior_sum(columns, targets)
        total = prior + columns.sums[targets, self.part]
        own = columns.sums[sources, self.part]
        squares = squares_of(total) + squares_of(own)[:, None] + 2 * own @ total.T
        return self.evidence_of(self.precision(columns, targets), users, squares, squares_of(prior))

    def fitted(self, columns: Columns) -> Block:
        """With the most likely noise, if it is not known."""
        return fit_noise(self, columns) if self.total else self

    def of_points(self, points: Array) -> float:
        """The term of the points alone: their log density around zero with the noise's variance."""
        squares = float(np.einsum("nd,nd->", points[:, self.part], points[:, self.part]))
        number = len(points) * (self.part.stop - self.part.start)
        density = squares / self.noise + number * (LOG_2PI + math.log(self.noise))
        return float(-0.5 * self.power * density)


def fit_noise(block: Block, columns: Columns) -> Block:
    """The block with the most likely noise variance, or itself; noise plus base stay the same."""
    live, points = columns.live(), columns.points[:, block.part]
    scale = float(np.einsum("nd,nd->", points, points)) / points.size
    prior = block.prior_sum(columns, live)
    squares = squares_of(prior + columns.sums[live, block.part])

    def with_noise(noise: float) -> Block:
        return dataclasses.replace(block, noise=noise, base=block.total - noise)

    def value(candidate: Block) -> float:
        precision = candidate.precision(columns, live)
        counts = columns.counts[live]
        evidence = candidate.evidence_of(precision, counts, squares, squares_of(prior))
        density = scale / candidate.noise + LOG_2PI + math.log(candidate.noise)
        return float(evidence.sum()) - 0.5 * candidate.power * points.size * density

    low, high = block.noise / NOISE_RANGE, block.noise * NOISE_RANGE
    low = max(low, NOISE_FLOOR * block.total)
    high = min(high, block.total / (1 + LEAST_BASE))
    if low >= high:
        return block
    found = minimize_scalar(
        lambda log_noise: -value(with_noise(math.exp(log_noise))),
        bounds=(math.log(low), math.log(high)),
        method="bounded",
        options={"xatol": 1e-4},
    )
    better = with_noise(math.exp(found.x))
    return better if value(better) > value(block) else block


@dataclasses.dataclass(frozen=True)
class KeyBlock:
    """The part of a point that is its key: every summarizing prompt has the key of one of K groups.

    The group of a newborn column is the most likely one for its members, all K being equally likely
    beforehand. Opening a second column in a group so costs log K and nothing for its key.
    """

    part: slice
    """Coordinates within a point, in units of the key noise tau."""
    power: float
    """Factor on the log density."""
    centres: Array
    """(K, q) key of each group."""
    remembered: Array
    """(n, q) key of each remembered column."""

    @functools.cached_property
    def _squared_centres(self) -> Array:
        """(K,) squared norms, which every match needs."""
        return squares_of(self.centres)

    def keys(self, columns: Columns, which: Indices) -> Array:
        """(L, q) key that each column stands for."""
        return self._keys(columns, which, columns.sums[which, self.part], columns.counts[which])

    def _keys(self, columns: Columns, which: Indices, sums: Array, counts: Array) -> Array:
        fit = 2 * sums @ self.centres.T - counts[:, None] * self._squared_centres
        result: Array = self.centres[fit.argmax(axis=1)]
        old = which < columns.num_remembered
        result[old] = self.remembered[which[old]]
        return result

    def match_scores(self, columns: Columns, rows: slice, live: Indices) -> Array:
        """(k, L) log N(q_t | kappa_i, tau^2), less a constant.

        Args:
            columns: in which `rows` are not placed.
            rows: k rows of one client.
            live: (L,) columns.
        """
        keys = self.keys(columns, live)
        return self._density(columns.points[rows, self.part], keys, squares_of(keys))

    def new_scores(self, columns: Columns, rows: slice) -> Array:
        """(k, 1) the same under the most likely group, and log 1/K for the choice of it."""
        own = columns.points[rows, self.part]
        density = self._density(own, self.centres, self._squared_centres)
        result: Array = density.max(axis=1, keepdims=True) - math.log(len(self.centres))
        return result

    def _density(self, points: Array, keys: Array, squared_keys: Array) -> Array:
        squares = squares_of(points)[:, None] + squared_keys - 2 * points @ keys.T
        result: Array = -0.5 * self.power * np.maximum(squares, 0.0)
        return result

    def evidence(self, columns: Columns, which: Indices) -> Array:
        """(L,) log density of the members' keys, up to a term of the points alone."""
        sums, counts = columns.sums[which, self.part], columns.counts[which]
        return self._evidence_of(columns, which, sums, counts)

    def _evidence_of(self, columns: Columns, which: Indices, sums: Array, counts: Array) -> Array:
        keys = self._keys(columns, which, sums, counts)
        density = np.einsum("lq,lq->l", sums, keys) - 0.5 * counts * squares_of(keys)
        choice = math.log(len(self.centres)) * (which >= columns.num_remembered)
        result: Array = self.power * density - choice
        return result

    def joined(self, columns: Columns, sources: Indices, targets: Indices) -> Array:
        """(S, T) evidence of the target columns with a source column poured in.

        Args:
            columns: in which all points are placed.
            sources: (S,) columns that are poured.
            targets: (T,) columns that receive.
        """
        result = np.empty((len(sources), len(targets)))
        for i, source in enumerate(sources):
            sums = columns.sums[targets, self.part] + columns.sums[source, self.part]
            counts = columns.counts[targets] + columns.counts[source]
            result[i] = self._evidence_of(columns, targets, sums, counts)
        return result

    def fitted(self, columns: Columns) -> KeyBlock:
        """Itself: groups and noise are inferred before the search."""
        return self

    def of_points(self, points: Array) -> float:
        """The term of the points alone."""
        return -0.5 * self.power * float(squares_of(points[:, self.part]).sum())


def log_normal(points: Array, means: Array, variances: Array) -> Array:
    """(k, L) log N(point | mean, variance I).

    Args:
        points: (k, D)
        means: (L, D)
        variances: (L,)

    >>> log_normal(np.zeros((1, 2)), np.zeros((1, 2)), np.ones(1)).round(4)
    array([[-1.8379]])
    """
    squares = squares_of(points)[:, None] + squares_of(means) - 2 * points @ means.T
    return _log_density(np.maximum(squares, 0), variances, points.shape[1])


def _log_density(squares: Array, variances: Array, dimension: int) -> Array:
    """Of points at (k, L) squared distances from the means of L isotropic Gaussians."""
    result: Array = -0.5 * (dimension * (LOG_2PI + np.log(variances)) + squares / variances)
    return result


def squares_of(rows: Array) -> Array:
    """(L,) squared norms of (L, D) rows."""
    result: Array = np.einsum("ld,ld->l", rows, rows)
    return result
