"""The generative model of PFPT's `map` variant: Beta-Bernoulli inclusion, Gaussian prompts.

    phi_i ~ N(mu0, base I)                      summarizing prompts, Poisson(rate) many
    p_i ~ Beta(a, b),  c_ti ~ Bernoulli(p_i)    whether client t uses phi_i (Eq. 5-6)
    omega_tk ~ N(phi_i, noise I)                if prompt k of client t was drawn from phi_i (Eq. 7)

p_i and phi_i are integrated out. As a -> 0 with b = 1 and rate * a = gamma the inclusion prior is
the Indian buffet process (Griffiths and Ghahramani, JMLR 2011), where every search starts; a, b and
the rate are then fitted to the columns, as are noise and base. A point may have several blocks
(the prompt and its key), each with variances of its own.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import betaln, digamma, expit, gammaln

from fedprompt.aggregation.arrays import Array, Indices
from fedprompt.aggregation.matching import Columns

LOG_2PI = math.log(2 * math.pi)
LEAST_BASE = 1e-4
"""Smallest base variance in units of the noise, so that the posterior exists."""
NOISE_FLOOR = 1e-8
"""Smallest noise variance in units of the total variance: identical prompts stay finite."""
NOISE_RANGE = 4.0
"""A fit moves the noise variance by at most this factor; the next fit may move it further."""


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
        """(k, L) Eq. 9: log N(omega_tk | phi_i, alpha + s_i) with the posterior's mean and s_i."""
        mean, variance = self.posterior(columns, live)
        return self.power * log_normal(columns.points[rows, self.part], mean, self.noise + variance)

    def new_scores(self, columns: Columns, rows: slice) -> Array:
        """(k, 1) log N(omega_tk | mu0, noise + base)."""
        mean = np.zeros((1, self.part.stop - self.part.start))
        variance = np.array([self.noise + self.base])
        return self.power * log_normal(columns.points[rows, self.part], mean, variance)

    def evidence(self, columns: Columns, which: Indices) -> Array:
        """(L,) log density of the members of each column, up to a term of the points alone."""
        prior = self.prior_sum(columns, which)
        squares = _squares(prior + columns.sums[which, self.part])
        precision = self.precision(columns, which)
        return self.evidence_of(precision, columns.counts[which], squares, _squares(prior))

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
        """(S, T) evidence of the target columns with a source column poured in."""
        users = columns.counts[sources][:, None] + columns.counts[targets]
        prior = self.prior_sum(columns, targets)
        total = prior + columns.sums[targets, self.part]
        own = columns.sums[sources, self.part]
        squares = _squares(total) + _squares(own)[:, None] + 2 * own @ total.T
        return self.evidence_of(self.precision(columns, targets), users, squares, _squares(prior))

    def fitted(self, columns: Columns) -> Block:
        """With the most likely noise, if it is not known."""
        return fit_noise(self, columns) if self.total else self

    def of_points(self, points: Array) -> float:
        """The term of the points alone: their log density around zero with the noise's variance."""
        squares = float(np.einsum("nd,nd->", points[:, self.part], points[:, self.part]))
        number = len(points) * (self.part.stop - self.part.start)
        density = squares / self.noise + number * (LOG_2PI + math.log(self.noise))
        return float(-0.5 * self.power * density)


def log_normal(points: Array, means: Array, variances: Array) -> Array:
    """(k, L) log N(point | mean, variance I); (k, D) points, (L, D) means, (L,) variances.

    >>> log_normal(np.zeros((1, 2)), np.zeros((1, 2)), np.ones(1)).round(4)
    array([[-1.8379]])
    """
    squares = _squares(points)[:, None] + _squares(means) - 2 * points @ means.T
    dimension = points.shape[1]
    result: Array = -0.5 * (
        dimension * (LOG_2PI + np.log(variances)) + np.maximum(squares, 0) / variances
    )
    return result


def _squares(rows: Array) -> Array:
    result: Array = np.einsum("ld,ld->l", rows, rows)
    return result


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

    def keys(self, columns: Columns, which: Indices) -> Array:
        """(L, q) key that each column stands for."""
        return self._keys(columns, which, columns.sums[which, self.part], columns.counts[which])

    def _keys(self, columns: Columns, which: Indices, sums: Array, counts: Array) -> Array:
        fit = 2 * sums @ self.centres.T - counts[:, None] * _squares(self.centres)
        result: Array = self.centres[fit.argmax(axis=1)]
        old = which < columns.num_remembered
        result[old] = self.remembered[which[old]]
        return result

    def match_scores(self, columns: Columns, rows: slice, live: Indices) -> Array:
        """(k, L) log N(q_t | kappa_i, tau^2), less a constant."""
        return self._density(columns.points[rows, self.part], self.keys(columns, live))

    def new_scores(self, columns: Columns, rows: slice) -> Array:
        """(k, 1) the same under the most likely group, and log 1/K for the choice of it."""
        density = self._density(columns.points[rows, self.part], self.centres)
        result: Array = density.max(axis=1, keepdims=True) - math.log(len(self.centres))
        return result

    def _density(self, points: Array, keys: Array) -> Array:
        squares = _squares(points)[:, None] + _squares(keys) - 2 * points @ keys.T
        result: Array = -0.5 * self.power * np.maximum(squares, 0.0)
        return result

    def evidence(self, columns: Columns, which: Indices) -> Array:
        """(L,) log density of the members' keys, up to a term of the points alone."""
        sums, counts = columns.sums[which, self.part], columns.counts[which]
        return self._evidence_of(columns, which, sums, counts)

    def _evidence_of(self, columns: Columns, which: Indices, sums: Array, counts: Array) -> Array:
        keys = self._keys(columns, which, sums, counts)
        density = np.einsum("lq,lq->l", sums, keys) - 0.5 * counts * _squares(keys)
        choice = math.log(len(self.centres)) * (which >= columns.num_remembered)
        result: Array = self.power * density - choice
        return result

    def joined(self, columns: Columns, sources: Indices, targets: Indices) -> Array:
        """(S, T) evidence of the target columns with a source column poured in."""
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
        return -0.5 * self.power * float(_squares(points[:, self.part]).sum())


@dataclasses.dataclass(frozen=True)
class Inclusion:
    """How often summarizing prompts are used: p_i ~ Beta(a, b), and how many there are."""

    a: float
    b: float
    log_price: float
    """log(rate / B(a, b)); log gamma for the Indian buffet process, which has a = 0 and b = 1."""
    gamma: float
    """Mass before anything was seen: the expected number of columns is Gamma(1 + gamma) a priori,
    with a rate near 0."""

    @classmethod
    def indian_buffet(cls, gamma: float) -> Inclusion:
        """The prior of the start."""
        return cls(0.0, 1.0, math.log(gamma), gamma)

    def log_odds(self, users: Array, others: Array) -> Array:
        """Log odds that one more client uses a prompt, given how many of the others do."""
        result: Array = np.log((users + self.a) / (others - users + self.b))
        return result

    def log_born(self, users: Array, clients: float) -> Array:
        """Log prior of newborn columns with the given numbers of users."""
        result: Array = self.log_price + betaln(users + self.a, clients - users + self.b)
        return result

    def log_grown(self, users: Array, clients: float, before: Array, most: float) -> Array:
        """For remembered columns, of which `before` of `most` earlier clients were users."""
        result: Array = betaln(before + users + self.a, most - before + clients - users + self.b)
        result -= betaln(before + self.a, most - before + self.b)
        return result

    def log_rest(self, clients: float) -> float:
        """What no column has a share in: the number's normaliser and the parameters' prior."""
        if self.a == 0:
            expected = self.gamma * float(digamma(clients + 1) - digamma(1))
        else:
            unused = math.exp(betaln(self.a, clients + self.b) - betaln(self.a, self.b))
            expected = math.exp(self.log_price + betaln(self.a, self.b)) * (1 - unused)
        return self.gamma * math.log(expected) - expected + float(_log_hyper(self.a + self.b))


def _log_hyper(size: float | Array) -> float | Array:
    """Log prior of a + b: within a factor of about seven of 4, which few data can overrule."""
    return -0.125 * np.log(np.asarray(size) / 4) ** 2


def fit_inclusion(
    born: Array, clients: float, users: Array, before: Array, most: float, gamma: float
) -> Inclusion:
    """The most likely of 108 inclusion priors, given how many clients use each column.

    Args:
        born: users of each newborn column.
        clients: m
        users: of each remembered column.
        before: pseudo-users of each remembered column.
        most: clients that the memory stands for.
        gamma: see `Inclusion`.
    """
    mean = expit(np.linspace(-4, 4.5, 18))
    mean, size = (axis.reshape(-1, 1) for axis in np.meshgrid(mean, 2.0 ** np.arange(6)))
    a, b = mean * size, (1 - mean) * size
    values, times = np.unique(born, return_counts=True)
    expected = len(born) + gamma  # the most likely one
    unused = np.exp(betaln(a, clients + b) - betaln(a, b))
    log_price = np.log(expected / (1 - unused)) - betaln(a, b)
    grid = Inclusion(a, b, log_price, gamma)
    value = (times * grid.log_born(values, clients)).sum(axis=1)
    value += grid.log_grown(users, clients, before, most).sum(axis=1)
    value += np.asarray(_log_hyper(a + b))[:, 0]
    best = int(np.argmax(value))
    return Inclusion(float(a[best, 0]), float(b[best, 0]), float(log_price[best, 0]), gamma)


@dataclasses.dataclass(frozen=True)
class BetaBernoulliModel:
    """Scores, objective and fits of the model above; a `MatchingModel`."""

    prompts: Block
    keys: KeyBlock | None
    inclusion: Inclusion
    num_clients: int
    """m, clients of the round."""
    log_faithful: float = 0.0
    """Log prior odds that a point is where most points of its class are."""

    @property
    def blocks(self) -> tuple[Block | KeyBlock, ...]:
        """The parts of a point."""
        return (self.prompts,) if self.keys is None else (self.prompts, self.keys)

    def tempered(self, power: float) -> BetaBernoulliModel:
        """With the log densities of prompts and keys raised to a power."""
        prompts = dataclasses.replace(self.prompts, power=power * self.prompts.power)
        keys = self.keys and dataclasses.replace(self.keys, power=power * self.keys.power)
        return dataclasses.replace(self, prompts=prompts, keys=keys)

    # The score of a match is linear in z (Lemmas 3.2 and 3.3).

    def existing_scores(self, columns: Columns, rows: slice, live: Indices) -> Array:
        """C_t[k, i] of Eq. 27, with the summarizing prompt integrated out."""
        score = self.prompts.match_scores(columns, rows, live)  # Eq. 9
        if self.keys is not None:
            score += self.keys.match_scores(columns, rows, live)
        score += self.inclusion_score(columns, live)  # Eq. 10
        expected = columns.expected(rows)
        if expected is not None:
            score += self.log_faithful * (expected[:, None] == live)
        return score

    def inclusion_score(self, columns: Columns, live: Indices, others: int | None = None) -> Array:
        """(L,) logit of the inclusion probability of Eq. 10, given `others` (m - 1) clients."""
        users = columns.counts[live] + columns.strength[live]
        earlier = np.where(live < columns.num_remembered, columns.strength.max(initial=0.0), 0.0)
        placed = self.num_clients - 1 if others is None else others
        return self.inclusion.log_odds(users, earlier + placed)

    def new_scores(self, columns: Columns, rows: slice) -> Array:
        """(k, k) log N(omega_tk | mu0, noise + base) + log prior of one user - log j."""
        number = rows.stop - rows.start
        density = sum(block.new_scores(columns, rows) for block in self.blocks)
        return np.asarray(density + self.price() - np.log(np.arange(1, number + 1)))

    def price(self) -> float:
        """Log prior of a new column with one user."""
        return float(self.inclusion.log_born(np.ones(1), self.num_clients)[0])

    # What the search maximises.

    def objective(self, columns: Columns) -> float:
        """Log joint probability of all points, their columns and the fitted parameters.

        Sum over columns of the Gaussian evidence of their members and of the inclusion prior,
        divided by K_h! for every set of clients h that exactly shares K_h newborn columns.
        """
        live = columns.live()
        value = float(self._prior(columns, live).sum())
        for block in self.blocks:
            value += float(block.evidence(columns, live).sum()) + block.of_points(columns.points)
        _, repeats = np.unique(columns.signatures[columns.born()], return_counts=True)
        value -= float(gammaln(repeats + 1).sum())
        value += self.log_faithful * columns.faithful()
        return value + self._log_rest()

    def _log_rest(self) -> float:
        return self.inclusion.log_rest(self.num_clients)

    def merge_gains(self, columns: Columns, sources: Indices, targets: Indices) -> Array:
        """(S, T) gain of evidence and prior if a source column is poured into a target."""
        left = self._prior_of(columns, sources, np.zeros(len(sources)))
        left[sources >= columns.num_remembered] = 0.0  # a newborn column vanishes
        before = (left - self._singly(columns, sources))[:, None] - self._singly(columns, targets)
        # Pairs that share a client can have more members than there are clients; they are ruled
        # out later.
        users = columns.counts[sources][:, None] + columns.counts[targets]
        gains = before + self._prior_of(columns, targets, np.minimum(users, self.num_clients))
        for block in self.blocks:
            gains += block.joined(columns, sources, targets)
        return gains

    def _singly(self, columns: Columns, which: Indices) -> Array:
        result = self._prior(columns, which)
        for block in self.blocks:
            result = result + block.evidence(columns, which)
        return result

    def _prior(self, columns: Columns, which: Indices) -> Array:
        return self._prior_of(columns, which, columns.counts[which])

    def _prior_of(self, columns: Columns, which: Indices, users: Array) -> Array:
        """(..., L) log prior of columns with the given numbers of users."""
        old = which < columns.num_remembered
        before, most = columns.strength[which], float(columns.strength.max(initial=0.0))
        result = self.inclusion.log_born(np.where(old, 1.0, users), self.num_clients)
        if old.any():
            result[..., old] = self.inclusion.log_grown(
                users[..., old], self.num_clients, before[old], most
            )
        return result

    # What is fitted between sweeps.

    def fitted(self, columns: Columns) -> BetaBernoulliModel:
        """With the most likely inclusion prior and noise for these columns."""
        live = columns.live()
        old = live[live < columns.num_remembered]
        inclusion = fit_inclusion(
            columns.counts[columns.born()],
            self.num_clients,
            columns.counts[old],
            columns.strength[old],
            float(columns.strength.max(initial=0.0)),
            self.inclusion.gamma,
        )
        model = dataclasses.replace(self, inclusion=inclusion)
        if model.objective(columns) < self.objective(columns):
            model = self
        return dataclasses.replace(model, prompts=self.prompts.fitted(columns))


def fit_noise(block: Block, columns: Columns) -> Block:
    """The block with the most likely noise variance, or itself; noise plus base stay the same."""
    live, points = columns.live(), columns.points[:, block.part]
    scale = float(np.einsum("nd,nd->", points, points)) / points.size
    prior = block.prior_sum(columns, live)
    squares = _squares(prior + columns.sums[live, block.part])

    def with_noise(noise: float) -> Block:
        return dataclasses.replace(block, noise=noise, base=block.total - noise)

    def value(candidate: Block) -> float:
        precision = candidate.precision(columns, live)
        counts = columns.counts[live]
        evidence = candidate.evidence_of(precision, counts, squares, _squares(prior))
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
