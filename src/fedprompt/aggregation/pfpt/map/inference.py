"""One aggregation of `map`, step by step: scales, model, matching, summary."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from fedprompt.aggregation.arrays import Array, Indices
from fedprompt.aggregation.base import Aggregation
from fedprompt.aggregation.cohort import Cohort
from fedprompt.aggregation.inputs import AggregationInput
from fedprompt.aggregation.pfpt.map.blocks import Block, KeyBlock
from fedprompt.aggregation.pfpt.map.columns import Columns
from fedprompt.aggregation.pfpt.map.inclusion import Inclusion
from fedprompt.aggregation.pfpt.map.labels import label_prompts
from fedprompt.aggregation.pfpt.map.matching import MatchingModel, Search, join_gains, pour
from fedprompt.aggregation.pfpt.map.memory import Memory, recall
from fedprompt.aggregation.pfpt.map.model import BetaBernoulliModel
from fedprompt.aggregation.pfpt.map.scales import AllScales, KeyScales, all_scales, drift_power
from fedprompt.aggregation.pfpt.map.search import search
from fedprompt.aggregation.pfpt.map.summary import nothing_returned, summarize
from fedprompt.aggregation.pfpt.options import PfptOptions
from fedprompt.core.errors import InputError


def aggregate_map(given: AggregationInput, options: PfptOptions) -> Aggregation:
    """Match local and remembered prompts; average what belongs together."""
    given = _completed(given)
    cohort = Cohort.of(given)
    _check_bound(cohort, options)
    memory = recall(cohort, given.state, options)
    if len(cohort.prompts) == 0:
        return nothing_returned(cohort, memory, given.state)
    scales = all_scales(cohort, memory, options)
    models = generative_models(cohort, memory, scales, options)  # Section 3.1
    found = match(cohort, memory, scales, models, options)  # Section 3.2, Algorithm 2
    found = merge_closest(found, options)
    labels = label_prompts(found.columns, cohort, memory.strength)
    return summarize(cohort, memory, scales, found, labels, options)  # Algorithm 1


def generative_models(
    cohort: Cohort, memory: Memory, scales: AllScales, options: PfptOptions
) -> list[BetaBernoulliModel]:
    """Prompts and keys as two Gaussian blocks, and the inclusion of summarizing prompts.

    One model for each first guess of the prompts' noise; they differ in nothing else.

    Args:
        cohort: the inputs.
        memory: what was remembered of the n broadcast rows.
        scales: units of prompts and keys, and guesses of the noise.
        options: `gamma` and `origin_odds` are used.
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

    Args:
        cohort: the inputs.
        memory: what was remembered of the n broadcast rows.
        scales: units of prompts and keys.
        models: there is a climb from each.
        options: `max_sweeps` and `restarts` are used.
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


def _dissolve(columns: Columns, model: MatchingModel, used: Indices, weakest: int) -> None:
    """There is room: no client has more than `max_prompts` prompts."""
    others = np.delete(used, weakest)
    for row in np.flatnonzero(columns.assignment == used[weakest]):
        one = slice(int(row), int(row) + 1)
        columns.remove(one)
        scores = model.existing_scores(columns, one, others)[0]
        scores[columns.membership(others)[columns.owner[row]]] = -np.inf
        columns.place(one, others[[int(np.argmax(scores))]])


def _check_bound(cohort: Cohort, options: PfptOptions) -> None:
    largest = max(span.stop - span.start for span in cohort.spans())
    if 0 < options.max_prompts < largest:
        raise InputError(
            f"aggregator.max_prompts: expected at least {largest}, the prompts of one client, "
            f"got {options.max_prompts}; raise it or let clients return fewer prompts"
        )


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
