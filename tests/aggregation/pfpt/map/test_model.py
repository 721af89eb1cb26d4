"""The model of `map`: scores and objective against slow loops written from the equations."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from planting import BUFFET, Array, random_columns
from scipy import stats

from fedprompt.aggregation.pfpt.map.blocks import KeyBlock, fit_noise
from fedprompt.aggregation.pfpt.map.columns import Columns
from fedprompt.aggregation.pfpt.map.inclusion import Inclusion, fit_inclusion
from fedprompt.aggregation.pfpt.map.model import BetaBernoulliModel

FITTED = Inclusion(0.7, 2.1, math.log(4.0), 1.3)


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
