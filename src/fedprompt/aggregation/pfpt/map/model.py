"""The generative model: Beta-Bernoulli inclusion, Gaussian prompts.

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
import functools

import numpy as np
from scipy.special import gammaln

from fedprompt.aggregation.arrays import Array, Indices
from fedprompt.aggregation.pfpt.map.blocks import Block, KeyBlock
from fedprompt.aggregation.pfpt.map.columns import Columns
from fedprompt.aggregation.pfpt.map.inclusion import Inclusion, fit_inclusion


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
        """(k, L) C_t[k, i] of Eq. 27, with the summarizing prompt integrated out.

        Args:
            columns: in which `rows` are not placed.
            rows: k rows of one client.
            live: (L,) columns.
        """
        score = self.prompts.match_scores(columns, rows, live)  # Eq. 9
        if self.keys is not None:
            score += self.keys.match_scores(columns, rows, live)
        score += self.inclusion_score(columns, live)  # Eq. 10
        expected = columns.expected(rows)
        if expected is not None:
            score += self.log_faithful * (expected[:, None] == live)
        return score

    def inclusion_score(self, columns: Columns, live: Indices, others: int | None = None) -> Array:
        """(L,) logit of the inclusion probability of Eq. 10.

        Args:
            columns: in which a client's points are not placed.
            live: (L,) columns.
            others: clients that are placed; m - 1 if None.
        """
        users = columns.counts[live] + columns.strength[live]
        earlier = np.where(live < columns.num_remembered, columns.strength.max(initial=0.0), 0.0)
        placed = self.num_clients - 1 if others is None else others
        return self.inclusion.log_odds(users, earlier + placed)

    def new_scores(self, columns: Columns, rows: slice) -> Array:
        """(k, k) log N(omega_tk | mu0, noise + base) + log prior of one user - log j."""
        number = rows.stop - rows.start
        density = sum(block.new_scores(columns, rows) for block in self.blocks)
        return np.asarray(density + self.price - np.log(np.arange(1, number + 1)))

    @functools.cached_property
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
        return value + self.inclusion.log_rest(self.num_clients)

    def merge_gains(self, columns: Columns, sources: Indices, targets: Indices) -> Array:
        """(S, T) gain of evidence and prior if a source column is poured into a target.

        Args:
            columns: in which all points are placed.
            sources: (S,) columns that are poured.
            targets: (T,) columns that receive.
        """
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
