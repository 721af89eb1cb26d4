"""Section 3.3, Algorithm 1: summarizing prompts are posterior means; unused ones are removed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import entr
from torch import Tensor

from fedprompt.aggregation.arrays import Array, Indices, lexicographic
from fedprompt.aggregation.base import Aggregation
from fedprompt.aggregation.cohort import Cohort, previous_of
from fedprompt.aggregation.pfpt.map.columns import Columns
from fedprompt.aggregation.pfpt.map.matching import Search
from fedprompt.aggregation.pfpt.map.memory import (
    Memory,
    averages,
    discount_rate,
    discounted,
    seen_rate,
)
from fedprompt.aggregation.pfpt.map.model import BetaBernoulliModel
from fedprompt.aggregation.pfpt.map.scales import AllScales, KeyScales
from fedprompt.aggregation.pfpt.options import PfptOptions

Scalar = TypeVar("Scalar", bound=np.generic)
FIGURES = (
    *("born", "merged", "pruned", "matched_distance", "inclusion_entropy"),
    *("objective_before", "objective_after", "sweeps"),
)


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
    model = cast(BetaBernoulliModel, found.model)
    noise = math.sqrt(model.prompts.noise) * scales.prompts.unit
    memory = _counted(_with_rates(memory, cohort, scales, labels, noise), users)
    prompts = _average_prompts(cohort, memory.strength, labels, scales, model, options)
    keys = _average_keys(cohort, memory.key_strength, labels, options)
    rows = _surviving_rows(cohort, users, memory.idle, prompts, keys, options)  # Line 8
    position = np.full(len(users), -1, dtype=np.int64)
    position[rows] = np.arange(len(rows))
    kept = int((rows < number).sum())
    evidence = users + memory.strength
    figures = {
        "kept": kept,
        "born": len(rows) - kept,
        "merged": found.joins,
        "pruned": number - kept,
        "matched_distance": _matched_distance(cohort, labels, evidence, prompts, noise),
        "inclusion_entropy": _inclusion_entropy(found.columns, model),
        "objective_before": found.history[0],
        "objective_after": found.objective,
        "sweeps": found.sweeps,
        "noise": noise,
        "discount_rate": discount_rate(memory.rate),
    }
    if scales.keys is not None:
        figures["key_groups"] = len(scales.keys.centres)
        figures["key_noise"] = scales.keys.noise
        figures["key_discount_rate"] = discount_rate(memory.key_rate)
    left = _next_memory(memory, users, rows, options)
    chosen_keys = None if keys is None else keys[rows]
    return _result(cohort, prompts[rows], chosen_keys, position[labels], left, figures)


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
    means = averages(cohort.prompts, labels, shares, cohort.previous, strength)
    if options.shrink:
        ratio = model.prompts.noise / model.prompts.base
        mass = np.bincount(labels, weights=shares, minlength=len(means)) + strength
        keep = (mass / (mass + ratio))[:, None]
        used = np.bincount(labels, minlength=len(means)) > 0
        means[used] = (keep * means + (1 - keep) * scales.prompts.mu0)[used]
    return means


def _average_keys(
    cohort: Cohort, key_strength: Array, labels: Indices, options: PfptOptions
) -> Array | None:
    """Mean key of every summarizing prompt, the remembered one included; None without keys."""
    if cohort.keys is None:
        return None
    shares = _shares(cohort, options)
    return averages(cohort.keys, labels, shares, cohort.previous_keys, key_strength)


def _with_rates(
    memory: Memory, cohort: Cohort, scales: AllScales, labels: Indices, noise: float
) -> Memory:
    """With the discount rates that this round shows, and the keys that the next one compares."""
    rate = seen_rate(memory.rate, cohort.prompts, noise, cohort.previous, labels, memory.strength)
    if cohort.keys is None or scales.keys is None:
        return dataclasses.replace(memory, rate=rate)
    key_rate = seen_rate(
        memory.key_rate,
        scales.keys.keys,
        scales.keys.noise,
        scales.keys.previous,
        labels,
        memory.key_strength,
    )
    known = _latest(scales.keys, math.ceil(1 / discount_rate(key_rate)))
    return dataclasses.replace(memory, rate=rate, key_rate=key_rate, keys=known)


def _counted(memory: Memory, users: Array) -> Memory:
    """Of all R rows, the newborn included, which nothing is remembered of."""
    idle = _extended(memory.idle, len(users))
    return dataclasses.replace(
        memory,
        strength=_extended(memory.strength, len(users)),
        key_strength=_extended(memory.key_strength, len(users)),
        idle=np.where(users > 0, 0, idle + 1),
    )


def _next_memory(memory: Memory, users: Array, rows: Indices, options: PfptOptions) -> Memory:
    """What is left of the rows that survive, discounted.

    Args:
        memory: of all R rows, with the rates of this round.
        users: (R,) clients of this round.
        rows: those that survive.
        options: `memory` and `average_memory` are used.
    """
    worth = memory.strength
    if not options.average_memory:
        worth = np.where(users > 0, 0.0, worth)
    strength = discounted(worth, users, discount_rate(memory.rate))
    key_strength = discounted(memory.key_strength, users, discount_rate(memory.key_rate))
    return dataclasses.replace(
        memory,
        strength=np.minimum(strength, options.memory)[rows],
        key_strength=np.minimum(key_strength, options.memory)[rows],
        idle=memory.idle[rows],
    )


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
        gone |= unused  # without an address no client could select them
    surplus = int((~gone).sum()) - options.max_prompts
    if options.max_prompts and surplus > 0:
        spare = np.flatnonzero(unused & ~gone)
        gone[spare[np.argsort(-idle[spare], kind="stable")][:surplus]] = True
    born = np.flatnonzero(~old)
    content = prompts if keys is None else np.concatenate([prompts, keys], axis=1)
    return np.concatenate([np.flatnonzero(old & ~gone), born[lexicographic(content[born])]])


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


def nothing_returned(cohort: Cohort, memory: Memory, state: Mapping[str, Tensor]) -> Aggregation:
    """Every client returned an empty set: nothing changes.

    Args:
        cohort: the inputs, without a prompt.
        memory: what was remembered of the n broadcast rows.
        state: is returned as it is.

    Raises:
        InputError: nothing was broadcast.
    """
    previous = previous_of(cohort)
    figures = {"kept": len(previous), **dict.fromkeys(FIGURES, 0.0)}
    nothing = np.empty(0, dtype=np.int64)
    result = _result(cohort, previous, cohort.previous_keys, nothing, memory, figures)
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
