"""PFPT against planted truth, brute force, slow loops and numbers by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from fedprompt import aggregation
from fedprompt.aggregation.base import Aggregation
from fedprompt.aggregation.pfpt.map.blocks import Block, KeyBlock, fit_noise
from fedprompt.aggregation.pfpt.map.columns import Columns
from fedprompt.aggregation.pfpt.map.inclusion import Inclusion, fit_inclusion
from fedprompt.aggregation.pfpt.map.matching import ascend, climb, hungarian
from fedprompt.aggregation.pfpt.map.model import BetaBernoulliModel
from fedprompt.aggregation.pfpt.map.scales import peer_distance
from fedprompt.aggregation.pfpt.map.search import in_order, search
from fedprompt.core.errors import ConfigError, InputError

PFPT = aggregation.create("pfpt")
Array = NDArray[np.float64]


# Planted correspondences: n true prompts, each client gets noisy copies of a subset, shuffled.


def planted(
    number: int, clients: int, d: int, noise: float, spread: float, part: float, seed: int
) -> tuple[Array, list[Tensor], list[Array]]:
    rng = np.random.default_rng(seed)
    true = spread * rng.normal(size=(number, d))
    picks = [rng.permutation(number)[: round(part * number)] for _ in range(clients)]
    sets = [torch.tensor(true[pick] + noise * rng.normal(size=(len(pick), d))) for pick in picks]
    return true, sets, picks


def agreement(picks: list[Array], result: Aggregation) -> float:
    return float(adjusted_rand_score(np.concatenate(picks), torch.cat(result.assignment).numpy()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("number", "clients", "d", "noise", "spread", "part"),
    [
        (10, 5, 64, 0.05, 1.0, 1.0),
        (20, 10, 64, 0.5, 1.0, 0.6),
        (20, 10, 64, 0.5, 1.0, 1.0),
        (10, 10, 768, 0.01, 0.04, 1.0),
        (20, 10, 768, 0.04, 0.04, 1.0),
    ],
)
def test_planted_correspondences_are_recovered(
    number: int, clients: int, d: int, noise: float, spread: float, part: float, seed: int
) -> None:
    true, sets, picks = planted(number, clients, d, noise, spread, part, seed)
    result = PFPT.aggregate(sets)
    assert len(result.prompts) == number
    assert agreement(picks, result) >= 0.99
    distance = torch.cdist(torch.tensor(true), result.prompts)
    error = distance.min(dim=1).values / math.sqrt(d)
    assert float(error.max()) < noise  # an average of several copies is better than one


def test_one_client_alone_keeps_its_prompts() -> None:
    sets = planted(7, 1, 16, 0.1, 1.0, 1.0, 0)[1]
    result = PFPT.aggregate(sets)
    assert torch.equal(result.prompts[result.assignment[0]], sets[0])


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (1e3, 0.0), (1.0, 5.0), (7.0, -3.0)])
def test_assignment_ignores_scale_and_shift(scale: float, shift: float, keyed: bool) -> None:
    _, sets, _ = planted(12, 6, 16, 0.6, 1.0, 0.6, 4)
    rng = np.random.default_rng(0)
    keys = [torch.tensor(rng.normal(size=(len(p), 5))) for p in sets] if keyed else None
    plain = PFPT.aggregate(sets, keys=keys)
    moved = PFPT.aggregate([scale * p + shift for p in sets], keys=keys)
    for left, right in zip(plain.assignment, moved.assignment, strict=True):
        assert torch.equal(left, right)
    torch.testing.assert_close(moved.prompts, scale * plain.prompts + shift)
    if keys is not None:
        scaled = PFPT.aggregate(sets, keys=[100 * key for key in keys])
        assert torch.equal(torch.cat(scaled.assignment), torch.cat(plain.assignment))


def test_permuted_clients_and_rows_give_the_same_bits() -> None:
    _, sets, _ = planted(12, 6, 16, 0.6, 1.0, 0.6, 5)
    rng = np.random.default_rng(1)
    clients = rng.permutation(6)
    rows = [torch.tensor(rng.permutation(len(sets[t]))) for t in clients]
    plain = PFPT.aggregate(sets)
    moved = PFPT.aggregate([sets[t][order] for t, order in zip(clients, rows, strict=True)])
    assert torch.equal(plain.prompts, moved.prompts)
    for place, (t, order) in enumerate(zip(clients, rows, strict=True)):
        assert torch.equal(moved.assignment[place], plain.assignment[t][order])


# The model: scores and objective against slow loops written from the equations.


BUFFET = Inclusion.indian_buffet(1.3)
FITTED = Inclusion(0.7, 2.1, math.log(4.0), 1.3)


def random_columns(
    rng: np.random.Generator,
    sizes: list[int],
    d: int,
    remembered: int,
    inclusion: Inclusion = BUFFET,
) -> tuple[Columns, BetaBernoulliModel, list[slice]]:
    """Clients of the given sizes, placed at random; prompt block of d, key block of 2."""
    total, width = sum(sizes), d + 2
    points = rng.normal(size=(total, width)) * 1.5
    owner = np.repeat(np.arange(len(sizes)), sizes).astype(np.int64)
    strength = rng.uniform(0.3, 3.0, size=remembered)
    means = rng.normal(size=(remembered, width))
    classes = rng.integers(0, 3, size=total)
    home = np.array([0 if remembered else -1, -1, -1])
    prompts = Block(slice(0, d), 0.8, 3.2, 0.7, means[:, :d], strength, total=4.0)
    keys = KeyBlock(slice(d, width), 0.4, rng.normal(size=(3, 2)), means[:, d:])
    model = BetaBernoulliModel(prompts, keys, inclusion, len(sizes), math.log(3.0))
    columns = Columns(points, owner, strength, classes, home)
    ends = np.cumsum(sizes)
    spans = [slice(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)]
    for span in spans:
        targets = rng.permutation(remembered + max(sizes))[: span.stop - span.start]
        columns.place(span, targets.astype(np.int64))
    return columns, model, spans


def slow_evidence(columns: Columns, model: BetaBernoulliModel, column: int) -> float:
    """Log density of a column's members as one joint Gaussian, by scipy."""
    members = np.flatnonzero(columns.assignment == column)
    value, block = 0.0, model.prompts
    precision, mean = 1 / block.base, np.zeros(block.part.stop - block.part.start)
    if column < columns.num_remembered:
        weight = block.strength[column] / block.noise
        precision += weight
        mean = weight * block.prior_mean[column] / precision
    covariance = block.noise * np.eye(len(members)) + 1 / precision
    for axis, centre in enumerate(mean):
        values = columns.points[members, block.part][:, axis]
        if len(members):
            normal = stats.multivariate_normal(np.full(len(members), centre), covariance)
            value += block.power * float(normal.logpdf(values))
    return value + (
        slow_key_evidence(columns, model.keys, column) if model.keys and len(members) else 0.0
    )


def slow_key_evidence(columns: Columns, block: KeyBlock, column: int) -> float:
    """Unit normals around one key, but for their constant."""

    def density(key: Array) -> float:
        members = columns.points[columns.assignment == column, block.part]
        logs = stats.norm(key, 1).logpdf(members) + 0.5 * math.log(2 * math.pi)
        return block.power * float(logs.sum())

    if column < columns.num_remembered:
        return density(block.remembered[column])
    return max(density(key) for key in block.centres) - math.log(len(block.centres))


def slow_prior(columns: Columns, model: BetaBernoulliModel) -> float:
    """Log prior of the columns: Beta-Bernoulli, and K_h! of columns with the same clients."""
    m, (a, b), users_of, value = model.num_clients, beta_of(model), {}, 0.0
    most = float(columns.strength.max(initial=0.0))
    for column in columns.live().tolist():
        members = np.flatnonzero(columns.assignment == column)
        c, old = len(members), columns.strength[column]
        if old:
            value += log_beta(old + c + a, most - old + m - c + b)
            value -= log_beta(old + a, most - old + b)
        else:
            value += model.inclusion.log_price + log_beta(c + a, m - c + b)
            users = frozenset(columns.owner[members].tolist())
            users_of[users] = users_of.get(users, 0) + 1
    return value - sum(math.lgamma(count + 1) for count in users_of.values())


def beta_of(model: BetaBernoulliModel) -> tuple[float, float]:
    return model.inclusion.a, model.inclusion.b


def log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def slow_objective(columns: Columns, model: BetaBernoulliModel) -> float:
    """Up to the constants of the inclusion prior."""
    value = slow_prior(columns, model)
    for column in set(columns.assignment.tolist()) - {-1}:
        value += slow_evidence(columns, model, column)
    return value + model.log_faithful * slow_faithful(columns)


def class_counts(columns: Columns, name: int) -> dict[int, float]:
    """Members of a class in each column; its home has half a member more."""
    mine = columns.assignment[(columns.classes == name) & (columns.assignment >= 0)]
    counts = {int(c): float((mine == c).sum()) for c in sorted(set(mine.tolist()))}
    if columns.home[name] >= 0:
        home = int(columns.home[name])
        counts[home] = counts.get(home, 0.0) + 0.5
    return counts


def slow_faithful(columns: Columns) -> float:
    """Points that are in the column with most of their class."""
    return sum(max(class_counts(columns, name).values(), default=0.0) for name in range(3))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("inclusion", [BUFFET, FITTED])
def test_objective_equals_a_slow_loop(seed: int, inclusion: Inclusion) -> None:
    rng = np.random.default_rng(seed)
    columns, model, _ = random_columns(rng, [3, 2, 4], 3, 2, inclusion)
    expected = slow_objective(columns, model) + inclusion.log_rest(3)
    assert model.objective(columns) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("clients", [1, 2, 7])
@pytest.mark.parametrize("inclusion", [BUFFET, FITTED])
def test_the_inclusion_prior_sums_to_one(clients: int, inclusion: Inclusion) -> None:
    # Columns with c users of m: C(m, c) times the weight of one such column is the Poisson mean,
    # whose exponential normalises; a + b = 1 and 2.8 have the log prior -log(size / 4)^2 / 8.
    users = np.arange(1, clients + 1)
    choices = np.array([math.comb(clients, int(c)) for c in users])
    mean = float((choices * np.exp(inclusion.log_born(users, clients))).sum())
    hyper = -(math.log((inclusion.a + inclusion.b) / 4) ** 2) / 8
    expected = inclusion.gamma * math.log(mean) - mean + hyper
    assert inclusion.log_rest(clients) == pytest.approx(expected, abs=1e-9)


def test_log_odds_are_those_of_the_posterior_mean() -> None:
    # The Bernoulli term given the users of the others, by scipy: Beta posterior mean.
    odds = float(FITTED.log_odds(np.array([2.0]), np.array([6.0]))[0])
    mean = stats.beta(0.7 + 2, 2.1 + 4).mean()
    assert odds == pytest.approx(stats.bernoulli.logpmf(1, mean) - stats.bernoulli.logpmf(0, mean))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("inclusion", [BUFFET, FITTED])
@pytest.mark.parametrize("log_faithful", [0.0, 1.1])
def test_scores_equal_a_slow_loop_and_the_increments_of_the_objective(
    seed: int, inclusion: Inclusion, log_faithful: float
) -> None:
    rng = np.random.default_rng(seed)
    columns, model, spans = random_columns(rng, [3, 2, 4], 3, 2, inclusion)
    model = dataclasses.replace(model, log_faithful=log_faithful)
    columns.remove(spans[1])
    live = columns.live()
    existing = model.existing_scores(columns, spans[1], live)
    new = model.new_scores(columns, spans[1])
    base = slow_objective(columns, model)
    most = float(columns.strength.max())
    a, b = beta_of(model)
    for k, row in enumerate(range(spans[1].start, spans[1].stop)):
        for i, column in enumerate(live):
            users = columns.counts[column] + columns.strength[column]
            clients = 3 + (most if column < columns.num_remembered else 0.0)
            expected = math.log((users + a) / (clients - 1 - users + b))
            expected += model.log_faithful * (expected_column(columns, row) == column)
            key = model.keys.keys(columns, np.array([column]))[0]
            point = columns.points[row, model.keys.part]
            expected -= 0.5 * model.keys.power * float(((point - key) ** 2).sum())
            keyless = dataclasses.replace(model, keys=None)
            before = slow_evidence(columns, keyless, int(column))
            columns.assignment[row] = column
            expected += slow_evidence(columns, keyless, int(column)) - before
            assert existing[k, i] == pytest.approx(expected, rel=1e-9)
            columns.assignment[row] = -1
            # No history factorial, no class that changes its column: the exact increment.
            if column < columns.num_remembered and model.log_faithful == 0:
                columns.place(slice(row, row + 1), np.array([column]))
                gain = slow_objective(columns, model) - base
                assert existing[k, i] == pytest.approx(gain, rel=1e-9)
                columns.remove(slice(row, row + 1))
        for j in range(2):
            price = inclusion.log_price + log_beta(1 + a, 2 + b)
            expected = price - math.log(j + 1)
            block, key_block = model.prompts, model.keys
            point = columns.points[row, block.part]
            density = stats.norm(0, math.sqrt(block.noise + block.base)).logpdf(point)
            expected += block.power * float(density.sum()) - math.log(3)
            distances = ((columns.points[row, key_block.part] - key_block.centres) ** 2).sum(axis=1)
            expected -= 0.5 * key_block.power * float(distances.min())
            assert new[k, j] == pytest.approx(expected, rel=1e-9)
    # Section 5 of the design: an Indian buffet's first new column costs log(gamma / m).
    assert BUFFET.log_born(np.ones(1), 3)[0] == pytest.approx(math.log(1.3 / 3))


def expected_column(columns: Columns, row: int) -> int:
    """Where most placed points of the row's class are, else the class's home."""
    counts = class_counts(columns, int(columns.classes[row]))
    return max(counts, key=lambda c: (counts[c], -c)) if counts else -1


@pytest.mark.parametrize("seed", range(3))
def test_merge_gains_are_the_increments_of_the_objective(seed: int) -> None:
    columns, model, _ = random_columns(np.random.default_rng(seed), [1, 2, 1, 2, 1], 3, 2, FITTED)
    model = dataclasses.replace(model, log_faithful=0.0)
    sources, targets = columns.born(), columns.live()
    gains = model.merge_gains(columns, sources, targets)
    checked = 0
    for i, source in enumerate(sources):
        for j, target in enumerate(targets):
            rows = np.flatnonzero(columns.assignment == source)
            others = columns.owner[columns.assignment == target]
            if source == target or np.isin(columns.owner[rows], others).any():
                continue
            joined = columns.copy()
            for row in rows:
                joined.remove(slice(row, row + 1))
                joined.place(slice(row, row + 1), np.array([target]))
            gain = without_repeats(joined, model) - without_repeats(columns, model)
            assert gains[i, j] == pytest.approx(gain, rel=1e-8, abs=1e-8)
            checked += 1
    assert checked > 0


def without_repeats(columns: Columns, model: BetaBernoulliModel) -> float:
    """The objective without its K_h!."""
    users_of: dict[frozenset[int], int] = {}
    for column in columns.born().tolist():
        users = frozenset(columns.owner[columns.assignment == column].tolist())
        users_of[users] = users_of.get(users, 0) + 1
    repeats = sum(math.lgamma(count + 1) for count in users_of.values())
    return slow_objective(columns, model) + repeats


def test_fits_find_the_maximum_of_a_grid() -> None:
    columns, model, _ = random_columns(np.random.default_rng(0), [6, 6, 6, 6], 3, 2)
    block = fit_noise(model.prompts, columns)
    assert block.noise + block.base == pytest.approx(4.0)

    def value(noise: float) -> float:
        candidate = dataclasses.replace(block, noise=noise, base=4.0 - noise)
        return slow_objective(columns, dataclasses.replace(model, prompts=candidate))

    best = max(value(noise) for noise in np.linspace(0.2, 3.2, 61))
    assert value(block.noise) >= best - 1e-3
    # Eight columns that all of ten clients use, none remembered: the inclusion is near 1.
    sure = fit_inclusion(np.full(8, 10.0), 10, np.empty(0), np.empty(0), 0.0, 1.0)
    rare = fit_inclusion(np.full(8, 1.0), 10, np.empty(0), np.empty(0), 0.0, 1.0)
    assert sure.a / (sure.a + sure.b) > 0.95
    assert rare.a / (rare.a + rare.b) < 0.15


@pytest.mark.parametrize(("d", "clients"), [(16, 10), (128, 3), (768, 10), (768, 50)])
def test_one_true_prompt_is_seen(d: int, clients: int) -> None:
    rng = np.random.default_rng(d)
    true = rng.normal(size=d)
    sets = [torch.tensor(true + 0.1 * rng.normal(size=(1, d))) for _ in range(clients)]
    assert len(PFPT.aggregate(sets).prompts) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_row_whose_users_part_is_split(seed: int) -> None:
    # Five broadcast rows, which two kinds of clients tune towards different targets.
    rng = np.random.default_rng(seed)
    start = rng.normal(size=(5, 64))
    apart = 0.6 * rng.normal(size=(2, 5, 64))
    sets, origins, labels = [], [], []
    for client in range(6):
        rows = rng.permutation(5)
        goal = start[rows] + apart[client % 2][rows]
        sets.append(torch.tensor(goal + 0.3 * rng.normal(size=(5, 64))))
        origins.append(torch.tensor(rows))
        labels.append(rows + 5 * (client % 2))
    result = PFPT.aggregate(sets, origins=origins, previous=torch.tensor(start))
    assert agreement(labels, result) == 1.0


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


# Keyed prompts.


def keyed_clients(
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Eight clients of two domains that started from the same five prompts."""
    rng = np.random.default_rng(seed)
    start = rng.normal(size=(5, 32))
    centres = rng.normal(size=(2, 24))
    sets, keys, origins = [], [], []
    for client in range(8):
        rows = rng.permutation(5)
        key = centres[client % 2] + 0.1 * rng.normal(size=24)
        sets.append(torch.tensor(start[rows] + 0.1 * rng.normal(size=(5, 32))))
        keys.append(torch.tensor(key).repeat(5, 1))
        origins.append(torch.tensor(rows))
    return sets, keys, origins, torch.tensor(start)


@pytest.mark.parametrize("seed", range(3))
def test_same_prompts_with_different_keys_are_kept_apart(seed: int) -> None:
    sets, keys, origins, start = keyed_clients(seed)
    keyed = PFPT.aggregate(
        sets, origins=origins, previous=start, keys=keys, previous_keys=torch.zeros(5, 24).double()
    )
    assert len(keyed.prompts) == 10
    truth = [rows.numpy() + 5 * (t % 2) for t, rows in enumerate(origins)]
    assert agreement(truth, keyed) == 1.0
    ignored = aggregation.create("pfpt", key_weight=0).aggregate(
        sets, origins=origins, previous=start, keys=keys, previous_keys=torch.zeros(5, 24).double()
    )
    assert len(ignored.prompts) == len(PFPT.aggregate(sets, origins=origins).prompts) == 5


def test_one_domain_returns_about_as_many_prompts_as_were_broadcast() -> None:
    rng = np.random.default_rng(3)
    sets, _, origins, start = keyed_clients()
    centre = rng.normal(size=24)
    keys = [torch.tensor(centre + 0.3 * rng.normal(size=24)).repeat(5, 1) for _ in sets]
    result = PFPT.aggregate(
        sets, origins=origins, previous=start, keys=keys, previous_keys=torch.zeros(5, 24).double()
    )
    assert len(result.prompts) == 5
    assert all(torch.equal(a, o) for a, o in zip(result.assignment, origins, strict=True))


def federation(domains: int, rounds: int, clients: int = 40, per_round: int = 10) -> list[int]:
    """Pool sizes when clients pick the five nearest keys and move to their domain's optimum."""
    rng = np.random.default_rng(domains)
    start = rng.normal(size=(5, 24))
    optimum = [start + 0.5 * rng.normal(size=(5, 24)) for _ in range(domains)]
    centre = rng.normal(size=(domains, 16))
    query = centre[np.arange(clients) % domains] + 0.3 * rng.normal(size=(clients, 16))
    prompts, keys, state = torch.tensor(start), torch.zeros(5, 16, dtype=torch.float64), None
    pool = []
    for _ in range(rounds):
        sets, addresses, origins = [], [], []
        for client in rng.permutation(clients)[:per_round]:
            rows = np.argsort(((keys.numpy() - query[client]) ** 2).sum(axis=1), kind="stable")[:5]
            mine, goal = prompts.numpy()[rows], optimum[client % domains]
            _, pick = linear_sum_assignment(((mine[:, None] - goal[None]) ** 2).sum(axis=2))
            tuned = mine + 0.5 * (goal[pick] - mine) + 0.1 * rng.normal(size=mine.shape)
            sets.append(torch.tensor(tuned))
            addresses.append(torch.tensor(query[client]).repeat(5, 1))
            origins.append(torch.tensor(rows))
        result = PFPT.aggregate(sets, None, origins, prompts, addresses, state, previous_keys=keys)
        assert result.keys is not None
        prompts, keys, state = result.prompts, result.keys, result.state
        pool.append(len(prompts))
    return pool


@pytest.mark.parametrize("domains", [1, 4])
def test_pool_neither_collapses_nor_explodes_with_keys(domains: int) -> None:
    pool = federation(domains, 60)
    true = 5 * domains
    assert min(pool[5:]) >= 0.5 * true
    assert max(pool) <= 2 * true


def test_pool_neither_collapses_nor_explodes_without_keys() -> None:
    # 20 true prompts; each of 8 sampled clients out of 50 uses its own fixed 6 of them.
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20, 32))
    own = [rng.permutation(20)[:6] for _ in range(50)]
    previous, state, pool = None, None, []
    for _ in range(60):
        cohort = rng.permutation(50)[:8]
        sets = [torch.tensor(true[own[t]] + 0.3 * rng.normal(size=(6, 32))) for t in cohort]
        result = PFPT.aggregate(sets, previous=previous, state=state)
        previous, state = result.prompts, result.state
        pool.append(len(previous))
    assert min(pool[2:]) >= 10
    assert max(pool) <= 40
    error = torch.cdist(torch.tensor(true), previous).min(dim=1).values / math.sqrt(32)
    assert float(error.max()) < 0.3


def tuning_rounds(pool: int, rounds: int) -> tuple[list[Tensor], Array]:
    """The server's prompts after each round, and ten true ones that all clients move towards.

    Each of 20 clients (5 a round) picks for each of its six true prompts the nearest row of the
    pool, goes half way and adds a little noise.
    """
    rng = np.random.default_rng(0)
    true = rng.normal(size=(10, 32))
    own = [rng.permutation(10)[:6] for _ in range(20)]
    previous, state, history = torch.tensor(rng.normal(size=(pool, 32))), None, []
    for _ in range(rounds):
        sets, origins = [], []
        for client in rng.permutation(20)[:5]:
            cost = ((true[own[client]][:, None] - previous.numpy()[None]) ** 2).sum(axis=2)
            wanted, rows = linear_sum_assignment(cost)
            start = previous.numpy()[rows]
            goal = true[own[client]][wanted]
            tuned = start + 0.5 * (goal - start) + 0.05 * rng.normal(size=start.shape)
            sets.append(torch.tensor(tuned))
            origins.append(torch.tensor(rows))
        result = PFPT.aggregate(sets, origins=origins, previous=previous, state=state)
        previous, state = result.prompts, result.state
        history.append(previous)
    return history, true


def test_prompts_converge_over_rounds() -> None:
    history, true = tuning_rounds(pool=12, rounds=40)

    def step(late: int) -> float:
        """Mean distance from a round's prompts to the nearest of the round before."""
        return float(torch.cdist(history[late], history[late - 1]).min(dim=1).values.mean())

    assert step(39) < 0.2 * step(1)
    error = torch.cdist(torch.tensor(true), history[-1]).min(dim=1).values / math.sqrt(32)
    assert float(error.max()) < 0.05


def test_the_pool_shrinks_to_what_is_needed_over_rounds() -> None:
    history, _ = tuning_rounds(pool=40, rounds=40)
    sizes = [len(prompts) for prompts in history]
    assert sizes[0] >= 40
    assert 10 <= sizes[-1] <= 14
    assert sizes[-1] == min(sizes)


# Removal, bound, options.


def unused_rounds(patience: int) -> int:
    """After how many rounds an unused row disappears."""
    aggregator = aggregation.create("pfpt", patience=patience)
    rng = np.random.default_rng(0)
    previous, state = torch.tensor(10 * rng.normal(size=(3, 8))), None
    lonely = previous[1].clone()
    for round_index in range(1, 20):
        sets = [previous[[0, -1]] + 0.1 * torch.tensor(rng.normal(size=(2, 8))) for _ in range(3)]
        origins = [torch.tensor([0, len(previous) - 1])] * 3
        result = aggregator.aggregate(sets, origins=origins, previous=previous, state=state)
        previous, state = result.prompts, result.state
        if len(previous) == 2:
            assert result.diagnostics["pruned"] == 1.0
            return round_index
        assert torch.equal(previous[1], lonely)
        assert state["idle"].tolist() == [0, round_index, 0]
    raise AssertionError("the unused row was never removed")


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_patience_counts_rounds_without_use(patience: int) -> None:
    assert unused_rounds(patience) == patience


def test_a_round_without_prompts_changes_nothing() -> None:
    sets, keys, origins, start = keyed_clients()
    first = PFPT.aggregate(sets, origins=origins, previous=start, keys=keys)
    with torch.inference_mode():
        empty = PFPT.aggregate(
            [torch.empty(0, 32).double()] * 2, previous=first.prompts, state=first.state
        )
    assert torch.equal(empty.prompts, first.prompts)
    assert empty.state.keys() == first.state.keys()
    for name, tensor in first.state.items():
        assert torch.equal(empty.state[name], tensor)
        assert empty.state[name].data_ptr() != tensor.data_ptr() or tensor.numel() == 0


def test_keys_of_every_group_are_remembered() -> None:
    rng = np.random.default_rng(0)
    keys = [
        torch.tensor((10.0 if t < 9 else -10.0) + rng.normal(size=(1, 4))).repeat(2, 1)
        for t in range(12)
    ]
    sets = [torch.tensor(rng.normal(size=(2, 8))) for _ in keys]
    known = PFPT.aggregate(sets, keys=keys).state["known_keys"]
    # Before anything is seen a key is worth three: the discount rate is 1/3.
    assert [int((known[:, 0] > 0).sum()), int((known[:, 0] < 0).sum())] == [3, 3]


@pytest.mark.parametrize("shift", [3.0, 100.0])
def test_shifting_all_keys_changes_no_assignment(shift: float) -> None:
    sets, keys, origins, start = keyed_clients()
    plain = PFPT.aggregate(sets, origins=origins, previous=start, keys=keys)
    moved = PFPT.aggregate(
        sets, origins=origins, previous=start, keys=[key + shift for key in keys]
    )
    assert all(map(torch.equal, plain.assignment, moved.assignment))
    assert moved.diagnostics["key_noise"] == pytest.approx(plain.diagnostics["key_noise"])


@pytest.mark.parametrize("bound", [6, 8])
def test_max_prompts_bounds_the_pool(bound: int) -> None:
    _, sets, _ = planted(12, 8, 16, 0.1, 1.0, 0.5, 0)
    assert len(PFPT.aggregate(sets).prompts) == 12
    aggregator = aggregation.create("pfpt", max_prompts=bound)
    first = aggregator.aggregate(sets)
    again = aggregator.aggregate(sets, previous=first.prompts, state=first.state)
    for result in (first, again):
        assert len(result.prompts) <= bound
        for rows in result.assignment:
            assert len(set(rows.tolist())) == 6
    with pytest.raises(InputError, match=r"aggregator.max_prompts: expected at least 6, .* got 5"):
        aggregation.create("pfpt", max_prompts=5).aggregate(sets)


def test_the_state_stands_in_for_previous() -> None:
    sets, keys, origins, start = keyed_clients()
    first = PFPT.aggregate(sets, origins=origins, previous=start, keys=keys)
    assert first.keys is not None
    explicit = PFPT.aggregate(
        sets, previous=first.prompts, keys=keys, state=first.state, previous_keys=first.keys
    )
    implicit = PFPT.aggregate(sets, keys=keys, state=first.state)
    assert torch.equal(explicit.prompts, implicit.prompts)
    assert explicit.diagnostics["kept"] == len(first.prompts)
    with pytest.raises(InputError, match=r"state 'strength': expected shape \(5,\), got \(10,\)"):
        PFPT.aggregate(sets, previous=start, state=first.state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "aggregator.patience: expected an integer >= 1, got 0"),
        ({"patience": 1.5}, "aggregator.patience: expected an integer >= 1, got 1.5"),
        ({"max_prompts": -1}, "aggregator.max_prompts: expected an integer >= 0, got -1"),
        ({"key_weight": -1}, "aggregator.key_weight: expected a finite number >= 0, got -1"),
        ({"gamma": 0}, "aggregator.gamma: expected a finite number > 0, got 0"),
        (
            {"origin_odds": math.nan},
            "aggregator.origin_odds: expected a finite number > 0, got nan",
        ),
        (
            {"variant": "mapp"},
            "aggregator.variant: expected one of map, paper, released, got 'mapp'; did you mean",
        ),
        ({"loops": 0}, "aggregator.loops: expected an integer >= 1, got 0"),
        ({"memory": "x"}, "aggregator.memory: expected a finite number >= 0, got 'x'"),
        ({"shrink": 1}, "aggregator.shrink: expected true or false, got 1"),
        (
            {"parameterisation": "neural"},
            "aggregator.parameterisation: expected empirical with variant=map, got neural; the "
            "paper's networks are in aggregator.variant=paper",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        aggregation.create("pfpt", **options)
    aggregation.create("pfpt", variant="paper", parameterisation="neural")


def test_the_weight_of_keys_depends_on_neither_dimension() -> None:
    sets, keys, origins, start = keyed_clients()
    centre = torch.cat(keys).mean(dim=0)

    def pools(prompt_copies: int, key_copies: int) -> list[int]:
        """Pool sizes while the domains' keys move apart; coordinates are repeated."""
        sizes = []
        for step in np.linspace(0.0, 1.0, 11):
            apart = [
                key + (step - 1) * (torch.stack(keys[t % 2 :: 2]).mean(dim=(0, 1)) - centre)
                for t, key in enumerate(keys)
            ]
            result = aggregation.create("pfpt", key_weight=0.5).aggregate(
                [prompts.repeat(1, prompt_copies) for prompts in sets],
                origins=origins,
                previous=start.repeat(1, prompt_copies),
                keys=[(key - centre).repeat(1, key_copies) for key in apart],
            )
            sizes.append(len(result.prompts))
        return sizes

    plain = pools(1, 1)
    assert plain[0] == 5
    assert plain[-1] == 10
    assert pools(1, 8) == plain
    assert pools(8, 1) == plain
