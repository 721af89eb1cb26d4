"""Scales read off the data: multiplying or shifting all prompts, or all keys, changes nothing."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fedprompt.aggregation.arrays import Array, Indices, standard_units
from fedprompt.aggregation.cohort import Cohort
from fedprompt.aggregation.pfpt.map.blocks import NOISE_FLOOR
from fedprompt.aggregation.pfpt.map.columns import Columns
from fedprompt.aggregation.pfpt.map.key_noise import infer_key_noise, settled_keys
from fedprompt.aggregation.pfpt.map.memory import Memory
from fedprompt.aggregation.pfpt.map.partitions import unbiased_dimension
from fedprompt.aggregation.pfpt.options import PfptOptions

KEY_NOISE_FLOOR = 0.02
"""Smallest key noise variance in units of that between groups; if there is one group of equal
keys, in units of their mean square."""
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
    """Guesses of the noise variance in squared units; the search starts from each. Noise and base
    variance sum to 1."""

    def standardise(self, values: Array) -> Array:
        """Centred and in units."""
        result: Array = (values - self.mu0) / self.unit
        return result


def prompt_scales(cohort: Cohort, strength: Array) -> Scales:
    """Unit of the prompts and first guesses of their noise, which the search improves.

    Two guesses, both medians over prompts and per coordinate: the squared drift from the broadcast
    row that a prompt started from, if that is given, and half the squared distance to a peer.

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
    guesses = []
    if cohort.previous is not None and cohort.origins is not None:
        drift = (cohort.prompts - cohort.previous[cohort.origins]) / unit
        squares = np.einsum("nd,nd->n", drift, drift) / drift.shape[1]
        noise = float(np.median(squares)) or float(squares.mean())
        if noise > 0:
            guesses.append(noise)
    clients = np.unique(cohort.owner)
    some = clients[
        np.linspace(0, len(clients) - 1, min(len(clients), CLIENTS_COMPARED)).astype(int)
    ]
    compared = np.isin(cohort.owner, some)
    distance = peer_distance((cohort.prompts[compared] - mu0) / unit, cohort.owner[compared])
    if distance is not None:
        guesses.append(distance / (2 * points.shape[1]))
    bounded = (min(max(guess, NOISE_FLOOR), MOST_NOISE) for guess in guesses or [0.5])
    return Scales(mu0, unit, tuple(bounded))


def peer_distance(points: Array, owner: Indices) -> float | None:
    """Typical squared distance between a point and its counterpart at another client.

    For each point, the nearest point of every other client; of those the k-th smallest with k =
    ceil(m / 20), because the smallest of very many is too small; then the median over points.
    None if there is only one client.

    Args:
        points: (N, D)
        owner: (N,) ascending.
    """
    clients, firsts = np.unique(owner, return_index=True)
    if len(clients) < 2:
        return None
    squares = (points**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * points @ points.T, 0.0)
    nearest = np.minimum.reduceat(distances, firsts, axis=1)
    nearest[owner[:, None] == clients[None, :]] = np.inf
    rank = min(-(-len(clients) // 20), len(clients) - 1)
    return float(np.median(np.sort(nearest, axis=1)[:, rank - 1]))


def drift_power(columns: Columns, part: slice) -> float:
    """e / d, with e the effective dimension of the points around their columns' means.

    Drifts of neural training lie in few directions. Their log density is raised to this power, lest
    d terms count the same thing many times. 1 if there is too little to tell.
    """
    points = columns.points[:, part]
    used, column = np.unique(columns.assignment, return_inverse=True)
    means = columns.sums[used, part] / columns.counts[used, None]
    residuals, freedom = points - means[column], len(points) - len(used)
    d = points.shape[1]
    if freedom < 2 or not residuals.any():
        return 1.0
    return unbiased_dimension(residuals, freedom, most=d) / d


@dataclasses.dataclass(frozen=True)
class KeyScales:
    """Groups among the keys, and the keys as they take part in the matching."""

    noise: float
    """tau, standard deviation of a coordinate within groups, in the units of `keys`."""
    keys: Array
    """(N, q) of each local prompt as keys are compared: as given, or placed by a metric."""
    previous: Array | None
    """(n, q) of each broadcast prompt, likewise."""
    weight: float
    """Factor on the log density, times that of prompts."""
    observed: Array
    """(N, q) for each local prompt, in units of the noise."""
    remembered: Array
    """(n, q) for each broadcast prompt, likewise."""
    labels: Indices
    """(N,) group of each local prompt's key."""
    centres: Array
    """(K, q) of the groups, likewise."""
    memory: Array
    """(M, q) what the next round needs to infer the groups again, latest first."""
    memory_labels: Indices
    """(M,) group of each."""


def key_scales(cohort: Cohort, weight: float, memory: Array) -> KeyScales | None:
    """Groups of clients by their keys, and the spread within them (`infer_key_noise`).

    None if keys say nothing: absent, all zero, or of weight 0. A key takes part as the centre of
    its group, so that spread within a group neither tells prompts apart nor opens columns. The log
    density is multiplied by `weight` d / q: a key's coordinate counts `weight` times a prompt's,
    whatever d, q and the units of both are.

    Args:
        cohort: the inputs.
        weight: option `key_weight`.
        memory: (M, q) keys of earlier rounds.
    """
    if cohort.keys is None or weight == 0 or not cohort.keys.any():
        return None
    unit = float(np.abs(cohort.keys).max())
    known = None if cohort.metric is None else cohort.metric * unit
    others = None if cohort.others is None else cohort.others / unit
    found = infer_key_noise(cohort.keys / unit, cohort.owner, memory / unit, known, others)
    keys = found.placed(cohort.keys / unit)
    least = KEY_NOISE_FLOOR * (found.between or float((keys**2).mean()))
    noise = math.sqrt(max(found.variance, least))
    d, q = cohort.prompts.shape[1], keys.shape[1]
    previous: Array = np.empty((0, q))
    if cohort.previous_keys is not None:
        previous = found.placed(cohort.previous_keys / unit)
    centre = found.centres.mean(axis=0)
    as_given = found.placement is None
    return KeyScales(
        noise=noise * unit if as_given else noise,
        keys=cohort.keys if as_given else keys,
        previous=cohort.previous_keys if as_given or cohort.previous_keys is None else previous,
        weight=weight * d / q,
        observed=((found.centres - centre) / noise)[found.labels],
        remembered=(settled_keys(found, previous) - centre) / noise,
        labels=found.labels,
        centres=(found.centres - centre) / noise,
        memory=found.memory * unit,
        memory_labels=found.memory_labels,
    )


@dataclasses.dataclass(frozen=True)
class AllScales:
    """Scales of both blocks; no keys take part if theirs is None."""

    prompts: Scales
    keys: KeyScales | None


def all_scales(cohort: Cohort, memory: Memory, options: PfptOptions) -> AllScales:
    """Read off the data.

    Args:
        cohort: the inputs.
        memory: what was remembered of the n broadcast rows, and some keys (M, q).
        options: `key_weight` is used.
    """
    prompts = prompt_scales(cohort, memory.strength)
    known = memory.keys
    if cohort.keys is not None and known.shape[1] != cohort.keys.shape[1]:
        known = np.empty((0, cohort.keys.shape[1]))
    return AllScales(prompts, key_scales(cohort, options.key_weight, known))
