"""The inferred key noise against pencil and paper, invariances, edge cases and planted groups."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from fedprompt.aggregation.pfpt.map.key_noise import (
    MEMORY_SIZE,
    KeyNoise,
    infer_key_noise,
)
from fedprompt.aggregation.pfpt.map.partitions import effective_dimension, evened

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def one_key_each(keys: Array, memory: Array | None = None) -> KeyNoise:
    return infer_key_noise(keys, np.arange(len(keys)), memory)


def planted(
    groups: int, q: int, ratio: float, number: int, seed: int, rank: int = 0
) -> tuple[Array, Indices]:
    """Groups at N(0, I) with noise `ratio` times as wide, in a subspace of `rank` dimensions."""
    rng = np.random.default_rng(seed)
    label = np.concatenate([np.arange(groups), rng.integers(0, groups, number - groups)])
    noise = rng.normal(size=(number, q))
    if rank:
        noise = rng.normal(size=(number, rank)) @ rng.normal(size=(rank, q)) / math.sqrt(rank)
    return rng.normal(size=(groups, q))[label] + ratio * noise, label


# By hand.


def test_variance_is_the_pooled_variance_within_groups() -> None:
    # Groups (0,0) (2,0) (0,2) (2,2), W = 8 about (1,1), and the same at a distance of 100:
    # W / (q (n - K)) = 16 / (2 * 6).
    square = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    result = one_key_each(np.concatenate([square, square + 100.0]))
    assert result.groups == 2
    assert result.variance == pytest.approx(16 / 12)
    assert result.effective_dimension == pytest.approx(2.0)
    np.testing.assert_array_equal(result.labels, [0, 0, 0, 0, 1, 1, 1, 1])


def test_one_group_has_the_sample_variance() -> None:
    result = one_key_each(np.arange(5.0)[:, None])
    assert (result.groups, result.variance) == (1, pytest.approx(2.5))
    assert result.between == result.variance


def test_two_clients_cannot_tell_noise_from_groups() -> None:
    result = one_key_each(np.array([[0.0, 0.0], [4.0, 0.0]]))
    assert (result.groups, result.variance) == (1, pytest.approx(8 / 2))


def test_equal_keys_of_a_client_are_one_observation_and_of_two_clients_two() -> None:
    keys = np.array([[0.0], [0.0], [0.0], [1.0], [2.0]])
    result = infer_key_noise(keys, np.array([0, 0, 0, 1, 2]))
    assert result.variance == pytest.approx(1.0)
    assert len(result.memory) == 3
    # Three clients with exactly one key are a group without spread.
    assert (one_key_each(keys).variance, len(one_key_each(keys).memory)) == (0.0, 5)


def test_effective_dimension_of_a_line_a_sphere_and_nothing() -> None:
    line = np.array([[1.0, 2.0, 2.0]]) * np.array([[-1.0], [0.0], [1.0]])
    assert effective_dimension(line) == pytest.approx(1.0)
    assert effective_dimension(np.concatenate([np.eye(3), -np.eye(3)])) == pytest.approx(3.0)
    # Spectrum 4, 1: 25 / 17.
    ellipse = np.array([[2.0, 0.0], [0.0, 1.0]])
    assert effective_dimension(ellipse) == pytest.approx(25 / 17)
    assert effective_dimension(np.zeros((3, 2))) == 1.0


def test_evened_coordinates_measure_distance_by_the_shrunk_covariance() -> None:
    """Against C itself: equal distances (x - y)^T C^-1 (x - y), up to one factor for all pairs."""
    keys, label = planted(2, 5, 0.4, 12, seed=0, rank=2)
    residuals = np.concatenate([keys[label == g] - keys[label == g].mean(axis=0) for g in (0, 1)])
    freedom, q = 10, 5
    raw = residuals.T @ residuals / freedom
    square, trace = np.trace(raw @ raw), np.trace(raw)
    share = (1 - 2 / q) * square + trace**2  # Chen et al. 2010
    share /= (freedom + 1 - 2 / q) * (square - trace**2 / q)
    assert 0.1 < share < 0.9
    inverse = np.linalg.inv((1 - share) * raw + share * trace / q * np.eye(q))
    apart, even = keys - keys[0], evened(keys, label)
    expected = np.einsum("ni,ij,nj->n", apart, inverse, apart)[1:]
    ratio = ((even - even[0]) ** 2).sum(axis=1)[1:] / expected
    np.testing.assert_allclose(ratio, ratio[0])


def test_nothing_is_evened_where_no_spread_is_seen() -> None:
    keys = np.repeat(np.eye(3), 4, axis=0)
    for label in (np.repeat(np.arange(3), 4), np.arange(12)):  # equal keys; a group for each key
        np.testing.assert_array_equal(evened(keys, label), keys)
    line = np.array([[0.0], [1.0], [5.0], [6.0]])  # one direction is even in itself
    np.testing.assert_array_equal(evened(line, np.array([0, 0, 1, 1])), line)


def test_the_variance_between_groups_is_that_of_their_means_without_noise() -> None:
    # Means 1 and 101: variance 5000; their noise is 1/2 * (1/3 + 1/3) of tau^2 = 1.
    result = one_key_each(np.array([[0.0], [1.0], [2.0], [100.0], [101.0], [102.0]]))
    assert result.between == pytest.approx(5000 - 1 / 3)


# Memory.


def test_memory_holds_each_key_once_latest_first() -> None:
    first = one_key_each(np.array([[0.0], [3.0], [7.0]]))
    np.testing.assert_array_equal(first.memory, [[0.0], [3.0], [7.0]])
    second = one_key_each(np.array([[3.0], [20.0]]), first.memory[[0, 2]])
    # 0 is 3 away from 3, nearer than the two new clients are to each other: the same client.
    np.testing.assert_array_equal(second.memory, [[3.0], [20.0]])
    third = one_key_each(np.array([[3.0], [4.0]]), np.array([[0.0], [3.0], [7.0]]))
    np.testing.assert_array_equal(third.memory, [[3.0], [4.0], [0.0], [7.0]])


def test_memory_counts_as_clients() -> None:
    half = one_key_each(np.array([[0.0], [1.0]]), np.array([[3.0], [4.5]]))
    whole = one_key_each(np.array([[0.0], [1.0], [3.0], [4.5]]))
    assert half.variance == pytest.approx(whole.variance)
    assert half.groups == whole.groups


def test_memory_is_bounded_and_not_the_callers() -> None:
    keys = np.random.default_rng(0).normal(size=(100, 3))
    result = one_key_each(keys)
    assert result.memory.shape == (MEMORY_SIZE, 3)
    assert not np.shares_memory(result.memory, keys)
    later = one_key_each(keys[:5], result.memory)
    assert len(later.memory) == MEMORY_SIZE
    assert not np.shares_memory(later.memory, result.memory)


def test_clients_that_return_do_not_become_groups() -> None:
    """Without recognising them, noisy copies of 20 clients would be 20 groups of no spread."""
    rng = np.random.default_rng(3)
    clients = rng.normal(size=(20, 5)) @ rng.normal(size=(5, 32))
    for noise in (0.0, 0.1):
        memory, variances = None, []
        for _ in range(30):
            cohort = clients[rng.permutation(20)[:10]]
            cohort = cohort + noise * rng.normal(size=cohort.shape)
            result = one_key_each(cohort, memory)
            memory = result.memory
            variances.append(result.variance)
        true = float(clients.var(axis=0, ddof=1).mean()) + noise**2
        assert result.groups == 1
        assert 0.7 < variances[-1] / true < 1.4


def test_memory_tells_groups_that_a_cohort_cannot() -> None:
    keys, label = planted(8, 64, 0.3, 40, seed=1)
    rng = np.random.default_rng(1)
    memory, found = None, []
    for _ in range(12):
        pick = rng.permutation(40)[:8]
        result = one_key_each(keys[pick], memory)
        memory = result.memory
        found.append((result, label[pick]))
    last, truth = found[-1]
    assert last.variance == pytest.approx(0.09, rel=0.25)
    assert adjusted_rand_score(truth, last.labels) == 1.0


# Invariances.


def test_order_of_rows_and_names_of_clients_are_irrelevant_to_the_last_bit() -> None:
    keys, _ = planted(3, 6, 0.3, 24, seed=2)
    owner = np.repeat(np.arange(12), 2)
    memory = keys[:6] + 0.5
    rng = np.random.default_rng(0)
    order, names = rng.permutation(24), rng.permutation(12)
    one = infer_key_noise(keys, owner, memory)
    other = infer_key_noise(keys[order], names[owner[order]], memory)
    assert (one.variance, one.between, one.effective_dimension, one.groups) == (
        *(other.variance, other.between, other.effective_dimension, other.groups),
    )
    np.testing.assert_array_equal(one.labels[order], other.labels)
    np.testing.assert_array_equal(one.memory, other.memory)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("shift", [0.0, 1.0, -30.0])
def test_shift_and_scale_only_shift_and_scale(scale: float, shift: float) -> None:
    keys, _ = planted(4, 16, 0.2, 30, seed=4, rank=3)
    memory = keys[10:]
    one = one_key_each(keys[:10], memory)
    other = one_key_each((keys[:10] + shift) * scale, (memory + shift) * scale)
    assert one.groups == other.groups == 4
    assert other.variance == pytest.approx(one.variance * scale**2)
    assert other.between == pytest.approx(one.between * scale**2)
    assert other.effective_dimension == pytest.approx(one.effective_dimension)
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_allclose(other.memory, (one.memory + shift) * scale, rtol=1e-9)


def test_inputs_stay_unchanged() -> None:
    keys, _ = planted(2, 4, 0.2, 12, seed=0)
    before, memory = keys.copy(), keys[:3] + 1
    memory_before = memory.copy()
    infer_key_noise(keys, np.arange(12), memory)
    np.testing.assert_array_equal(keys, before)
    np.testing.assert_array_equal(memory, memory_before)


# Edge cases.


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30])
@pytest.mark.parametrize("number", [1, 2, 1000])
def test_all_keys_equal(value: float, number: int) -> None:
    result = one_key_each(np.full((number, 7), value))
    assert (result.variance, result.between, result.groups) == (0.0, 0.0, 1)
    assert result.effective_dimension == 1.0


def test_groups_of_equal_keys_have_no_variance() -> None:
    result = one_key_each(np.repeat(np.eye(3), 5, axis=0))
    assert (result.groups, result.variance) == (3, 0.0)
    # Per coordinate, the values 1, 0, 0 of three groups: 1/3.
    assert result.between == pytest.approx(1 / 3)


def test_one_client_with_and_without_memory() -> None:
    alone = infer_key_noise(np.ones((5, 2)), np.zeros(5, dtype=np.int64))
    assert (alone.variance, alone.groups, len(alone.memory)) == (0.0, 1, 1)
    keys, _ = planted(1, 2, 1.0, 20, seed=0)
    assert one_key_each(keys[:1], keys[1:]).variance == pytest.approx(one_key_each(keys).variance)


@pytest.mark.parametrize("empty", [None, np.empty((0, 3))])
def test_an_empty_memory_is_none(empty: Array | None) -> None:
    keys = np.random.default_rng(0).normal(size=(6, 3))
    assert one_key_each(keys, empty).variance == one_key_each(keys).variance


def test_results_are_finite_for_extreme_keys() -> None:
    rng = np.random.default_rng(0)
    for keys in (
        rng.normal(size=(10, 4)) * 10.0 ** rng.integers(-30, 30, size=(10, 1)),
        np.array([[0.0], [1e-30], [1e30]]),
        np.array([[1.0], [1.0 + 2**-52], [1.0 + 2**-51]]),
    ):
        result = one_key_each(keys)
        assert math.isfinite(result.variance)
        assert math.isfinite(result.between)
        assert 1 <= result.effective_dimension <= keys.shape[1] + 1e-9


# Recovery.


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("q", [32, 128])
def test_planted_groups_and_their_noise_are_recovered(q: int, groups: int, rank: int) -> None:
    for seed in range(3):
        keys, label = planted(groups, q, 0.3, 40, seed, rank)
        result = one_key_each(keys)
        # A group of few clients may come apart in a subspace; the noise hardly changes then.
        assert adjusted_rand_score(label, result.labels) > 0.9
        true = 0.09
        if rank:  # the drawn subspace's own variance
            residual = keys - np.stack([keys[label == g].mean(axis=0) for g in label])
            true = float((residual**2).sum()) / (q * (40 - groups))
        assert result.variance == pytest.approx(true, rel=0.2)


def test_one_wide_group_is_not_split() -> None:
    """Whatever the shape of its scatter; small cohorts are where chance makes clusters."""
    for seed in range(10):
        for rank in (0, 3, 10):
            keys, _ = planted(1, 64, 1.0, 10, seed, rank)
            assert one_key_each(keys).groups == 1


@pytest.mark.parametrize("noise", [0.3, 0.5])
def test_members_far_out_where_all_spread_are_no_group(noise: float) -> None:
    """Of ten a group, chance puts two or three far out together in the two directions there are.

    Where every direction counts alike, 6 and 9 of the ten worlds have groups too many.
    """
    found = []
    for seed in range(10):
        keys, label = planted(4, 64, noise, 40, seed, rank=2)
        found.append(adjusted_rand_score(label, one_key_each(keys).labels))
    assert sum(score == 1 for score in found) >= 9
    assert min(found) > 0.9


def test_a_thousand_clients_are_fast() -> None:
    rng = np.random.default_rng(0)
    keys = np.repeat(rng.normal(size=(1000, 128)), 20, axis=0)
    keys += 5 * np.repeat(rng.normal(size=(8, 128)), 2500, axis=0)
    owner = np.repeat(np.arange(1000), 20)
    started = time.process_time()
    result = infer_key_noise(keys, owner, rng.normal(size=(MEMORY_SIZE, 128)))
    assert time.process_time() - started < 3  # 0.15 s; other programs do not count
    assert result.groups >= 8
    assert result.variance == pytest.approx(1.0, rel=0.05)
