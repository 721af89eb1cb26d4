"""Groups among keys whose spread within clients is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import invgamma, multivariate_normal
from sklearn.metrics import adjusted_rand_score

from fedprompt import aggregation
from fedprompt.aggregation.pfpt.map.key_noise import MOST_OTHERS, infer_key_noise
from fedprompt.aggregation.pfpt.map.metric_groups import (
    evidence,
    likeliest_groups,
    place,
    threshold_factor,
)
from fedprompt.aggregation.pfpt.map.partitions import RATIOS
from fedprompt.core.errors import InputError

WIDTH, GROUPS, EACH, IMAGES = 120, 5, 8, 40


def planted(seed: int, apart: float = 4.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean queries (40, WIDTH) of clients of five groups, whose group each is, and the metric.

    In the metric an image has unit noise, and two groups lie `apart`. Outside it noise is up to
    hundred times as wide in some directions as in others, so that the plain distance shows little.
    """
    draws = np.random.default_rng(seed)
    factor = np.linalg.qr(draws.normal(size=(WIDTH, WIDTH)))[0] * np.geomspace(1, 100, WIDTH)
    centres = np.zeros((GROUPS, WIDTH))
    centres[np.arange(GROUPS), np.arange(GROUPS)] = apart / math.sqrt(2)
    label = np.repeat(np.arange(GROUPS), EACH)
    keys = centres[label] + draws.normal(size=(GROUPS * EACH, WIDTH)) / math.sqrt(IMAGES)
    return keys @ factor.T, label, np.linalg.inv(factor).T


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_found_in_the_metric_where_the_plain_distance_finds_none(seed: int) -> None:
    keys, label, metric = planted(seed)
    owner = np.arange(len(keys))
    found = infer_key_noise(keys, owner, metric=metric)
    assert found.groups == GROUPS
    assert adjusted_rand_score(label, found.labels) == 1.0
    assert found.placement is not None
    assert found.placement.matrix.shape == (WIDTH, GROUPS - 1)
    # The noise of a mean of 40 images; 35 degrees of freedom in each of 4 directions.
    assert found.variance == pytest.approx(1 / IMAGES, rel=0.35)
    assert adjusted_rand_score(label, infer_key_noise(keys, owner).labels) < 0.5


def test_memory_and_cohort_are_grouped_together_and_kept_as_they_are() -> None:
    keys, label, metric = planted(0)
    first, second = np.arange(0, 40, 2), np.arange(1, 40, 2)
    before = infer_key_noise(keys[first], np.arange(20), metric=metric)
    after = infer_key_noise(keys[second], np.arange(20), before.memory, metric)
    assert {tuple(row) for row in after.memory} == {tuple(row) for row in keys}
    assert adjusted_rand_score(label[second], after.labels) == 1.0
    # A client that comes again is known, and counted once.
    again = infer_key_noise(keys[second], np.arange(20), after.memory, metric)
    assert len(again.memory) == 40


def test_one_domain_is_one_group() -> None:
    keys, _, metric = planted(1, apart=0.0)
    found = infer_key_noise(keys, np.arange(len(keys)), metric=metric)
    assert found.groups == 1
    assert found.between == found.variance > 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_clients_are_no_obstacle(count: int) -> None:
    keys, _, metric = planted(2)
    found = infer_key_noise(keys[:count], np.arange(count), metric=metric)
    assert found.labels.shape == (count,)
    assert np.isfinite(found.placed(keys)).all()


@pytest.mark.parametrize("count", [8, 20, 70])
def test_clients_whose_keys_are_equal_up_to_rounding_show_no_further_directions(count: int) -> None:
    """Two places, each with half of the clients: what is left between them is rounding."""
    for seed in range(5):
        draws = np.random.default_rng(seed)
        centres, label = 3 * draws.normal(size=(2, 40)), np.arange(count) % 2
        found = infer_key_noise(centres[label], np.arange(count), metric=np.eye(40))
        assert adjusted_rand_score(label, found.labels) == 1.0
        assert found.placement is not None
        assert found.placement.matrix.shape == (40, 1)
        assert found.placement.noise > 0


@pytest.mark.parametrize("beta", [0.05, 0.2, 0.5, 1.0])
def test_the_threshold_is_the_optimal_one_over_the_median(beta: float) -> None:
    """Gavish and Donoho 2014, Eq. 11 over the root of the Marchenko-Pastur law's median."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def density(t: float) -> float:
        return math.sqrt(max((high - t) * (t - low), 0.0)) / (2 * math.pi * beta * t)

    left, right = low, high
    for _ in range(40):
        middle = (left + right) / 2
        below = quad(density, low, middle, limit=200)[0] < 0.5
        left, right = (middle, right) if below else (left, middle)
    exact = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    assert threshold_factor(beta) == pytest.approx(exact / math.sqrt(left), abs=0.02)


def test_noise_alone_shows_one_direction_and_its_own_variance() -> None:
    draws = np.random.default_rng(0)
    placement = place(draws.normal(size=(40, 300)) * 3.0, np.eye(300))
    assert placement.matrix.shape == (300, 1)
    assert placement.noise == pytest.approx(9.0, rel=0.05)


def test_evidence_is_the_integral_over_means_and_covariance() -> None:
    """In one direction, against a sum over grids of mu and Sigma; each group's key integrated out:
    its members are jointly normal with covariance Sigma (I + r 1 1^T).
    """
    points, noise = np.array([-1.0, -0.8, 0.9, 1.3]), 0.1
    mus, variances = np.linspace(-30, 30, 1201), np.geomspace(1e-3, 1e3, 400)
    prior = invgamma(1.5, scale=noise / 2).pdf(variances) * np.gradient(variances)

    def marginal(labels: np.ndarray, ratio: float) -> float:
        logs = np.zeros((len(variances), len(mus)))
        for group in np.unique(labels):
            own = points[labels == group]
            shape = np.eye(len(own)) + ratio
            for row, variance in enumerate(variances):
                law = multivariate_normal(np.zeros(len(own)), variance * shape)
                logs[row] += law.logpdf(own - mus[:, None])
        return float((np.exp(logs).sum(axis=1) * prior).sum() * (mus[1] - mus[0]))

    one, two = np.zeros(4, dtype=np.int64), np.array([0, 0, 1, 1])
    near = RATIOS[RATIOS < 30]  # mu's grid is wide enough for these
    ratio = np.mean([marginal(two, r) for r in near]) / marginal(one, 0.0)
    # Chinese restaurant: 1! 1! / 4! against 3! / 4!.
    expected = math.log(ratio) + math.log(1 / 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedprompt.aggregation.pfpt.map.metric_groups.RATIOS", near)
        found = evidence(points[:, None], two, noise) - evidence(points[:, None], one, noise)
    assert found == pytest.approx(expected, abs=0.01)


def test_stretching_the_space_changes_no_comparison_of_partitions() -> None:
    """Of three partitions; the trace of the scatter would prefer another one after the stretch."""
    points = np.random.default_rng(0).normal(size=(24, 2)) + np.repeat([[0, 0], [4, 0]], 12, 0)
    stretch = np.array([[0.1, 0.0], [0.3, 20.0]])
    partitions = [np.arange(24) // size for size in (24, 12, 6)]
    before = [evidence(points, labels, 1e-9) for labels in partitions]
    after = [evidence(points @ stretch, labels, 1e-9) for labels in partitions]
    np.testing.assert_allclose(np.diff(after), np.diff(before), atol=1e-4)
    assert np.argmax(before) == 1


def test_groups_that_an_image_cannot_tell_apart_are_one() -> None:
    """Sixteen clients each around 0, 1.2 and 9: three groups for sure, two for an image."""
    draws = np.random.default_rng(0)
    points = np.repeat([[0.0], [1.2], [9.0]], 16, axis=0) + 0.05 * draws.normal(size=(48, 1))
    found = likeliest_groups(points, 0.05**2)
    np.testing.assert_array_equal(found.labels, np.repeat([0, 0, 1], 16))
    three = np.repeat([0, 1, 2], 16)
    assert evidence(points, three, 0.05**2) > evidence(points, found.labels, 0.05**2)


def test_clients_of_other_rounds_count_and_their_order_does_not() -> None:
    """Four clients of a round beside 36 others, whose keys the server has kept, or beside 400."""
    keys, _, metric = planted(0)
    cohort, rest = np.array([0, 7, 8, 31]), np.setdiff1d(np.arange(40), [0, 7, 8, 31])
    owner = np.arange(4)
    one = infer_key_noise(keys[cohort], owner, metric=metric, others=keys[rest])
    whole = infer_key_noise(keys, np.arange(40), metric=metric)
    assert one.groups == whole.groups == GROUPS
    assert [one.labels[0] == one.labels[k] for k in (1, 2, 3)] == [True, False, False]
    assert len(one.memory) == len(one.memory_labels) == 0
    turned = infer_key_noise(keys[cohort], owner, metric=metric, others=keys[rest[::-1]])
    assert np.array_equal(one.centres, turned.centres)
    assert np.array_equal(one.labels, turned.labels)
    # None of them is taken for a client that is here, however near it is.
    near = infer_key_noise(keys[cohort], owner, metric=metric, others=keys[cohort] + 1e-6)
    assert len(near.labels) == 4
    many = np.concatenate([planted(seed)[0] for seed in range(10)])
    assert len(many) > MOST_OTHERS
    assert len(infer_key_noise(keys[cohort], owner, metric=metric, others=many).labels) == 4


def inputs(seed: int) -> tuple[dict[str, object], np.ndarray]:
    """Prompts that are alike at all clients, with keys that are not."""
    keys, label, metric = planted(seed)
    draws = torch.Generator().manual_seed(seed)
    truth = torch.randn(2, 16, generator=draws)
    sets = [truth + 0.3 * torch.randn(2, 16, generator=draws) for _ in keys]
    given = {
        "prompt_sets": sets,
        "origins": [torch.tensor([0, 1])] * len(keys),
        "previous": truth,
        "previous_keys": torch.zeros(2, WIDTH, dtype=torch.float64),
        "keys": [torch.from_numpy(key).expand(2, -1) for key in keys],
        "metric": torch.from_numpy(metric),
    }
    return given, label


def test_pfpt_keeps_groups_apart_and_returns_keys_as_clients_send_them() -> None:
    given, label = inputs(0)
    found = aggregation.create("pfpt").aggregate(**given)  # type: ignore[arg-type]
    assert len(found.prompts) == 2 * GROUPS
    assert found.diagnostics["key_groups"] == GROUPS
    assert found.keys is not None
    keys = np.stack([key[0].numpy() for key in given["keys"]])  # type: ignore[attr-defined]
    for group in range(GROUPS):
        rows = {int(row) for t in np.flatnonzero(label == group) for row in found.assignment[t]}
        assert len(rows) == 2
        mean = keys[label == group].mean(axis=0)
        for row in rows:
            np.testing.assert_allclose(found.keys[row].numpy(), mean, rtol=1e-9)


def test_the_order_of_clients_changes_no_bit_and_units_change_nothing() -> None:
    given, _ = inputs(1)
    order = np.random.default_rng(0).permutation(len(given["prompt_sets"]))  # type: ignore[arg-type]
    moved = {
        name: [given[name][i] for i in order]  # type: ignore[index]
        for name in ("prompt_sets", "origins", "keys")
    }
    pfpt = aggregation.create("pfpt")
    one = pfpt.aggregate(**given)  # type: ignore[arg-type]
    two = pfpt.aggregate(**{**given, **moved})  # type: ignore[arg-type]
    assert torch.equal(one.prompts, two.prompts)
    assert all(torch.equal(one.assignment[i], two.assignment[k]) for k, i in enumerate(order))
    assert one.state.keys() == two.state.keys()
    assert all(torch.equal(one.state[name], two.state[name]) for name in one.state)
    halved = {
        "keys": [key / 2 for key in given["keys"]],  # type: ignore[attr-defined]
        "metric": given["metric"] * 2,  # type: ignore[operator]
    }
    three = pfpt.aggregate(**{**given, **halved})  # type: ignore[arg-type]
    assert all(map(torch.equal, one.assignment, three.assignment))


def test_a_metric_of_another_shape_is_refused() -> None:
    given, _ = inputs(0)
    for wrong, match in (
        (torch.eye(3), rf"metric: expected dimension {WIDTH} as in client 0, got 3"),
        (torch.zeros(2, WIDTH), "metric: expected a square matrix"),
        (torch.full((WIDTH, WIDTH), torch.nan), "metric: expected finite values"),
    ):
        with pytest.raises(InputError, match=match):
            aggregation.create("pfpt").aggregate(**{**given, "metric": wrong})  # type: ignore[arg-type]
