"""The search of `map`: Hungarian, sweeps, joins, and results by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import PFPT, planted, random_columns

from fedprompt import aggregation
from fedprompt.aggregation.pfpt.map.blocks import Block
from fedprompt.aggregation.pfpt.map.columns import Columns
from fedprompt.aggregation.pfpt.map.inclusion import Inclusion
from fedprompt.aggregation.pfpt.map.matching import ascend, climb, hungarian
from fedprompt.aggregation.pfpt.map.model import BetaBernoulliModel
from fedprompt.aggregation.pfpt.map.scales import peer_distance
from fedprompt.aggregation.pfpt.map.search import in_order, search


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_hungarian_equals_brute_force(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(20):
        scores = rng.normal(size=(n, n + 1))
        chosen = hungarian(scores)
        assert len(set(chosen.tolist())) == n
        best = max(
            sum(scores[k, i] for k, i in enumerate(pick))
            for pick in itertools.permutations(range(n + 1), n)
        )
        assert scores[np.arange(n), chosen].sum() == pytest.approx(best)


def test_two_clients_of_two_prompts_find_the_best_of_all_assignments() -> None:
    # Client 1 joins none, one or both of client 0's columns: 1 + 4 + 2 = 7 assignments.
    exact = 0
    for seed in range(20):
        columns, model, spans = random_columns(np.random.default_rng(seed), [2, 2], 2, 0)
        values = []
        for targets in itertools.permutations(range(4), 2):
            trial = Columns(
                columns.points, columns.owner, np.zeros(0), columns.classes, columns.home
            )
            trial.place(spans[0], np.array([0, 1]))
            trial.place(spans[1], np.array(targets))
            values.append(model.objective(trial))
        empty = Columns(columns.points, columns.owner, np.zeros(0), columns.classes, columns.home)
        start = in_order(empty, model, spans)
        found = ascend(start, spans, model, 50)
        # The scores ignore the K_h! of columns that others share, here 2! for each of two sets h,
        # and that a class may change its column, here by at most two points.
        assert found.objective >= max(values) - math.log(4) - 2 * math.log(3) - 1e-9
        exact += found.objective >= max(values) - 1e-9
    assert exact >= 15


def test_by_hand() -> None:
    # Two clients, two prompts, d = 1, noise 1 and base variance 4, gamma 1, m = 2.
    # Column {0, 0}: its posterior after the first 0 has precision 1/4 + 1, so variance 0.8;
    # joining scores log N(0 | 0, 1.8) + log(1 / (2 - 1)) = -0.5 log(2 pi 1.8) = -1.2128;
    # a new column scores log N(0 | 0, 5) + log(1 / 2) = -1.7237 - 0.6931 = -2.4168.
    points = np.array([[0.0], [10.0], [0.0], [10.0]])
    owner = np.array([0, 0, 1, 1])
    block = Block(slice(0, 1), 1.0, 4.0, 1.0, np.zeros((0, 1)), np.zeros(0))
    model = BetaBernoulliModel(block, None, Inclusion.indian_buffet(1.0), 2)
    columns = Columns(points, owner, np.zeros(0))
    columns.place(slice(0, 2), np.array([0, 1]))
    existing = model.existing_scores(columns, slice(2, 4), columns.live())
    assert existing[0, 0] == pytest.approx(-1.2128, abs=1e-4)
    assert model.new_scores(columns, slice(2, 4))[0, 0] == pytest.approx(-2.4168, abs=1e-4)
    spans = [slice(0, 2), slice(2, 4)]
    found = search(Columns(points, owner, np.zeros(0)), spans, [model], [], 50, 0)
    assert found.columns.assignment[0] == found.columns.assignment[2]
    assert found.columns.assignment[1] == found.columns.assignment[3]


def test_averages_by_hand() -> None:
    # Clients drift by 1 from rows 0 and 100: noise 1. Plain means: (1 - 1) / 2 and (101 + 99) / 2.
    sets = [torch.tensor([[1.0], [101.0]]), torch.tensor([[-1.0], [99.0]])]
    rows = [torch.tensor([0, 1])] * 2
    previous = torch.tensor([[0.0], [100.0]])
    result = PFPT.aggregate(sets, origins=rows, previous=previous)
    assert result.prompts.tolist() == [[0.0], [100.0]]
    assert [rows.tolist() for rows in result.assignment] == [[0, 1], [0, 1]]
    # Two users are worth 1 / (1 / 2 + 1 / 3) = 1.2 a round later.
    assert result.state["strength"].tolist() == pytest.approx([1.2, 1.2])
    # Next round: strength 1.2 at the previous value, one client at 3.8: 3.8 / (1.2 + 1).
    again = PFPT.aggregate(
        [torch.tensor([[3.8], [103.8]])], origins=rows[:1], previous=previous, state=result.state
    )
    torch.testing.assert_close(again.prompts, torch.tensor([[3.8 / 2.2], [100 + 3.8 / 2.2]]))
    # Sample counts 3 and 1 count 1.5 and 0.5: (1.5 * 1 - 0.5 * 1) / 2.
    weighted = aggregation.create("pfpt", use_weights=True).aggregate(
        sets, weights=torch.tensor([3.0, 1.0]), origins=rows, previous=previous
    )
    assert weighted.prompts.tolist() == [[0.5], [100.5]]
    # Of the total variance 2501 the scatter within columns, (1 + 1) / (2 - 1), is fitted as noise,
    # and 2 / (2 + 2 / 2499) of the mean remain.
    shrunk = aggregation.create("pfpt", shrink=True).aggregate(
        sets, origins=rows, previous=previous
    )
    expected = 50 * (1 - 2 / (2 + 2 / 2499))
    assert float(shrunk.prompts[0, 0]) == pytest.approx(expected, rel=1e-2)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    remembered=st.integers(0, 3),
)
def test_objective_never_falls(seed: int, sizes: list[int], remembered: int) -> None:
    rng = np.random.default_rng(seed)
    columns, model, spans = random_columns(rng, sizes, 2, remembered)
    result = climb(columns, spans, model, 50)
    assert all(b >= a for a, b in itertools.pairwise(result.history))
    assert result.objective == pytest.approx(result.model.objective(result.columns))
    strength = columns.strength[:remembered]
    fresh = Columns(columns.points, columns.owner, strength, columns.classes, columns.home)
    for span in spans:  # bookkeeping: sums and counts are those of the final assignment
        fresh.place(span, result.columns.assignment[span])
    np.testing.assert_allclose(fresh.sums, result.columns.sums, atol=1e-9)
    np.testing.assert_array_equal(fresh.counts, result.columns.counts)
    np.testing.assert_array_equal(fresh.signatures, result.columns.signatures)
    assert result.columns.membership(result.columns.live()).sum() == sum(sizes)  # injective


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 5), min_size=3, max_size=6),
    remembered=st.integers(0, 3),
)
def test_objective_never_falls_over_starts_and_regroupings(
    seed: int, sizes: list[int], remembered: int
) -> None:
    rng = np.random.default_rng(seed)
    columns, model, spans = random_columns(rng, sizes, 2, remembered)
    strength = columns.strength[:remembered]
    empty = Columns(columns.points, columns.owner, strength, columns.classes, columns.home)
    one = climb(in_order(empty, model, spans), spans, model, 50)
    found = search(empty, spans, [model], [columns.assignment], 50, 3)
    assert all(b >= a for a, b in itertools.pairwise(found.history))
    assert found.objective >= one.objective
    assert found.objective == pytest.approx(found.model.objective(found.columns))
    assert (empty.assignment == -1).all()


def test_diagnostics_report_a_rise() -> None:
    result = PFPT.aggregate(planted(12, 6, 8, 0.9, 1.0, 0.6, 7)[1])
    assert result.diagnostics["objective_after"] >= result.diagnostics["objective_before"]
    assert result.diagnostics["sweeps"] >= 1
    assert result.diagnostics["born"] == len(result.prompts)


def test_peer_distance_by_hand() -> None:
    # Nearest peers: 0 -> 1 (1), 10 -> 12 (4), 1 -> 0 (1), 12 -> 10 (4): median 2.5.
    points = np.array([[0.0], [10.0], [1.0], [12.0]])
    assert peer_distance(points, np.array([0, 0, 1, 1])) == 2.5
    assert peer_distance(points, np.zeros(4, dtype=np.int64)) is None
