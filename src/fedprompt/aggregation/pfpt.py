"""PFPT: probabilistic matching of prompt sets.

Weng et al., "Probabilistic Federated Prompt-Tuning with Non-IID and Imbalanced Data", NeurIPS
2024, arXiv 2502.19752; the file follows its Section 3. Two parts are not the paper's. The base
measure that a Beta-Bernoulli process has is put back, because without a price for a new
summarizing prompt nothing merges (Yurochkin et al., ICML 2019 and NeurIPS 2019 have it). And
prompts may carry keys, which are matched together with them.

| paper    | code                  | shape        | meaning                                      |
|----------|-----------------------|--------------|----------------------------------------------|
| phi_i    | `Aggregation.prompts` | (n, d)       | summarizing prompts; n changes every round   |
| omega_tk | `cohort.prompts`      | (N, d)       | local prompts of all clients, stacked        |
| z_tk^i   | `columns.assignment`  | (N,)         | summarizing prompt of each local prompt      |
| alpha    | `Scales.noise`        | scalar       | variance of local around summarizing prompts |
| sigma(g) | `inclusion_score`     | (L,)         | log odds that a client uses a column         |
| m        | `num_clients`         | scalar       | clients of the round and those of the memory |
| -        | `Scales.mu0`, `.base` | (d,), scalar | base measure phi ~ N(mu0, base I)            |
| -        | `strength`            | (n,)         | clients that a remembered prompt counts for  |
| -        | `key_scales`          | -            | the same for keys kappa_i, tau^2             |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln
from torch import Tensor

from fedprompt.aggregation.base import (
    Aggregation,
    Array,
    Cohort,
    Indices,
    aggregators,
    check_inputs,
    check_state,
    lexicographic,
)
from fedprompt.aggregation.matching import (
    Columns,
    Search,
    peer_distance,
    search,
)
from fedprompt.errors import ConfigError, InputError

Scalar = TypeVar("Scalar", bound=np.generic)

LOG_2PI = math.log(2 * math.pi)
NOISE_FLOOR = 1e-8
"""Smallest noise variance in units of the total variance: identical prompts stay finite."""
NOISE_UPDATES = 3
"""How often noise that was read off peer distances is raised to the scatter within columns."""
KEY_NOISE_DECAY = 0.8
"""Share of earlier rounds in the running estimate of the key noise."""
KEY_NOISE_FLOOR = 0.02
"""Smallest key noise in units of the keys' mean square: neighbours in angle are one address."""


@dataclasses.dataclass(frozen=True)
class PfptOptions:
    """Options of `pfpt`; docs/aggregation.md says how the defaults were found."""

    gamma: float = 1.0
    """Mass of the Beta process: log(gamma / m) is the prior price of a new summarizing prompt."""
    noise_scale: float = 1.0
    """Factor on the noise's standard deviation, which is read off the data; above 1 merges more."""
    key_weight: float = 8.0
    """How much keys count relative to prompts, both in noise units; 0 ignores keys."""
    key_tolerance: float = 6.0
    """Key noise over half the squared distance to the nearest peer; more makes fewer groups."""
    memory: float = 3.0
    """The most clients that a remembered summarizing prompt counts for; 0 forgets everything."""
    memory_decay: float = 0.9
    """Factor on the remembered strength from round to round."""
    average_memory: bool = True
    """Whether the remembered prompt enters the new average; the remembered key always does."""
    shrink: bool = False
    """Whether the average is shrunk towards the base mean, as the posterior mean is."""
    use_weights: bool = False
    """Whether a client enters the average in proportion to its sample count."""
    patience: int = 10
    """Rounds without use after which a prompt is removed; 1 is the paper's immediate removal."""
    max_prompts: int = 0
    """Upper bound on the number of summarizing prompts; 0 for none."""
    max_sweeps: int = 50
    """Bound on the sweeps over clients; a few suffice."""

    def __post_init__(self) -> None:
        for name in ("gamma", "noise_scale", "key_tolerance"):
            self._require(
                name,
                "a finite number > 0",
                _is_number(getattr(self, name)) and getattr(self, name) > 0,
            )
        for name in ("key_weight", "memory"):
            self._require(
                name,
                "a finite number >= 0",
                _is_number(getattr(self, name)) and getattr(self, name) >= 0,
            )
        decay = self.memory_decay
        self._require("memory_decay", "a number from 0 to 1", _is_number(decay) and 0 <= decay <= 1)
        for name in ("average_memory", "shrink", "use_weights"):
            self._require(name, "true or false", isinstance(getattr(self, name), bool))
        for name, least in (("patience", 1), ("max_prompts", 0), ("max_sweeps", 1)):
            value = getattr(self, name)
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
            self._require(name, f"an integer >= {least}", fits)

    def _require(self, name: str, expected: str, fits: bool) -> None:
        if not fits:
            raise ConfigError(
                f"aggregator.{name}: expected {expected}, got {getattr(self, name)!r}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# The generative model (Eq. 4-8). Everything below is in noise units: points are centred at the
# base mean and divided by the standard deviation of the noise, so that local ~ N(summarizing, I)
# and summarizing ~ N(0, spread I).


@dataclasses.dataclass(frozen=True)
class Block:
    """One part of a point (the prompt, or its key) with the Gaussian model of its own.

    The log density of a block is multiplied by `power`: 1 for prompts, `key_weight * d / q` for
    keys. A key's coordinate then counts `key_weight` times as much as a prompt's whatever d, q
    and the units of either are.
    """

    part: slice
    """Coordinates of the block within a point."""
    spread: float
    """Base variance over noise variance."""
    power: float
    prior_mean: Array
    """(n, D) mean of each remembered column."""

    def posterior(self, columns: Columns, which: Indices) -> tuple[Array, Array]:
        """Mean (L, D) and variance (L,) of each column's summarizing vector, given its members."""
        precision = self.prior_precision(columns, which) + columns.counts[which]
        total = self.prior_sum(columns, which) + columns.sums[which, self.part]
        return total / precision[:, None], 1 / precision

    def prior_precision(self, columns: Columns, which: Indices) -> Array:
        """(L,) base measure plus memory."""
        precision: Array = 1 / self.spread + columns.strength[which]
        return precision

    def prior_sum(self, columns: Columns, which: Indices) -> Array:
        """(L, D) what memory adds to the sum of the members; zero for newborn columns."""
        result = np.zeros((len(which), self.part.stop - self.part.start))
        old = which < columns.num_remembered
        result[old] = columns.strength[which[old], None] * self.prior_mean[which[old]]
        return result


def log_normal(points: Array, means: Array, variances: Array) -> Array:
    """(k, L) log N(point | mean, variance I); (k, D) points, (L, D) means, (L,) variances.

    >>> log_normal(np.zeros((1, 2)), np.zeros((1, 2)), np.ones(1)).round(4)
    array([[-1.8379]])
    """
    squares = (points**2).sum(axis=1)[:, None] + (means**2).sum(axis=1) - 2 * points @ means.T
    dimension = points.shape[1]
    result: Array = -0.5 * (
        dimension * (LOG_2PI + np.log(variances)) + np.maximum(squares, 0) / variances
    )
    return result


@dataclasses.dataclass(frozen=True)
class BetaBernoulliModel:
    """Beta-Bernoulli process with Gaussian base and noise; a `MatchingModel`."""

    blocks: tuple[Block, ...]
    gamma: float
    num_clients: float
    """Clients of the round plus the most that memory can count for."""

    # The score of a match is linear in z (Lemmas 3.2 and 3.3).

    def existing_scores(self, columns: Columns, rows: slice, live: Indices) -> Array:
        """C_t[k, i] of Eq. 27, with the summarizing prompt integrated out."""
        score = np.tile(self.inclusion_score(columns, live), (rows.stop - rows.start, 1))  # Eq. 10
        for block in self.blocks:  # Eq. 9: log N(omega_tk | phi_i, alpha + s_i)
            mean, variance = block.posterior(columns, live)
            score += block.power * log_normal(columns.points[rows, block.part], mean, 1 + variance)
        return score

    def inclusion_score(self, columns: Columns, live: Indices) -> Array:
        """(L,) logit of the inclusion probability of Eq. 10, here log n_i / (m - n_i)."""
        users = columns.counts[live] + columns.strength[live]
        result: Array = np.log(users / np.maximum(self.num_clients - users, 1.0))
        return result

    def new_scores(self, columns: Columns, rows: slice) -> Array:
        """(k, k) log N(omega_tk | mu0, alpha + base) + log(gamma / m) - log j, j-th new column."""
        number = rows.stop - rows.start
        order = np.arange(1, number + 1)
        score = np.tile(math.log(self.gamma / self.num_clients) - np.log(order), (number, 1))
        for block in self.blocks:
            points = columns.points[rows, block.part]
            mean = np.zeros((1, points.shape[1]))
            score += block.power * log_normal(points, mean, np.array([1 + block.spread]))
        return score

    # What the sweeps of Algorithm 2 maximise.

    def objective(self, columns: Columns) -> float:
        """Log joint probability of prompts and assignment, up to a constant.

        Sum over columns of the Gaussian evidence of their members and of the Indian-buffet prior
        gamma (c - 1)! (m - c)! / m! (Griffiths and Ghahramani, JMLR 2011), divided by
        K_h! for every set of clients h that exactly shares K_h newborn columns.
        """
        live = columns.live()
        value = float((self._prior(columns, live) + self._evidence(columns, live)).sum())
        for block in self.blocks:
            placed = columns.points[columns.assignment >= 0, block.part]
            value -= 0.5 * block.power * float((placed**2).sum() + placed.size * LOG_2PI)
        shared = columns.membership(columns.born())
        if shared.size:
            _, repeats = np.unique(np.packbits(shared, axis=0), axis=1, return_counts=True)
            value -= float(gammaln(repeats + 1).sum())
        return value

    def merge_gains(self, columns: Columns, live: Indices) -> Array:
        """(L, L) gain of evidence and prior if column i, newborn, is poured into column j."""
        single = self._prior(columns, live) + self._evidence(columns, live)
        gains: Array = -single[:, None] - single[None, :]
        users = columns.counts[live][:, None] + columns.counts[live][None, :]
        # Pairs of columns that share a client can have more members than there are clients; they
        # are ruled out later.
        users = np.minimum(users, self.num_clients - columns.strength[live])
        gains += self._prior_of(users, columns.strength[live])
        for block in self.blocks:
            precision = block.prior_precision(columns, live)
            prior = block.prior_sum(columns, live)
            total = prior + columns.sums[live, block.part]
            own = columns.sums[live, block.part]
            squares = (total**2).sum(axis=1) + (own**2).sum(axis=1)[:, None] + 2 * own @ total.T
            gains += block.power * self._evidence_of(block, precision, users, squares, prior)
        return gains

    def _prior(self, columns: Columns, live: Indices) -> Array:
        return self._prior_of(columns.counts[live], columns.strength[live])

    def _prior_of(self, users: Array, strength: Array) -> Array:
        """Log prior of columns; 0 for remembered columns without users."""

        def term(number: Array) -> Array:
            total = gammaln(number) + gammaln(self.num_clients - number + 1)
            return np.asarray(total - gammaln(self.num_clients + 1))

        old = strength > 0
        baseline = np.where(old, term(np.where(old, strength, 1.0)), -math.log(self.gamma))
        result: Array = term(users + strength) - baseline
        return result

    def _evidence(self, columns: Columns, live: Indices) -> Array:
        """(L,) log evidence of each column's members, up to what no assignment changes."""
        result = np.zeros(len(live))
        for block in self.blocks:
            prior = block.prior_sum(columns, live)
            squares = ((prior + columns.sums[live, block.part]) ** 2).sum(axis=1)
            precision = block.prior_precision(columns, live)
            result += block.power * self._evidence_of(
                block, precision, columns.counts[live], squares, prior
            )
        return result

    @staticmethod
    def _evidence_of(
        block: Block, precision: Array, counts: Array, squares: Array, prior: Array
    ) -> Array:
        """D/2 log(p / (p + c)) + |b + S|^2 / 2(p + c) - |b|^2 / 2p; p, b: prior precision, sum."""
        dimension = block.part.stop - block.part.start
        result: Array = 0.5 * (
            dimension * np.log(precision / (precision + counts))
            + squares / (precision + counts)
            - (prior**2).sum(axis=1) / precision
        )
        return result


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the previous round left of the n broadcast prompts. Written and read by `Pfpt` alone."""

    strength: Array
    """(n,) how many clients each counts for; 0 if nothing is remembered of it."""
    idle: Indices
    """(n,) rounds since it was last used."""
    key_noise: float = 0.0
    """Noise variance of keys in earlier rounds; 0 if unknown."""


# Scales from data: multiplying or shifting all prompts changes nothing.


@dataclasses.dataclass(frozen=True)
class Scales:
    """Base measure N(mu0, base I) and noise variance of one block, in the units of the data."""

    mu0: Array
    noise: float
    base: float
    from_drift: bool = False
    """Whether the noise is the clients' own drift, and not a distance between clients."""

    def rescaled(self, factor: float) -> Scales:
        """With the noise multiplied, the total variance as it was."""
        noise = self.noise * factor
        return dataclasses.replace(
            self, noise=noise, base=max(self.noise + self.base - noise, noise)
        )

    def standardise(self, values: Array) -> Array:
        """In noise units."""
        result: Array = (values - self.mu0) / math.sqrt(self.noise)
        return result


def prompt_scales(cohort: Cohort, strength: Array, noise_scale: float) -> Scales:
    """Noise: squared drift from the broadcast row, else half the squared distance to a peer.

    Both are medians over prompts, per coordinate. The base variance is what the noise leaves of
    the total variance, but never less than the noise.
    """
    points, owner = cohort.prompts, cohort.owner
    if cohort.previous is not None:
        remembered = cohort.previous[strength > 0]
        points = np.concatenate([points, remembered])
        owner = np.concatenate([owner, np.full(len(remembered), cohort.num_clients)])
    mu0 = points.mean(axis=0)
    total = float(((points - mu0) ** 2).mean())
    noise = 0.0
    if cohort.previous is not None and cohort.origins is not None:
        drift = ((cohort.prompts - cohort.previous[cohort.origins]) ** 2).mean(axis=1)
        noise = float(np.median(drift)) or float(drift.mean())
    if noise == 0.0:
        distance = peer_distance(points - mu0, owner)
        noise = total if distance is None else distance / (2 * points.shape[1])
        return _bounded(mu0, noise * noise_scale**2, total, NOISE_FLOOR * total)
    scales = _bounded(mu0, noise * noise_scale**2, total, NOISE_FLOOR * total)
    return dataclasses.replace(scales, from_drift=True)


def key_scales(cohort: Cohort, memory: Memory, options: PfptOptions) -> Scales | None:
    """The same for keys; None if they say nothing: all equal, absent, or of weight 0.

    The noise is `key_tolerance` times half the squared distance to the nearest peer, averaged
    with that of earlier rounds. The drift from a remembered key would be no measure of it: every
    split of a column lowers the drift, hence the noise, and so causes the next split.
    """
    if options.key_weight == 0:
        return None
    if cohort.keys is None:
        return None
    points = cohort.keys
    if cohort.previous_keys is not None:
        points = np.concatenate([points, cohort.previous_keys[memory.strength > 0]])
    mu0 = points.mean(axis=0)
    total = float(((points - mu0) ** 2).mean())
    mean_square = float((points**2).mean())
    if total <= NOISE_FLOOR * mean_square:
        return None
    distance = peer_distance(cohort.keys - mu0, cohort.owner)
    noise = memory.key_noise or total
    if distance is not None:
        noise = options.key_tolerance * distance / (2 * points.shape[1])
        if memory.key_noise:
            noise = KEY_NOISE_DECAY * memory.key_noise + (1 - KEY_NOISE_DECAY) * noise
    return _bounded(mu0, noise, total, KEY_NOISE_FLOOR * mean_square)


def _bounded(mu0: Array, noise: float, total: float, floor: float) -> Scales:
    noise = max(noise, floor) or 1.0  # all prompts equal: any unit serves
    return Scales(mu0, noise, base=max(total - noise, noise))


# Algorithm 1: one aggregation.


@aggregators.register("pfpt", PfptOptions)
class Pfpt:
    """Probabilistic matching of prompt sets. See `Aggregator.aggregate`.

    State: `strength` (n,) float64, `idle` (n,) int64, `key_noise` (1,) float64, `prompts` (n, d)
    and, with keys, `keys` (n, q). `previous` and `previous_keys` default to the latter two.
    """

    def __init__(self, options: PfptOptions) -> None:
        self.options = options

    def aggregate(
        self,
        prompt_sets: Sequence[Tensor],
        weights: Tensor | None = None,
        origins: Sequence[Tensor] | None = None,
        previous: Tensor | None = None,
        keys: Sequence[Tensor] | None = None,
        state: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        previous_keys: Tensor | None = None,
    ) -> Aggregation:
        """Match local and remembered prompts; average what belongs together."""
        if state and previous is None:
            previous = state.get("prompts")
        if state and previous_keys is None and previous is not None:
            remembered = state.get("keys")
            if remembered is not None and len(remembered) == len(previous):
                previous_keys = remembered
        cohort = check_inputs(prompt_sets, weights, origins, previous, keys, previous_keys)
        self._check_bound(cohort)
        memory = self._recall(cohort, state or {})
        if len(cohort.prompts) == 0:
            return _nothing_returned(cohort, memory)
        scales = prompt_scales(cohort, memory.strength, self.options.noise_scale)
        key_scale = key_scales(cohort, memory, self.options)
        model, found = self._search(cohort, memory, scales, key_scale)
        for _ in range(NOISE_UPDATES):  # the nearest peer is nearer than a typical one
            scatter = found.columns.scatter(model.blocks[0].part)
            if scales.from_drift or scatter <= 1.01:
                break
            scales = scales.rescaled(scatter)
            model, found = self._search(cohort, memory, scales, key_scale)
        self._dissolve(found.columns, model)
        labels = _label(found.columns, cohort, memory.strength)
        key_noise = memory.key_noise if key_scale is None else key_scale.noise
        return self._summarize(cohort, memory, scales, key_noise, found, labels)

    def _search(
        self, cohort: Cohort, memory: Memory, scales: Scales, key_scale: Scales | None
    ) -> tuple[BetaBernoulliModel, Search]:
        """Algorithm 2, in noise units."""
        number, d = len(memory.strength), cohort.prompts.shape[1]
        points = [scales.standardise(cohort.prompts)]
        blocks = [_block(slice(0, d), scales, 1.0, cohort.previous, number)]
        if cohort.keys is not None and key_scale is not None:
            q = cohort.keys.shape[1]
            points.append(key_scale.standardise(cohort.keys))
            power = self.options.key_weight * d / q
            blocks.append(_block(slice(d, d + q), key_scale, power, cohort.previous_keys, number))
        num_clients = cohort.num_clients + self.options.memory
        model = BetaBernoulliModel(tuple(blocks), self.options.gamma, num_clients)
        found = search(
            np.concatenate(points, axis=1),
            cohort.owner,
            [span for span in cohort.spans() if span.stop > span.start],
            memory.strength,
            model,
            _origin_starts(cohort, memory.strength),
            self.options.max_sweeps,
        )
        return model, found

    def _check_bound(self, cohort: Cohort) -> None:
        largest = max(span.stop - span.start for span in cohort.spans())
        if 0 < self.options.max_prompts < largest:
            raise InputError(
                f"aggregator.max_prompts: expected at least {largest}, the prompts of one client, "
                f"got {self.options.max_prompts}; raise it or let clients return fewer prompts"
            )

    def _recall(self, cohort: Cohort, state: Mapping[str, Tensor]) -> Memory:
        """Strength and idle rounds of every broadcast row; zeros if nothing is remembered."""
        number = 0 if cohort.previous is None else len(cohort.previous)
        if not state:
            return Memory(np.zeros(number), np.zeros(number, dtype=np.int64))
        check_state(state, {"strength": (number,), "idle": (number,), "key_noise": (1,)})
        strength = np.array(state["strength"].detach().cpu().numpy(), dtype=np.float64)
        if cohort.keys is not None and cohort.previous_keys is None:
            strength[:] = 0.0  # without their keys the remembered prompts cannot take part
        idle = np.array(state["idle"].detach().cpu().numpy(), dtype=np.int64)
        key_noise = float(state["key_noise"].item())
        return Memory(np.minimum(strength, self.options.memory), idle, key_noise)

    def _dissolve(self, columns: Columns, model: BetaBernoulliModel) -> None:
        """Empty the column with least evidence until `max_prompts` are in use.

        Each member moves to the best column that its client does not use yet; there is one,
        because no client has more than `max_prompts` prompts.
        """
        bound = self.options.max_prompts
        while bound and np.count_nonzero(columns.counts) > bound:
            used = np.flatnonzero(columns.counts)
            evidence = (columns.counts + columns.strength)[used]
            weakest = used[len(used) - 1 - int(np.argmin(evidence[::-1]))]  # of equals the youngest
            others = used[used != weakest]
            for row in np.flatnonzero(columns.assignment == weakest):
                one = slice(int(row), int(row) + 1)
                columns.remove(one)
                scores = model.existing_scores(columns, one, others)[0]
                scores[columns.membership(others)[columns.owner[row]]] = -np.inf
                columns.place(one, others[[int(np.argmax(scores))]])

    def _summarize(
        self,
        cohort: Cohort,
        memory: Memory,
        scales: Scales,
        key_noise: float,
        found: Search,
        labels: Indices,
    ) -> Aggregation:
        """The new prompts and keys in their final order, and what is remembered of them."""
        number = len(memory.strength)
        users = np.bincount(labels, minlength=number).astype(np.float64)
        strength = _extended(memory.strength, len(users))
        idle = np.where(users > 0, 0, _extended(memory.idle, len(users)) + 1)
        prompts = self._average_prompts(cohort, strength, labels, scales)
        keys = None
        if cohort.keys is not None:
            shares = self._shares(cohort)
            keys = _average(cohort.keys, labels, shares, cohort.previous_keys, strength)
        rows = self._surviving_rows(cohort, users, idle, prompts, keys)  # Algorithm 1, line 8
        position = np.full(len(users), -1, dtype=np.int64)
        position[rows] = np.arange(len(rows))
        remembered = np.minimum((strength + users) * self.options.memory_decay, self.options.memory)
        kept = int((rows < number).sum())
        return _result(
            cohort,
            prompts[rows],
            None if keys is None else keys[rows],
            position[labels],
            Memory(remembered[rows], idle[rows], key_noise),
            {
                "kept": kept,
                "born": len(rows) - kept,
                "pruned": number - kept,
                "matched_distance": _matched_distance(
                    cohort, labels, users + strength, prompts, scales
                ),
                "objective_before": found.objective_before,
                "objective_after": found.objective_after,
                "sweeps": found.sweeps,
            },
        )

    def _shares(self, cohort: Cohort) -> Array:
        """(N,) weight of each local prompt in an average, 1 on average over clients."""
        if not self.options.use_weights:
            return np.ones(len(cohort.owner))
        shares: Array = (cohort.weights / cohort.weights.mean())[cohort.owner]
        return shares

    def _average_prompts(
        self, cohort: Cohort, strength: Array, labels: Indices, scales: Scales
    ) -> Array:
        """Posterior mean of every summarizing prompt; with `shrink` the base measure counts too."""
        if not self.options.average_memory:
            strength = np.zeros_like(strength)
        shares = self._shares(cohort)
        means = _average(cohort.prompts, labels, shares, cohort.previous, strength)
        if self.options.shrink:
            mass = np.bincount(labels, weights=shares, minlength=len(means)) + strength
            keep = (mass / (mass + scales.noise / scales.base))[:, None]
            used = np.bincount(labels, minlength=len(means)) > 0
            means[used] = (keep * means + (1 - keep) * scales.mu0)[used]
        return means

    def _surviving_rows(
        self, cohort: Cohort, users: Array, idle: Indices, prompts: Array, keys: Array | None
    ) -> Indices:
        """Old rows in their order without those idle too long, then newborn ones by content."""
        number = 0 if cohort.previous is None else len(cohort.previous)
        old, unused = np.arange(len(users)) < number, users == 0
        gone = unused & (idle >= self.options.patience)
        if keys is not None and cohort.previous_keys is None:
            gone |= unused  # nobody knows their address, so nobody could select them
        surplus = int((~gone).sum()) - self.options.max_prompts
        if self.options.max_prompts and surplus > 0:
            spare = np.flatnonzero(unused & ~gone)
            gone[spare[np.argsort(-idle[spare], kind="stable")][:surplus]] = True
        born = np.flatnonzero(~old)
        content = prompts if keys is None else np.concatenate([prompts, keys], axis=1)
        return np.concatenate([np.flatnonzero(old & ~gone), born[lexicographic(content[born])]])


def _block(part: slice, scales: Scales, power: float, previous: Array | None, number: int) -> Block:
    mean = np.zeros((number, part.stop - part.start))
    if previous is not None:
        mean = scales.standardise(previous)
    return Block(part, scales.base / scales.noise, power, mean)


def _origin_starts(cohort: Cohort, strength: Array) -> list[Indices]:
    """The assignment that trusts origins: prompts that started from one row stay together."""
    if cohort.origins is None:
        return []
    rows, group = np.unique(cohort.origins, return_inverse=True)
    remembered = strength[rows] > 0 if len(strength) else rows < 0
    target = np.where(remembered, rows, len(strength) + np.arange(len(rows)))
    start: Indices = target[group]
    for span in cohort.spans():
        distinct = np.unique(start[span])
        if len(distinct) < span.stop - span.start:
            return []  # a client tuned two prompts from one row: origins are no matching
    return [start]


def _label(columns: Columns, cohort: Cohort, strength: Array) -> Indices:
    """(N,) label of each local prompt: its broadcast row, or n, n + 1, ... for the newborn.

    A broadcast row without strength cannot be matched (nothing is remembered of it, as in the
    first round). It is continued by the newborn column in which most prompts started from it;
    without origins, by the nearest column.
    """
    born = columns.born()
    label_of = np.full(len(columns.counts), -1, dtype=np.int64)
    label_of[: columns.num_remembered] = np.arange(columns.num_remembered)
    empty = np.flatnonzero(strength == 0)
    if len(born) and len(empty) and cohort.previous is not None:
        affinity = np.stack(
            [_affinity(cohort, columns.assignment == column, empty) for column in born]
        )
        linked = _best_pairs(affinity)
        label_of[born[linked[:, 0]]] = empty[linked[:, 1]]
    newborn = born[label_of[born] < 0]
    label_of[newborn] = columns.num_remembered + np.arange(len(newborn))
    result: Indices = label_of[columns.assignment]
    return result


def _affinity(cohort: Cohort, members: NDArray[np.bool_], rows: Indices) -> Array:
    """(rows,) how well broadcast rows are continued by a set of local prompts; 0 if not at all."""
    previous = cast(Array, cohort.previous)
    if cohort.origins is not None:
        counts = np.bincount(cohort.origins[members], minlength=len(previous))
        return counts[rows].astype(np.float64)
    distance = ((previous[rows] - cohort.prompts[members].mean(axis=0)) ** 2).mean(axis=1)
    scale = float(np.var(cohort.prompts, axis=0).mean() + distance.min()) or 1.0
    nearness: Array = 1 / (1 + distance / scale)
    return nearness


def _best_pairs(affinity: Array) -> Indices:
    """(P, 2) pairs of the one-to-one assignment with the greatest total; none of affinity 0."""
    rows, picked = linear_sum_assignment(affinity, maximize=True)
    pairs = np.stack([rows, picked], axis=1)
    result: Indices = pairs[affinity[rows, picked] > 0]
    return result


def _average(
    values: Array, labels: Indices, shares: Array, previous: Array | None, strength: Array
) -> Array:
    """(R, d) mean of members and `strength` copies of the previous row; that row if no members."""
    prior = np.zeros((len(strength), values.shape[1]))
    if previous is not None:
        prior[: len(previous)] = previous
    total = strength[:, None] * prior
    np.add.at(total, labels, shares[:, None] * values)
    members = np.bincount(labels, weights=shares, minlength=len(strength))
    mass = np.where(members > 0, members + strength, 1.0)
    result: Array = np.where(members[:, None] > 0, total / mass[:, None], prior)
    return result


def _matched_distance(
    cohort: Cohort, labels: Indices, evidence: Array, prompts: Array, scales: Scales
) -> float:
    """Root mean square deviation of matched prompts from their summarizing prompt, in noise."""
    matched = evidence[labels] > 1
    if not matched.any():
        return 0.0
    residual = cohort.prompts[matched] - prompts[labels[matched]]
    return math.sqrt(float((residual**2).mean()) / scales.noise)


def _extended(values: NDArray[Scalar], length: int) -> NDArray[Scalar]:
    """Padded with zeros."""
    return np.concatenate([values, np.zeros(length - len(values), dtype=values.dtype)])


def _nothing_returned(cohort: Cohort, memory: Memory) -> Aggregation:
    """Every client returned an empty set: nothing changes."""
    if cohort.previous is None:
        raise InputError(
            "prompt_sets: expected at least one prompt from some client, got only empty sets; "
            "pass previous, so that there is something to keep"
        )
    figures = dict.fromkeys(
        ("born", "pruned", "matched_distance", "objective_before", "objective_after", "sweeps"), 0.0
    )
    return _result(
        cohort,
        cohort.previous,
        cohort.previous_keys,
        np.empty(0, dtype=np.int64),
        memory,
        {"kept": len(cohort.previous), **figures},
    )


def _result(
    cohort: Cohort,
    prompts: Array,
    keys: Array | None,
    assignment: Indices,
    memory: Memory,
    figures: Mapping[str, float],
) -> Aggregation:
    """As tensors, each in storage of its own."""
    state = {
        "strength": torch.tensor(memory.strength),
        "idle": torch.tensor(memory.idle),
        "key_noise": torch.tensor([memory.key_noise], dtype=torch.float64),
        "prompts": torch.tensor(prompts, dtype=cohort.dtype),
    }
    if keys is not None:
        state["keys"] = torch.tensor(keys, dtype=cohort.key_dtype)
    return Aggregation(
        prompts=torch.tensor(prompts, dtype=cohort.dtype),
        keys=None if keys is None else torch.tensor(keys, dtype=cohort.key_dtype),
        assignment=cohort.restore(assignment),
        state=state,
        diagnostics={
            "num_prompts": float(len(prompts)),
            **{name: float(value) for name, value in figures.items()},
        },
    )
