"""PFPT: probabilistic matching of prompt sets.

Weng et al., "Probabilistic Federated Prompt-Tuning with Non-IID and Imbalanced Data", NeurIPS
2024, arXiv 2502.19752; the file follows its Section 3: the generative model (3.1), the matching
(3.2), the algorithm (3.3).

| paper    | code                  | shape        | meaning                                      |
|----------|-----------------------|--------------|----------------------------------------------|
| phi_i    | `Aggregation.prompts` | (n, d)       | summarizing prompts; n changes every round   |
| omega_tk | `cohort.prompts`      | (N, d)       | local prompts of all clients, stacked        |
| z_tk^i   | `columns.assignment`  | (N,)         | summarizing prompt of each local prompt      |
| alpha    | `Block.noise`         | scalar       | variance of local around summarizing prompts |
| sigma(g) | `Inclusion`           | (L,)         | probability that a client uses a column      |
| m        | `num_clients`         | scalar       | clients of the round                         |
| -        | `Block.base`          | scalar       | base measure phi ~ N(mu0, base I)            |
| -        | `Block.strength`      | (n,)         | clients that a remembered prompt counts for  |
| kappa_i  | `Aggregation.keys`    | (n, q)       | keys, a second block with variance tau^2     |

Three variants. `map`, in this file, is well posed: it puts back the base measure that a
Beta-Bernoulli process has, because without a price for a new summarizing prompt nothing merges
(Yurochkin et al., ICML 2019 and NeurIPS 2019 have it), and it matches prompts together with their
keys and with what earlier rounds left. `paper` and `released`, in `literal.py`, are the paper's
equations and the authors' program taken at their word. docs/pfpt.md compares the three.
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
from scipy.special import entr
from torch import Tensor

from fedprompt.aggregation import literal
from fedprompt.aggregation.arrays import Array, Indices, lexicographic
from fedprompt.aggregation.base import Aggregation, Aggregator, aggregators
from fedprompt.aggregation.beta_bernoulli import BetaBernoulliModel, Block, Inclusion, KeyBlock
from fedprompt.aggregation.cohort import Cohort, previous_of
from fedprompt.aggregation.inputs import AggregationInput, check_state
from fedprompt.aggregation.matching import Columns, Search, join_gains, pour, search
from fedprompt.aggregation.nets import PromptNets, state_shapes
from fedprompt.aggregation.neural import refine
from fedprompt.aggregation.scales import (
    KeyScales,
    Scales,
    drift_power,
    key_scales,
    prompt_scales,
)
from fedprompt.core.checks import check_choice, check_flag, check_integer, check_number
from fedprompt.core.errors import InputError

Scalar = TypeVar("Scalar", bound=np.generic)

VARIANTS = ("map", "paper", "released")
PARAMETERISATIONS = ("empirical", "neural")


@dataclasses.dataclass(frozen=True)
class PfptOptions:
    """Options of `pfpt`; docs/pfpt.md says how the defaults were found."""

    variant: str = "map"
    """`map`: the well-posed model; `paper`, `released`: for comparison. Only `loops`, `net_lr`,
    `net_hidden` and (`paper`) `variance_floor` concern the latter two."""
    parameterisation: str = "empirical"
    """`map`'s noise and inclusion: `empirical`, fitted numbers, or `neural`, the paper's nets."""
    gamma: float = 1.0
    """Mass of the Beta process: log(gamma / m) is the first price of a new summarizing prompt."""
    key_weight: float = 8.0
    """How much keys count relative to prompts, both in noise units; 0 ignores keys."""
    memory: float = 10.0
    """The most clients that a remembered summarizing prompt counts for; 0 forgets everything."""
    average_memory: bool = True
    """Whether the remembered prompt enters the new average; the remembered key always does."""
    origin_odds: float = 100.0
    """Prior odds that a prompt belongs with most of those that started from the same broadcast row
    at clients of the same key group; 1 if origins tell nothing."""
    shrink: bool = False
    """Whether the average is shrunk towards the base mean, as the posterior mean is."""
    use_weights: bool = False
    """Whether a client enters the average in proportion to its sample count."""
    patience: int = 10
    """Rounds without use after which a prompt is removed; 1 is the paper's immediate removal."""
    max_prompts: int = 0
    """Upper bound on the number of summarizing prompts, kept by merging the closest; 0 for none."""
    max_sweeps: int = 50
    """Bound on the sweeps over clients; a few suffice."""
    restarts: int = 8
    """Annealings of the search where the matching is in doubt."""
    variance_floor: float = 1e-6
    """Least variance of `paper` in units of the prompts' total variance."""
    loops: int = 50
    """Alternations of matching and gradient steps of `paper` and `released`."""
    net_lr: float = 1e-3
    """Adam's learning rate for the networks."""
    net_hidden: int = 128
    """Width of the networks' hidden layer."""

    def __post_init__(self) -> None:
        check_choice("aggregator.variant", self.variant, VARIANTS)
        check_choice("aggregator.parameterisation", self.parameterisation, PARAMETERISATIONS)
        for name in ("gamma", "origin_odds"):
            check_number(f"aggregator.{name}", getattr(self, name), 0, above=True)
        for name in ("key_weight", "memory"):
            check_number(f"aggregator.{name}", getattr(self, name), 0)
        for name in ("average_memory", "shrink", "use_weights"):
            check_flag(f"aggregator.{name}", getattr(self, name))
        least = {"patience": 1, "max_prompts": 0, "max_sweeps": 1, "restarts": 0}
        for name, bound in least.items():
            check_integer(f"aggregator.{name}", getattr(self, name), bound)
        _ = self.literal  # checks the others

    @property
    def literal(self) -> literal.LiteralOptions:
        """The options of `paper` and `released`."""
        return literal.LiteralOptions(self.loops, self.net_lr, self.net_hidden, self.variance_floor)


@aggregators.register("pfpt", PfptOptions)
class Pfpt(Aggregator):
    """Probabilistic matching of prompt sets. See `Aggregator.merge`.

    State of `map`: see `Memory`, and `prompts` (n, d) and, with keys, `keys` (n, q), which stand in
    for `previous` and `previous_keys`. State of the other variants: their networks.
    """

    def __init__(self, options: PfptOptions) -> None:
        self.options = options

    def merge(self, given: AggregationInput) -> Aggregation:
        """Match local and remembered prompts; average what belongs together."""
        given = _completed(given)
        options = self.options
        if options.variant == "paper":
            return literal.aggregate_paper(given, options.literal)
        if options.variant == "released":
            return literal.aggregate_released(given, options.literal)
        cohort = Cohort.of(given)
        _check_bound(cohort, options)
        memory = recall(cohort, given.state, options)
        if len(cohort.prompts) == 0:
            return _nothing_returned(cohort, memory, given.state)
        scales = all_scales(cohort, memory, options)
        models = generative_models(cohort, memory, scales, options)  # Section 3.1
        found = match(cohort, memory, scales, models, options)  # Section 3.2, Algorithm 2
        with literal.gradients():
            nets = _networks(cohort, given, options)
            if nets is not None:  # alpha(phi; gamma) and g(phi; w)
                found = refine(found, nets, options.loops, options.net_lr, options.max_sweeps)
        found = merge_closest(found, options)
        labels = _label(found.columns, cohort, memory.strength)
        result = summarize(cohort, memory, scales, found, labels, options)  # Algorithm 1
        if nets is not None:
            result.state.update(nets.to_state())
        return result


def _networks(cohort: Cohort, given: AggregationInput, options: PfptOptions) -> PromptNets | None:
    """The networks of `parameterisation=neural`, as the last round left them or new."""
    if options.parameterisation == "empirical":
        return None
    d = cohort.prompts.shape[1]
    if "variance_net.0.weight" in given.state:
        check_state(given.state, state_shapes(d, options.net_hidden))
        return PromptNets.from_state(given.state, dtype=torch.float64)
    generator = given.generator or torch.Generator().manual_seed(0)
    return PromptNets(d, options.net_hidden, generator, torch.float64)


def _completed(given: AggregationInput) -> AggregationInput:
    """With the broadcast prompts and keys of the state where none are passed."""
    previous, previous_keys = given.previous, given.previous_keys
    if previous is None:
        previous = given.state.get("prompts")
    if previous_keys is None and previous is not None:
        remembered = given.state.get("keys")
        if remembered is not None and len(remembered) == len(previous):
            previous_keys = remembered
    if previous is given.previous and previous_keys is given.previous_keys:
        return given
    return dataclasses.replace(given, previous=previous, previous_keys=previous_keys)


def _check_bound(cohort: Cohort, options: PfptOptions) -> None:
    largest = max(span.stop - span.start for span in cohort.spans())
    if 0 < options.max_prompts < largest:
        raise InputError(
            f"aggregator.max_prompts: expected at least {largest}, the prompts of one client, "
            f"got {options.max_prompts}; raise it or let clients return fewer prompts"
        )


# What earlier rounds left: the posterior of each summarizing prompt, discounted.

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
    """What is remembered of every broadcast row; zeros if nothing is."""
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
    means = _average(values, labels, np.ones(len(values)), None, np.zeros(int(labels.max()) + 1))
    moved = (((means[used] - previous[used]) / noise) ** 2).mean(axis=1)
    posterior = 1 / strength[used] - discount_rate(seen)
    rates = moved - 1 / users[used] - posterior
    counts = users[used]
    return np.array(
        [RATE_DECAY * seen[0] + float(counts @ rates), RATE_DECAY * seen[1] + float(counts.sum())]
    )


# Section 3.1: the generative model, in units of each block's own spread.


@dataclasses.dataclass(frozen=True)
class AllScales:
    """Scales of both blocks; no keys take part if theirs is None."""

    prompts: Scales
    keys: KeyScales | None


def all_scales(cohort: Cohort, memory: Memory, options: PfptOptions) -> AllScales:
    """Read off the data."""
    prompts = prompt_scales(cohort, memory.strength)
    known = memory.keys
    if cohort.keys is not None and known.shape[1] != cohort.keys.shape[1]:
        known = np.empty((0, cohort.keys.shape[1]))
    return AllScales(prompts, key_scales(cohort, options.key_weight, known))


def generative_models(
    cohort: Cohort, memory: Memory, scales: AllScales, options: PfptOptions
) -> list[BetaBernoulliModel]:
    """Prompts and keys as two Gaussian blocks, and the inclusion of summarizing prompts.

    One model for each first guess of the prompts' noise; they differ in nothing else.
    """
    d = cohort.prompts.shape[1]
    keys = None
    if scales.keys is not None:
        k, part = scales.keys, slice(d, d + scales.keys.observed.shape[1])
        keys = KeyBlock(part, k.weight, k.centres, k.remembered)
    nothing = np.empty((0, d))
    known = nothing if cohort.previous is None else scales.prompts.standardise(cohort.previous)
    blocks = (
        Block(slice(0, d), noise, 1 - noise, 1.0, known, memory.strength, total=1.0)
        for noise in scales.prompts.noise
    )
    inclusion, log_odds = Inclusion.indian_buffet(options.gamma), math.log(options.origin_odds)
    return [
        BetaBernoulliModel(block, keys, inclusion, cohort.num_clients, log_odds) for block in blocks
    ]


# Section 3.2: matching.


def match(
    cohort: Cohort,
    memory: Memory,
    scales: AllScales,
    models: Sequence[BetaBernoulliModel],
    options: PfptOptions,
) -> Search:
    """Algorithm 2: Hungarian sweeps over the clients until nothing changes.

    Drifts from known origins are those of neural training, which lie in few directions. A first
    search shows in how many, and the log densities of the second are tempered by that.
    """
    points = scales.prompts.standardise(cohort.prompts)
    if scales.keys is not None:
        points = np.concatenate([points, scales.keys.observed], axis=1)
    classes, home = _classes(cohort, memory.strength, scales.keys)
    columns = Columns(points, cohort.owner, memory.strength, classes, home)
    spans = [span for span in cohort.spans() if span.stop > span.start]
    starts = _origin_starts(cohort, memory.strength)
    if cohort.origins is not None:
        first = search(columns, spans, models, starts, options.max_sweeps, restarts=0)
        power = drift_power(first.columns, models[0].prompts.part)
        models = [model.tempered(power) for model in models]
    return search(columns, spans, models, starts, options.max_sweeps, options.restarts)


def _classes(
    cohort: Cohort, strength: Array, keys: KeyScales | None
) -> tuple[Indices | None, Indices | None]:
    """Prompts that started from one row at clients of one key group, and that row if remembered."""
    if cohort.origins is None:
        return None, None
    group = np.zeros_like(cohort.origins) if keys is None else keys.labels
    pairs, classes = np.unique(
        np.stack([cohort.origins, group], axis=1), axis=0, return_inverse=True
    )
    rows = pairs[:, 0]
    remembered = strength[rows] > 0 if len(strength) else rows < 0
    return classes.reshape(-1), np.where(remembered, rows, -1)


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


def merge_closest(found: Search, options: PfptOptions) -> Search:
    """Pour the column into another that costs least until `max_prompts` are in use.

    Where no two columns can become one, because each two share a client, the column with fewest
    users is dissolved: each member moves to the best column that its client does not use yet.
    """
    columns, model, merged = found.columns, found.model, 0
    bound = options.max_prompts
    while bound and np.count_nonzero(columns.counts) > bound:
        used = np.flatnonzero(columns.counts)
        gains = join_gains(columns, model, used, used)
        source, target = np.unravel_index(int(np.argmax(gains)), gains.shape)
        if gains[source, target] > -np.inf:
            pour(columns, np.flatnonzero(columns.assignment == used[source]), used[target])
        else:
            users = (columns.counts + columns.strength)[used]
            _dissolve(columns, model, used, len(used) - 1 - int(np.argmin(users[::-1])))
        merged += 1
    return dataclasses.replace(found, joins=found.joins + merged)


def _dissolve(columns: Columns, model: Any, used: Indices, weakest: int) -> None:
    """There is room: no client has more than `max_prompts` prompts."""
    others = np.delete(used, weakest)
    for row in np.flatnonzero(columns.assignment == used[weakest]):
        one = slice(int(row), int(row) + 1)
        columns.remove(one)
        scores = model.existing_scores(columns, one, others)[0]
        scores[columns.membership(others)[columns.owner[row]]] = -np.inf
        columns.place(one, others[[int(np.argmax(scores))]])


# Section 3.3, Algorithm 1: the summarizing prompts are posterior means; unused ones are removed.


def summarize(
    cohort: Cohort,
    memory: Memory,
    scales: AllScales,
    found: Search,
    labels: Indices,
    options: PfptOptions,
) -> Aggregation:
    """The new prompts and keys in their final order, and what is remembered of them.

    Args:
        cohort: the inputs.
        memory: what was remembered of the n broadcast rows.
        scales: units of the model.
        found: where the search ended.
        labels: (N,) broadcast row of each local prompt, or n and above for the newborn.
        options: see `PfptOptions`.
    """
    number = len(memory.strength)
    users = np.bincount(labels, minlength=number).astype(np.float64)
    strength = _extended(memory.strength, len(users))
    key_strength = _extended(memory.key_strength, len(users))
    idle = _extended(memory.idle, len(users))
    idle = np.where(users > 0, 0, idle + 1)
    model = cast(BetaBernoulliModel, found.model)
    noise = math.sqrt(model.prompts.noise) * scales.prompts.unit
    prompts = _average_prompts(cohort, strength, labels, scales, model, options)
    rate = seen_rate(memory.rate, cohort.prompts, noise, cohort.previous, labels, memory.strength)
    keys, key_rate, known = None, memory.key_rate, memory.keys
    if cohort.keys is not None:
        shares = _shares(cohort, options)
        keys = _average(cohort.keys, labels, shares, cohort.previous_keys, key_strength)
        if scales.keys is not None:
            key_rate = seen_rate(
                memory.key_rate,
                cohort.keys,
                scales.keys.noise,
                cohort.previous_keys,
                labels,
                memory.key_strength,
            )
            known = _latest(scales.keys, math.ceil(1 / discount_rate(key_rate)))
    rows = _surviving_rows(cohort, users, idle, prompts, keys, options)  # Algorithm 1, line 8
    position = np.full(len(users), -1, dtype=np.int64)
    position[rows] = np.arange(len(rows))
    worth = strength if options.average_memory else np.where(users > 0, 0.0, strength)
    left = Memory(
        np.minimum(discounted(worth, users, discount_rate(rate)), options.memory)[rows],
        np.minimum(discounted(key_strength, users, discount_rate(key_rate)), options.memory)[rows],
        idle[rows],
        rate,
        key_rate,
        known,
    )
    kept = int((rows < number).sum())
    figures = {
        "kept": kept,
        "born": len(rows) - kept,
        "merged": found.joins,
        "pruned": number - kept,
        "matched_distance": _matched_distance(cohort, labels, users + strength, prompts, noise),
        "inclusion_entropy": _inclusion_entropy(found.columns, model),
        "objective_before": found.history[0],
        "objective_after": found.objective,
        "sweeps": found.sweeps,
        "noise": noise,
        "discount_rate": discount_rate(rate),
    }
    if scales.keys is not None:
        figures["key_groups"] = len(scales.keys.centres)
        figures["key_noise"] = scales.keys.noise
        figures["key_discount_rate"] = discount_rate(key_rate)
    return _result(
        cohort, prompts[rows], None if keys is None else keys[rows], position[labels], left, figures
    )


def _latest(keys: KeyScales, worth: int) -> Array:
    """Of each group no more keys than a remembered key is worth: drifting keys grow stale."""
    fresh = np.concatenate(
        [np.flatnonzero(keys.memory_labels == g)[:worth] for g in range(len(keys.centres))]
    )
    result: Array = keys.memory[np.sort(fresh)]
    return result


def _shares(cohort: Cohort, options: PfptOptions) -> Array:
    """(N,) weight of each local prompt in an average, 1 on average over clients."""
    if not options.use_weights:
        return np.ones(len(cohort.owner))
    shares: Array = (cohort.weights / cohort.weights.mean())[cohort.owner]
    return shares


def _average_prompts(
    cohort: Cohort,
    strength: Array,
    labels: Indices,
    scales: AllScales,
    model: BetaBernoulliModel,
    options: PfptOptions,
) -> Array:
    """Posterior mean of every summarizing prompt; with `shrink` the base measure counts too."""
    if not options.average_memory:
        strength = np.zeros_like(strength)
    shares = _shares(cohort, options)
    means = _average(cohort.prompts, labels, shares, cohort.previous, strength)
    if options.shrink:
        ratio = model.prompts.noise / model.prompts.base
        mass = np.bincount(labels, weights=shares, minlength=len(means)) + strength
        keep = (mass / (mass + ratio))[:, None]
        used = np.bincount(labels, minlength=len(means)) > 0
        means[used] = (keep * means + (1 - keep) * scales.prompts.mu0)[used]
    return means


def _surviving_rows(
    cohort: Cohort,
    users: Array,
    idle: Indices,
    prompts: Array,
    keys: Array | None,
    options: PfptOptions,
) -> Indices:
    """Old rows in their order without those idle too long, then newborn ones by content."""
    number = 0 if cohort.previous is None else len(cohort.previous)
    old, unused = np.arange(len(users)) < number, users == 0
    gone = unused & (idle >= options.patience)
    if keys is not None and cohort.previous_keys is None:
        gone |= unused  # nobody knows their address, so nobody could select them
    surplus = int((~gone).sum()) - options.max_prompts
    if options.max_prompts and surplus > 0:
        spare = np.flatnonzero(unused & ~gone)
        gone[spare[np.argsort(-idle[spare], kind="stable")][:surplus]] = True
    born = np.flatnonzero(~old)
    content = prompts if keys is None else np.concatenate([prompts, keys], axis=1)
    return np.concatenate([np.flatnonzero(old & ~gone), born[lexicographic(content[born])]])


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
    cohort: Cohort, labels: Indices, evidence: Array, prompts: Array, noise: float
) -> float:
    """Root mean square deviation of matched prompts from their summarizing prompt, in noise."""
    matched = np.flatnonzero(evidence[labels] > 1)
    if len(matched) == 0:
        return 0.0
    residual = cohort.prompts[matched]
    residual -= prompts[labels[matched]]
    residual /= noise
    return math.sqrt(float(np.einsum("nd,nd->", residual, residual)) / residual.size)


def _inclusion_entropy(columns: Columns, model: BetaBernoulliModel) -> float:
    """Mean entropy in nats of whether one more client would use each column."""
    odds = np.exp(model.inclusion_score(columns, columns.live(), others=model.num_clients))
    share = odds / (1 + odds)
    return float((entr(share) + entr(1 - share)).mean())


def _extended(values: NDArray[Scalar], length: int) -> NDArray[Scalar]:
    """Padded with zeros."""
    return np.concatenate([values, np.zeros(length - len(values), dtype=values.dtype)])


FIGURES = (
    *("born", "merged", "pruned", "matched_distance", "inclusion_entropy"),
    *("objective_before", "objective_after", "sweeps"),
)


def _nothing_returned(cohort: Cohort, memory: Memory, state: Mapping[str, Tensor]) -> Aggregation:
    """Every client returned an empty set: nothing changes."""
    previous = previous_of(cohort)
    figures = {"kept": len(previous), **dict.fromkeys(FIGURES, 0.0)}
    nobody = np.empty(0, dtype=np.int64)
    result = _result(cohort, previous, cohort.previous_keys, nobody, memory, figures)
    result.state.update({name: tensor.detach().clone() for name, tensor in state.items()})
    return result


def _result(
    cohort: Cohort,
    prompts: Array,
    keys: Array | None,
    assignment: Indices,
    memory: Memory,
    figures: Mapping[str, float],
) -> Aggregation:
    """As tensors, each in storage of its own."""
    state = {**memory.state(), "prompts": torch.tensor(prompts, dtype=cohort.dtype)}
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
