"""What earlier rounds left: the posterior of each summarizing prompt, discounted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedprompt.aggregation.arrays import Array, Indices
from fedprompt.aggregation.cohort import Cohort
from fedprompt.aggregation.inputs import check_state
from fedprompt.aggregation.pfpt.options import PfptOptions

RATE_BEFORE = (5 / 3, 5.0)
"""Discount rate before anything was seen: as if 5 clients had shown 1/3, so that a prompt that many
clients used counts for at most three a round later."""
RATE_DECAY = 0.9
"""Weight of the earlier rounds' evidence about the discount rate, from round to round."""
RATE_RANGE = (0.02, 10.0)
"""A prompt counts for at most 50 clients and, were it lost at once, still for a tenth of one."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """What earlier rounds left of the n broadcast prompts. Written and read by `map` alone.

    A summarizing prompt moves from round to round as a random walk: phi' ~ N(phi, rate * noise I).
    Its posterior after c users, of precision s + c in clients, is worth s' = 1 / (1 / (s + c) +
    rate) clients a round later (the local-level model of Kalman filters). The rate is inferred: a
    row's users have a mean at squared distance noise * (1 / c + 1 / s) from the row, on average.
    """

    strength: Array
    """(n,) s of each prompt; 0 if nothing is remembered of it."""
    key_strength: Array
    """(n,) s of each key."""
    idle: Indices
    """(n,) rounds since it was last used."""
    rate: Array
    """(2,) weighted sum of the rates seen, and the weight."""
    key_rate: Array
    """(2,) the same for keys."""
    keys: Array
    """(M, q) some keys of earlier rounds, for the noise of keys."""

    def state(self) -> dict[str, Tensor]:
        """As tensors, each in storage of its own."""
        return {
            field.name if field.name != "keys" else "known_keys": torch.tensor(
                getattr(self, field.name)
            )
            for field in dataclasses.fields(self)
        }


def recall(cohort: Cohort, state: Mapping[str, Tensor], options: PfptOptions) -> Memory:
    """What is remembered of every broadcast row; zeros if nothing is.

    Args:
        cohort: the inputs, with n broadcast rows.
        state: see `Memory.state`; empty in the first round.
        options: `memory` is used.

    Raises:
        InputError: the state has other shapes.
    """
    number = 0 if cohort.previous is None else len(cohort.previous)
    q = 0 if cohort.keys is None else cohort.keys.shape[1]
    unknown = np.empty((0, q))
    if not state:
        nothing, rate = np.zeros(number), np.array(RATE_BEFORE)
        return Memory(nothing, nothing, np.zeros(number, dtype=np.int64), rate, rate, unknown)
    shapes = {"strength": (number,), "key_strength": (number,), "idle": (number,)}
    check_state(state, {**shapes, "rate": (2,), "key_rate": (2,)})
    names = (*shapes, "rate", "key_rate", "known_keys")
    values = {
        name: np.array(state[name].detach().cpu().numpy(), dtype=np.float64)
        for name in names
        if name in state
    }
    strengths = [np.minimum(values[name], options.memory) for name in ("strength", "key_strength")]
    if cohort.keys is not None and cohort.previous_keys is None:
        strengths = [np.zeros(number)] * 2  # without their keys they cannot take part
    known = values.get("known_keys", unknown)
    return Memory(
        strengths[0],
        strengths[1],
        values["idle"].astype(np.int64),
        values["rate"],
        values["key_rate"],
        known if known.ndim == 2 else unknown,
    )


def discount_rate(seen: Array) -> float:
    """The rate that a weighted sum and its weight stand for.

    >>> round(discount_rate(np.array(RATE_BEFORE)), 3)
    0.333
    """
    return float(np.clip(seen[0] / seen[1], *RATE_RANGE))


def discounted(strength: Array, users: Array, rate: float) -> Array:
    """s' = 1 / (1 / (s + c) + rate): clients that each prompt counts for in the next round.

    Args:
        strength: (n,) s before the round.
        users: (n,) c clients of the round.
        rate: of the random walk between rounds.

    >>> discounted(np.array([0.0]), np.array([6.0]), 1 / 3)
    array([2.])
    """
    now = strength + users
    result: Array = now / (1 + rate * now)
    return result


def seen_rate(
    seen: Array,
    values: Array,
    noise: float,
    previous: Array | None,
    labels: Indices,
    strength: Array,
) -> Array:
    """Add what this round's matched prompts say about the discount rate.

    Args:
        seen: (2,) sum and weight before.
        values: (N, D) of all local prompts.
        noise: standard deviation of a coordinate, in the units of the values.
        previous: (n, D) remembered.
        labels: (N,) row of each local prompt; newborn ones are n and above.
        strength: (n,) of the remembered rows.
    """
    users = np.bincount(labels, minlength=len(strength))[: len(strength)]
    used = np.flatnonzero((users > 0) & (strength > 0))
    if previous is None or len(used) == 0:
        return seen
    means = averages(values, labels, np.ones(len(values)), None, np.zeros(int(labels.max()) + 1))
    moved = (((means[used] - previous[used]) / noise) ** 2).mean(axis=1)
    posterior = 1 / strength[used] - discount_rate(seen)
    rates = moved - 1 / users[used] - posterior
    counts = users[used]
    return np.array(
        [RATE_DECAY * seen[0] + float(counts @ rates), RATE_DECAY * seen[1] + float(counts.sum())]
    )


def averages(
    values: Array, labels: Indices, shares: Array, previous: Array | None, strength: Array
) -> Array:
    """(R, d) mean of members and `strength` copies of the previous row; that row if no members.

    Args:
        values: (N, d)
        labels: (N,) row of each value.
        shares: (N,) weight of each value.
        previous: (n, d) rows before, n <= R.
        strength: (R,)
    """
    prior = np.zeros((len(strength), values.shape[1]))
    if previous is not None:
        prior[: len(previous)] = previous
    total = strength[:, None] * prior
    np.add.at(total, labels, shares[:, None] * values)
    members = np.bincount(labels, weights=shares, minlength=len(strength))
    mass = np.where(members > 0, members + strength, 1.0)
    result: Array = np.where(members[:, None] > 0, total / mass[:, None], prior)
    return result
