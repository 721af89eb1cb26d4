"""The paper's networks inside the variant `map`: alpha(phi; gamma) and g(phi; w) instead of one
noise variance and one Beta prior for all summarizing prompts (Eq. 5-8).

The search first ends with fitted numbers. Then the networks are trained on what it found (Eq. 9
and 10), every column gets the variances and the inclusion probability that they give it, and the
sweeps go on; and again, as long as the objective rises. The networks see prompts in units of their
spread. A variance stays within a factor of 4 of the fitted noise: the likelihood of a column with
one member has no maximum (PFPT's Eq. 9 alone rewards a variance of 0).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import logit

from fedprompt.aggregation.arrays import Array, Indices
from fedprompt.aggregation.beta_bernoulli import (
    LOG_2PI,
    BetaBernoulliModel,
    Block,
)
from fedprompt.aggregation.matching import Columns, Search, ascend, continued, rises
from fedprompt.aggregation.nets import PromptNets

RANGE = 4.0
"""Largest factor between a variance that the network gives and the fitted noise."""
LEAST_PROBABILITY = 0.01
"""Inclusion probabilities stay this far from 0 and 1, so that no match is impossible."""
ALTERNATIONS = 3
"""Trainings of the networks in one call; the next round goes on from their weights."""


@dataclasses.dataclass(frozen=True)
class NeuralBlock(Block):
    """A block whose noise differs by column and coordinate."""

    squares: slice = dataclasses.field(default_factory=lambda: slice(0))
    """Coordinates of a point that hold the block's squared coordinates."""
    ratio: Array = dataclasses.field(default_factory=lambda: np.empty((0, 0)))
    """(size, D) variance of each column and coordinate over `noise`."""

    def _prior(self, columns: Columns, which: Indices) -> tuple[Array, Array, Array]:
        """(L, D) noise variance, and precision and precision times mean before the members."""
        variance = self.noise * self.ratio[which]
        precision = np.full_like(variance, 1 / self.base)
        weighted = np.zeros_like(variance)
        old = which < columns.num_remembered
        weight = self.strength[which[old], None] / variance[old]
        precision[old] += weight
        weighted[old] = weight * self.prior_mean[which[old]]
        return variance, precision, weighted

    def match_scores(self, columns: Columns, rows: slice, live: Indices) -> Array:
        """(k, L) Eq. 9 with a diagonal covariance."""
        variance, precision, weighted = self._prior(columns, live)
        precision = precision + columns.counts[live, None] / variance
        mean = (weighted + columns.sums[live, self.part] / variance) / precision
        spread = variance + 1 / precision
        points = columns.points[rows, self.part]
        squares = points**2 @ (1 / spread).T - 2 * points @ (mean / spread).T
        constant = (mean**2 / spread + np.log(spread) + LOG_2PI).sum(axis=1)
        result: Array = -0.5 * self.power * (squares + constant)
        return result

    def evidence(self, columns: Columns, which: Indices) -> Array:
        """(L,) log density of the members of each column."""
        return self._evidence_of(
            self._prior(columns, which),
            columns.counts[which, None],
            columns.sums[which, self.part],
            columns.sums[which, self.squares],
        )

    def _evidence_of(
        self, prior: tuple[Array, Array, Array], counts: Array, sums: Array, squares: Array
    ) -> Array:
        variance, before, weighted = prior
        after = before + counts / variance
        quadratic = (weighted + sums / variance) ** 2 / after - weighted**2 / before
        logarithms = np.log(before / after) - counts * (LOG_2PI + np.log(variance))
        result: Array = (0.5 * self.power) * (quadratic - squares / variance + logarithms).sum(
            axis=1
        )
        return result

    def joined(self, columns: Columns, sources: Indices, targets: Indices) -> Array:
        """(S, T) evidence of the target columns with a source column poured in."""
        result = np.empty((len(sources), len(targets)))
        for j, target in enumerate(targets):
            result[:, j] = self._evidence_of(
                self._prior(columns, targets[[j]]),
                columns.counts[sources, None] + columns.counts[target],
                columns.sums[sources, self.part] + columns.sums[target, self.part],
                columns.sums[sources, self.squares] + columns.sums[target, self.squares],
            )
        return result

    def fitted(self, columns: Columns) -> Block:
        """Itself: the networks are trained instead."""
        return self

    def of_points(self, points: Array) -> float:
        """Nothing: the variances depend on the columns."""
        return 0.0


@dataclasses.dataclass(frozen=True)
class NeuralModel(BetaBernoulliModel):
    """A model whose inclusion probabilities and variances come from networks."""

    probability: Array = dataclasses.field(default_factory=lambda: np.empty(0))
    """(size,) of each column."""
    usual: float = 0.5
    """Of a column that is still to be born."""
    expected: float = 1.0
    """Number of columns; their price is its logarithm."""

    def inclusion_score(self, columns: Columns, live: Indices, others: int | None = None) -> Array:
        """(L,) g(phi_i; w)."""
        result: Array = logit(self.probability[live])
        return result

    def price(self) -> float:
        """Log prior of a new column with one user."""
        unused = (self.num_clients - 1) * math.log1p(-self.usual)
        return math.log(self.expected) + math.log(self.usual) + unused

    def _prior_of(self, columns: Columns, which: Indices, users: Array) -> Array:
        """(..., L) both halves of Eq. 10, and the price of newborn columns."""
        share = self.probability[which]
        born = math.log(self.expected) * (which >= columns.num_remembered)
        result: Array = born + users * np.log(share) + (self.num_clients - users) * np.log1p(-share)
        return result

    def _log_rest(self) -> float:
        return -self.expected

    def fitted(self, columns: Columns) -> NeuralModel:
        """Itself: the networks are trained instead."""
        return self


def refine(found: Search, nets: PromptNets, steps: int, lr: float, max_sweeps: int) -> Search:
    """Go on from the end of a search with networks, which are trained in place.

    Args:
        found: end of a search with fitted numbers.
        nets: the networks, d the dimension of prompts.
        steps: Adam's steps per training.
        lr: Adam's learning rate.
        max_sweeps: bound on the sweeps after each training.

    Returns:
        The end of the last sweeps that raised the objective; its history begins with the networks.
    """
    base = found.model
    assert isinstance(base, BetaBernoulliModel)
    columns = _with_squares(found.columns, base.prompts.part)
    best: Search | None = None
    for _ in range(ALTERNATIONS):
        before = {name: value.clone() for name, value in nets.state_dict().items()}
        train(nets, columns, base, steps, lr)
        model = neural_model(nets, columns, base)
        if best is not None and not rises(best.objective, model.objective(columns)):
            nets.load_state_dict(before)
            break
        spans = _spans(columns.owner)
        end = ascend(columns.copy(), spans, model, max_sweeps)
        best = end if best is None else continued(best, end)
        columns = best.columns
    assert best is not None
    return dataclasses.replace(
        best, sweeps=best.sweeps + found.sweeps, joins=best.joins + found.joins
    )


def neural_model(nets: PromptNets, columns: Columns, base: BetaBernoulliModel) -> NeuralModel:
    """Every live column's variances and inclusion probability, as the networks see them now."""
    live, size, block = columns.live(), len(columns.counts), base.prompts
    means = torch.from_numpy(block.posterior(columns, live)[0])
    with torch.no_grad():
        alpha, g = nets.alpha(means), nets.inclusion_logit(means)
    ratio = np.ones((size, means.shape[1]))
    ratio[live] = (RANGE ** (2 * alpha - 1)).numpy()
    number = max(len(columns.born()), 1)
    users = float(columns.counts[live].mean())
    usual = float(np.clip(users / base.num_clients, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY))
    probability = np.full(size, usual)
    probability[live] = g.sigmoid().clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY).numpy()
    width = block.part.stop - block.part.start
    squares = slice(columns.points.shape[1] - width, columns.points.shape[1])
    fields = {f.name: getattr(block, f.name) for f in dataclasses.fields(Block)}
    shared = {f.name: getattr(base, f.name) for f in dataclasses.fields(BetaBernoulliModel)}
    shared["prompts"] = NeuralBlock(**fields, squares=squares, ratio=ratio)
    return NeuralModel(**shared, probability=probability, usual=usual, expected=float(number))


def train(
    nets: PromptNets, columns: Columns, base: BetaBernoulliModel, steps: int, lr: float
) -> None:
    """Gradient steps on Eq. 9 and 10 for the columns as they are, in place."""
    used, block = np.flatnonzero(columns.counts), base.prompts
    means = torch.from_numpy(block.posterior(columns, used)[0])
    position = np.zeros(len(columns.counts), dtype=np.int64)
    position[used] = np.arange(len(used))
    column = torch.from_numpy(position[columns.assignment])
    deviation = torch.from_numpy(columns.points[:, block.part]) - means[column]
    squares = torch.zeros_like(means).index_add_(0, column, deviation**2)
    counts = torch.from_numpy(columns.counts[used])
    optimizer = torch.optim.Adam(nets.parameters(), lr=lr)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            log_variance = math.log(block.noise) + math.log(RANGE) * (2 * nets.alpha(means) - 1)
            gaussian = 0.5 * (counts[:, None] * log_variance + squares * (-log_variance).exp())
            g = nets.inclusion_logit(means)
            unused = base.num_clients - counts
            bernoulli = -(counts * F.logsigmoid(g) + unused * F.logsigmoid(-g))
            loss = (gaussian.mean(dim=1) + bernoulli).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def _with_squares(columns: Columns, part: slice) -> Columns:
    """The same columns of points with the squares of their first block appended."""
    points = np.concatenate([columns.points, columns.points[:, part] ** 2], axis=1)
    size = columns.num_remembered
    strength = columns.strength[:size]
    result = Columns(points, columns.owner, strength, columns.classes, columns.home)
    for rows in _spans(columns.owner):
        result.place(rows, columns.assignment[rows])
    return result


def _spans(owner: Indices) -> list[slice]:
    """Rows of each client that has some."""
    _, begins = np.unique(owner, return_index=True)
    ends = [*begins[1:], len(owner)]
    return [slice(int(begin), int(end)) for begin, end in zip(begins, ends, strict=True)]
