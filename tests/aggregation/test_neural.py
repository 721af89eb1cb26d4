"""The paper's networks inside `map`: scores and evidence against slow loops, training, state."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import adjusted_rand_score

from fedprompt import aggregation
from fedprompt.aggregation.beta_bernoulli import BetaBernoulliModel, Block, Inclusion
from fedprompt.aggregation.matching import Columns, climb, in_order
from fedprompt.aggregation.nets import PromptNets
from fedprompt.aggregation.neural import (
    RANGE,
    NeuralBlock,
    NeuralModel,
    neural_model,
    refine,
    train,
)
from fedprompt.core.errors import InputError

Array = NDArray[np.float64]
D = 3


def placed_columns(seed: int) -> tuple[Columns, Block, list[slice]]:
    """Three clients with two, three and two prompts; two remembered columns."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(7, D))
    owner = np.repeat(np.arange(3), [2, 3, 2])
    spans = [slice(0, 2), slice(2, 5), slice(5, 7)]
    strength = np.array([0.8, 2.0])
    columns = Columns(np.concatenate([values, values**2], axis=1), owner, strength)
    for rows, targets in zip(spans, ([0, 3], [0, 1, 3], [1, 4]), strict=True):
        columns.place(rows, np.array(targets))
    block = Block(slice(0, D), 0.7, 2.5, 0.6, rng.normal(size=(2, D)), strength)
    return columns, block, spans


def neural(block: Block, ratio: Array) -> NeuralBlock:
    fields = {field.name: getattr(block, field.name) for field in dataclasses.fields(Block)}
    return NeuralBlock(**fields, squares=slice(D, 2 * D), ratio=ratio)


def slow_evidence(columns: Columns, block: NeuralBlock, column: int) -> float:
    """Joint Gaussian of a column's members, coordinate by coordinate, by scipy."""
    members, value = np.flatnonzero(columns.assignment == column), 0.0
    for axis in range(D):
        noise, precision, mean = block.noise * block.ratio[column, axis], 1 / block.base, 0.0
        if column < columns.num_remembered:
            precision += block.strength[column] / noise
            mean = block.strength[column] / noise * block.prior_mean[column, axis] / precision
        covariance = noise * np.eye(len(members)) + 1 / precision
        normal = stats.multivariate_normal(np.full(len(members), mean), covariance)
        value += float(normal.logpdf(columns.points[members, axis]))
    return block.power * value


@pytest.mark.parametrize("seed", range(3))
def test_evidence_and_scores_equal_a_slow_loop(seed: int) -> None:
    columns, plain, spans = placed_columns(seed)
    ratio = np.random.default_rng(seed).uniform(0.3, 3, size=(len(columns.counts), D))
    block = neural(plain, ratio)
    live = columns.live()
    expected = [slow_evidence(columns, block, int(column)) for column in live]
    np.testing.assert_allclose(block.evidence(columns, live), expected, rtol=1e-9)
    joined = block.joined(columns, np.array([4]), np.array([3]))[0, 0]
    moved = columns.copy()
    moved.remove(slice(6, 7))
    moved.place(slice(6, 7), np.array([3]))
    assert joined == pytest.approx(slow_evidence(moved, block, 3), rel=1e-9)
    columns.remove(spans[2])
    before = block.evidence(columns, live)
    scores = block.match_scores(columns, slice(5, 6), live)[0]
    for i, column in enumerate(live):
        columns.place(slice(5, 6), np.array([column]))
        gain = block.evidence(columns, live)[i] - before[i]
        columns.remove(slice(5, 6))
        if columns.counts[column] or column < 2:
            assert scores[i] == pytest.approx(gain, rel=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_equal_variances_are_the_plain_block(seed: int) -> None:
    columns, plain, _ = placed_columns(seed)
    block = neural(plain, np.ones((len(columns.counts), D)))
    live = columns.live()
    total = plain.evidence(columns, live).sum() + plain.of_points(columns.points)
    assert block.evidence(columns, live).sum() + block.of_points(columns.points) == pytest.approx(
        total, rel=1e-10
    )
    rows = slice(0, 2)
    np.testing.assert_allclose(
        block.match_scores(columns, rows, live), plain.match_scores(columns, rows, live), rtol=1e-9
    )


def searched(seed: int = 0) -> tuple[BetaBernoulliModel, Columns, list[slice]]:
    """Six clients with noisy copies of four prompts, of which two coordinates are much noisier."""
    rng = np.random.default_rng(seed)
    true, noise = rng.normal(size=(4, 16)), np.where(np.arange(16) < 2, 0.6, 0.2)
    points = np.concatenate([true + noise * rng.normal(size=(4, 16)) for _ in range(6)])
    points -= points.mean(axis=0)
    spans = [slice(4 * t, 4 * t + 4) for t in range(6)]
    block = Block(slice(0, 16), 0.1, 0.9, 1.0, np.zeros((0, 16)), np.zeros(0), total=1.0)
    model = BetaBernoulliModel(block, None, Inclusion.indian_buffet(1.0), 6)
    return model, Columns(points, np.repeat(np.arange(6), 4), np.zeros(0)), spans


def test_refining_never_lowers_the_objective_and_learns_the_variances() -> None:
    model, columns, spans = searched()
    found = climb(in_order(columns, model, spans), spans, model, 50)
    nets = PromptNets(16, 32, torch.Generator().manual_seed(0), torch.float64)
    end = refine(found, nets, 200, 1e-2, 50)
    assert all(b >= a for a, b in itertools.pairwise(end.history))
    assert isinstance(end.model, NeuralModel)
    assert end.objective == pytest.approx(end.model.objective(end.columns))
    ratio = end.model.prompts.ratio[end.columns.live()].mean(axis=0)
    assert ratio[:2].min() > 2 * ratio[2:].max()
    assert 1 / RANGE <= ratio.min() <= ratio.max() <= RANGE
    assert end.model.probability[end.columns.live()].min() > 0.9  # all clients use all prompts


def test_training_raises_the_likelihood_and_the_price_counts_unused_clients() -> None:
    model, columns, spans = searched(1)
    found = climb(in_order(columns, model, spans), spans, model, 50)
    assert isinstance(found.model, BetaBernoulliModel)
    wide = Columns(
        np.concatenate([found.columns.points, found.columns.points**2], axis=1),
        columns.owner,
        np.zeros(0),
    )
    for rows in spans:
        wide.place(rows, found.columns.assignment[rows])
    nets = PromptNets(16, 32, torch.Generator().manual_seed(0), torch.float64)
    before = neural_model(nets, wide, found.model)
    train(nets, wide, found.model, 100, 1e-2)
    after = neural_model(nets, wide, found.model)
    assert after.objective(wide) > before.objective(wide)
    p, number = after.usual, after.expected
    assert after.price() == pytest.approx(math.log(number * p * (1 - p) ** 5))


def test_the_networks_travel_in_the_state() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(5, 8))
    sets = [torch.tensor(true[rng.permutation(5)] + 0.2 * rng.normal(size=(5, 8))) for _ in "abcd"]
    aggregator = aggregation.create("pfpt", parameterisation="neural", net_hidden=4)
    first = aggregator.aggregate(sets, generator=torch.Generator().manual_seed(1))
    second = aggregator.aggregate(sets, state=first.state)
    assert len(second.prompts) == 5
    name = "variance_net.0.weight"
    assert first.state[name].shape == (4, 8)
    assert not torch.equal(first.state[name], second.state[name])
    fresh = aggregator.aggregate(sets, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(first.state[name], fresh.state[name])
    wider = aggregation.create("pfpt", parameterisation="neural", net_hidden=5)
    with pytest.raises(InputError, match=r"variance_net.0.weight.*\(5, 8\), got \(4, 8\)"):
        wider.aggregate(sets, state=first.state)
    labels = torch.cat(first.assignment).numpy()
    plain = torch.cat(aggregation.create("pfpt").aggregate(sets).assignment).numpy()
    assert adjusted_rand_score(labels, plain) == 1.0
