"""The search for the best matching: several starts, and annealing where the matching is in doubt.

Where the first two starts agree and no point's column is in doubt, the problem is easy and the
search is over. Elsewhere, unless there is one client alone, it is annealed; then a few neighbouring
columns are dissolved and dealt anew, again and again. Random draws come from a fixed seed: same
input, same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fedprompt.aggregation.arrays import Indices
from fedprompt.aggregation.pfpt.map.columns import Columns
from fedprompt.aggregation.pfpt.map.matching import (
    MatchingModel,
    Search,
    ascend,
    climb,
    continued,
    hungarian,
    match_client,
    rises,
    settled,
)

TEMPERATURES = np.linspace(1.0, 0.0, 20, endpoint=False)
"""Scale of the noise in the sweeps of an annealing; at 1 moves are about as random as posterior
draws."""
CLEAR = 3.0
"""Log odds, 20 to 1, at which a point's column is beyond doubt."""
WORK = 1e9
"""Multiplications that the annealings may cost."""
STALE_ANNEALINGS, STALE_REGROUPINGS = 2, 24
"""So many in a row that raise nothing end the annealings, and the regroupings."""


def search(
    columns: Columns,
    spans: Sequence[slice],
    models: Sequence[MatchingModel],
    starts: Sequence[Indices],
    max_sweeps: int,
    restarts: int,
) -> Search:
    """The best end of several climbs.

    Args:
        columns: without any placed point.
        spans: rows of each client that has some; the first start matches clients in this order.
        models: give the scores and the objective; they differ in what a climb fits, and there is
            a climb from each.
        starts: (N,) assignments to start from besides, injective within each client.
        max_sweeps: bound on the sweeps between two fits of one climb.
        restarts: most annealings, and as many dozens of regroupings, where the problem is not easy.
    """
    ends = [climb(in_order(columns, model, spans), spans, model, max_sweeps) for model in models]
    for start in starts:
        given = placed(columns, spans, start)
        ends.append(climb(given, spans, models[0].fitted(given), max_sweeps))
    best = highest(ends)
    model = next((m for m, end in zip(models, ends, strict=False) if end is best), models[0])
    sweep_cost = columns.points.size * max(len(best.columns.live()), 1)
    restarts = min(restarts, int(WORK / (len(TEMPERATURES) * sweep_cost)))
    if restarts == 0:
        return best
    backwards = climb(in_order(columns, model, spans[::-1]), spans, model, max_sweeps)
    dense = crowded(columns, model, spans)
    ends = [best, backwards, climb(dense, spans, model.fitted(dense), max_sweeps)]
    agree = backwards.columns.same_partition(best.columns)
    best = highest(ends)
    if len(spans) == 1 or (agree and least_odds(best.columns, best.model, spans) > CLEAR):
        return best
    rng = np.random.default_rng(0)
    stale = 0
    for _ in range(restarts):
        before = best
        best = highest([best, annealed(best, spans, max_sweeps, rng)])
        stale = stale + 1 if best is before else 0
        if stale == STALE_ANNEALINGS:
            break
    return regrouped(best, spans, max_sweeps, 12 * restarts, rng)


def highest(ends: Sequence[Search]) -> Search:
    """The end with the greatest objective, of nearly equal ones the first."""
    best = ends[0]
    for end in ends[1:]:
        if rises(best.objective, end.objective):
            best = end
    return best


def in_order(columns: Columns, model: MatchingModel, order: Iterable[slice]) -> Columns:
    """Match one client after another to those before it.

    Args:
        columns: without any placed point; left as they are.
        model: gives the scores.
        order: rows of each client that has some.
    """
    columns = columns.copy()
    for rows in order:
        columns.place(rows, match_client(columns, model, rows))
    return columns


def crowded(columns: Columns, model: MatchingModel, spans: Iterable[slice]) -> Columns:
    """Open a column only where a client has more prompts than there are columns.

    In the order of `in_order` a single true prompt is not seen: its copies are the whole cloud.

    Args:
        columns: without any placed point; left as they are.
        model: gives the scores.
        spans: rows of each client that has some.
    """
    columns = columns.copy()
    for rows in spans:
        live = columns.live()
        number = rows.stop - rows.start
        scores = model.existing_scores(columns, rows, live)
        missing = max(number - len(live), 0)
        scores = np.concatenate([scores, np.full((number, missing), scores.min(initial=0.0))], 1)
        chosen = settled(hungarian(scores), len(live))
        columns.place(rows, np.concatenate([live, columns.free(missing)])[chosen])
    return columns


def placed(columns: Columns, spans: Sequence[slice], assignment: Indices) -> Columns:
    """Place all points as given.

    Args:
        columns: without any placed point; left as they are.
        spans: rows of each client that has some.
        assignment: (N,) column of each point.
    """
    columns = columns.copy()
    for rows in spans:
        columns.place(rows, assignment[rows])
    return columns


def least_odds(columns: Columns, model: MatchingModel, spans: Iterable[slice]) -> float:
    """Least log odds of a point's column against its next best, other clients held fixed.

    Args:
        columns: in which all points are placed.
        model: gives the scores.
        spans: rows of each client that has some.
    """
    least = np.inf
    for rows in spans:
        before = columns.remove(rows)
        live = columns.live()
        scores = np.concatenate(
            [model.existing_scores(columns, rows, live), model.new_scores(columns, rows)[:, :1]], 1
        )
        columns.place(rows, before)
        own = np.where(np.isin(before, live), np.searchsorted(live, before), len(live))[:, None]
        held = np.take_along_axis(scores, own, axis=1)[:, 0]
        np.put_along_axis(scores, own, -np.inf, axis=1)
        least = min(least, float((held - scores.max(axis=1)).min()))
    return least


def annealed(
    start: Search, spans: Sequence[slice], max_sweeps: int, rng: np.random.Generator
) -> Search:
    """Sweep with Gumbel noise on the scores, less and less of it, and climb from where that ends.

    A point that had the choice alone would so draw its column from the posterior (perturb and MAP,
    Papandreou and Yuille, ICCV 2011). This leaves optima that every ordered start falls into.

    Args:
        start: where another climb ended.
        spans: rows of each client that has some.
        max_sweeps: bound on the sweeps of the climb.
        rng: source of the noise and of the order of clients.
    """
    columns, model = start.columns.copy(), start.model
    for temperature in TEMPERATURES:
        for t in rng.permutation(len(spans)):
            columns.remove(spans[t])
            matched = match_client(columns, model, spans[t], rng, float(temperature))
            columns.place(spans[t], matched)
        model = model.fitted(columns)
    return climb(columns, spans, model, max_sweeps)


def regrouped(
    best: Search, spans: Sequence[slice], max_sweeps: int, attempts: int, rng: np.random.Generator
) -> Search:
    """Deal a few neighbouring columns anew, again and again; keep what raises the objective.

    This mends what sweeps cannot: two columns that each hold halves of the same two prompts.

    Args:
        best: where another climb ended.
        spans: rows of each client that has some.
        max_sweeps: bound on the sweeps of a climb.
        attempts: how often columns are dealt anew.
        rng: source of every choice.
    """
    stale = 0
    for _ in range(attempts):
        columns = best.columns.copy()
        live = columns.live()
        if len(live) < 2 or stale == STALE_REGROUPINGS:
            break
        stale += 1
        anchor = rng.integers(len(live))
        gains = best.model.merge_gains(columns, live[[anchor]], live)[0]
        gains[anchor] = np.inf
        number = int(rng.integers(2, min(5, len(live) + 1)))
        chosen = live[np.argsort(-gains, kind="stable")[:number]]
        affected = [rows for rows in spans if np.isin(columns.assignment[rows], chosen).any()]
        for rows in affected:
            columns.remove(rows)
        for t in rng.permutation(len(affected)):
            columns.place(affected[t], match_client(columns, best.model, affected[t]))
        end = ascend(columns, affected, best.model, 3)
        if rises(best.objective, end.objective):
            best = continued(best, climb(end.columns, spans, best.model, max_sweeps))
            stale = 0
    return best
