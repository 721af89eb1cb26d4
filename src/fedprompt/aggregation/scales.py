"""Scales read off the data: multiplying or shifting all prompts, or all keys, changes nothing."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fedprompt.aggregation.base import Array, Cohort, Indices
from fedprompt.aggregation.beta_bernoulli import NOISE_FLOOR
from fedprompt.aggregation.key_noise import infer_key_noise, settled_keys, unbiased_dimension
from fedprompt.aggregation.matching import peer_distance

KEY_NOISE_FLOOR = 0.02
"""Smallest key noise in units of the keys' mean square: neighbours in angle are one address."""
MOST_NOISE = 0.9
"""Largest first guess of the noise in units of the total variance."""
CLIENTS_COMPARED = 64
"""Clients whose prompts are compared for a first guess of the noise; bounds the distance table."""


@dataclasses.dataclass(frozen=True)
class Scales:
    """Unit of one block, and its model's variances in squared units."""

    mu0: Array
    """Mean of the base measure, in the units of the data."""
    unit: float
    """Standard deviation of a coordinate, in the units of the data."""
    noise: tuple[float, ...]
    """Guesses of the noise variance in squared units; the search starts from each."""
    base: float | None = None
    """Base variance; None if noise and base are to be fitted and sum to 1."""
    power: float = 1.0
    """Factor on the block's log density."""

    def standardise(self, values: Array) -> Array:
        """Centred and in units."""
        result: Array = (values - self.mu0) / self.unit
        return result


def standard_units(values: Array) -> tuple[Array, float]:
    """Mean (d,) and standard deviation over all coordinates of (N, d) values; 0 if all are equal.

    >>> standard_units(np.array([[1.0, 5.0], [3.0, 5.0]]))[0]
    array([2., 5.])
    >>> round(standard_units(np.array([[0.0, 0.0], [2e200, 2e200]]))[1] / 1e200, 6)
    1.0
    """
    centre = values.mean(axis=0)
    residual = values - centre
    largest = float(np.abs(residual).max())
    if largest == 0:
        return centre, 0.0
    residual /= largest
    return centre, largest * math.sqrt(
        float(np.einsum("nd,nd->", residual, residual)) / values.size
    )


def prompt_scales(cohort: Cohort, strength: Array) -> Scales:
    """Unit of the prompts and first guesses of their noise, which the search improves.

    Two guesses, both medians over prompts and per coordinate: the squared drift from the broadcast
    row that a prompt started from, if that is given, and half the squared distance to a peer.

    Drifts of neural training lie in few directions. Their log density is then raised to the power
    e / d, with e their effective dimension, lest d terms count the same thing many times.

    Args:
        cohort: the inputs.
        strength: (n,) of the broadcast rows; those with some belong to the prompts' spread.
    """
    points = cohort.prompts
    if cohort.previous is not None:
        points = np.concatenate([points, cohort.previous[strength > 0]])
    mu0, unit = standard_units(points)
    if unit == 0:
        return Scales(mu0, 1.0, (0.5,))  # all prompts are equal: any unit serves
    guesses, power = [], 1.0
    if cohort.previous is not None and cohort.origins is not None:
        drift = (cohort.prompts - cohort.previous[cohort.origins]) / unit
        squares = np.einsum("nd,nd->n", drift, drift) / drift.shape[1]
        noise = float(np.median(squares)) or float(squares.mean())
        if noise > 0:
            guesses.append(noise)
            power = _drift_dimension(drift, cohort.origins) / drift.shape[1]
    clients = np.unique(cohort.owner)
    some = clients[
        np.linspace(0, len(clients) - 1, min(len(clients), CLIENTS_COMPARED)).astype(int)
    ]
    compared = np.isin(cohort.owner, some)
    distance = peer_distance((cohort.prompts[compared] - mu0) / unit, cohort.owner[compared])
    if distance is not None:
        guesses.append(distance / (2 * points.shape[1]))
    bounded = (min(max(guess, NOISE_FLOOR), MOST_NOISE) for guess in guesses or [0.5])
    return Scales(mu0, unit, tuple(bounded), power=power)


def _drift_dimension(drift: Array, origins: Indices) -> float:
    """Effective dimension of (N, d) drifts around the mean drift from each broadcast row."""
    rows, group = np.unique(origins, return_inverse=True)
    sums = np.zeros((len(rows), drift.shape[1]))
    np.add.at(sums, group, drift)
    residual = drift - (sums / np.bincount(group)[:, None])[group]
    freedom = len(drift) - len(rows)
    if freedom < 2 or not residual.any():
        return float(drift.shape[1])
    return min(unbiased_dimension(residual, freedom), float(drift.shape[1]))


@dataclasses.dataclass(frozen=True)
class KeyScales:
    """Groups among the keys, and the keys as they take part in the matching."""

    noise: float
    """tau, standard deviation of a coordinate within groups, in the units of the data."""
    power: float
    """Factor on the log density."""
    observed: Array
    """(N, q) for each local prompt, in units of the noise."""
    remembered: Array
    """(n, q) for each broadcast prompt, likewise."""
    labels: Indices
    """(N,) group of each local prompt's key."""
    centres: Array
    """(K, q) of the groups, likewise."""
    memory: Array
    """(M, q) what the next round needs to infer the groups again."""


def key_scales(cohort: Cohort, weight: float, power: float, memory: Array) -> KeyScales | None:
    """Groups of clients by their keys, and the spread within them (`infer_key_noise`).

    None if keys say nothing: absent, all zero, or of weight 0. A key takes part as the centre of
    its group, so that spread within a group neither tells prompts apart nor opens columns. The log
    density is multiplied by `weight` d / q times the prompts' power: a key's coordinate counts
    `weight` times a prompt's, whatever d, q and the units of both are.

    Args:
        cohort: the inputs.
        weight: option `key_weight`.
        power: of the prompts' log density.
        memory: (M, q) keys of earlier rounds.
    """
    if cohort.keys is None or weight == 0 or not cohort.keys.any():
        return None
    largest = float(np.abs(cohort.keys).max())
    found = infer_key_noise(cohort.keys, cohort.owner, memory)
    mean_square = float(((cohort.keys / largest) ** 2).mean()) * largest**2
    noise = math.sqrt(max(found.variance, KEY_NOISE_FLOOR * mean_square))
    d, q = cohort.prompts.shape[1], cohort.keys.shape[1]
    previous = np.empty((0, q)) if cohort.previous_keys is None else cohort.previous_keys
    centre = found.centres.mean(axis=0)
    return KeyScales(
        noise=noise,
        power=weight * power * d / q,
        observed=((found.centres - centre) / noise)[found.labels],
        remembered=(settled_keys(found, previous) - centre) / noise,
        labels=found.labels,
        centres=(found.centres - centre) / noise,
        memory=found.memory,
    )
