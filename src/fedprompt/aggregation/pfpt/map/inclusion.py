"""The Beta-Bernoulli part of the model: how often summarizing prompts are used (Eq. 5 and 6)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import cast

import numpy as np
from scipy.special import betaln, digamma, expit

from fedprompt.aggregation.arrays import Array


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
        """Log prior of more users of remembered columns.

        Args:
            users: (L,) of this round.
            clients: m
            before: (L,) users among earlier clients.
            most: earlier clients.
        """
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
    a, b, log_beta = _grid()
    values, times = np.unique(born, return_counts=True)
    expected = len(born) + gamma  # the most likely one
    unused = np.exp(betaln(a, clients + b) - log_beta)
    log_price = np.log(expected / (1 - unused)) - log_beta
    # All 108 at once: the formulas broadcast.
    grid = Inclusion(cast(float, a), cast(float, b), log_price, gamma)
    value = (times * grid.log_born(values, clients)).sum(axis=1)
    value += grid.log_grown(users, clients, before, most).sum(axis=1)
    value += np.asarray(_log_hyper(a + b))[:, 0]
    best = int(np.argmax(value))
    return Inclusion(float(a[best, 0]), float(b[best, 0]), float(log_price[best, 0]), gamma)


@functools.cache
def _grid() -> tuple[Array, Array, Array]:
    """(108, 1) a, b and log B(a, b) of the priors that are compared."""
    mean = expit(np.linspace(-4, 4.5, 18))
    mean, size = (axis.reshape(-1, 1) for axis in np.meshgrid(mean, 2.0 ** np.arange(6)))
    a, b = mean * size, (1 - mean) * size
    return a, b, betaln(a, b)


def _log_hyper(size: float | Array) -> float | Array:
    """Log prior of a + b: within a factor of about seven of 4, which few data can overrule."""
    return -0.125 * np.log(np.asarray(size) / 4) ** 2
