"""Partitioners: nothing lost, nothing repeated, equal to the released code."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprompt.data import partition
from fedprompt.errors import ConfigError

REFERENCE = Path(
    os.environ.get("FEDPROMPT_REFERENCE_DIR", Path(__file__).parents[2] / "shared" / "reference")
)


@given(
    alpha=st.sampled_from([0.1, 0.5, 5.0]),
    num_clients=st.integers(1, 12),
    seed=st.integers(0, 2**62),
    name=st.sampled_from(["iid", "dirichlet"]),
)
@settings(max_examples=40, deadline=None)
def test_every_sample_goes_to_exactly_one_client(
    alpha: float, num_clients: int, seed: int, name: str
) -> None:
    labels = np.random.default_rng(0).integers(0, 5, size=300)
    options = {"alpha": alpha} if name == "dirichlet" else {}
    parts = partition.create(name, **options)(labels, num_clients, seed)
    assert len(parts) == num_clients
    assert all(part.dtype == np.int64 and len(part) >= 1 for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(300))
    again = partition.create(name, **options)(labels, num_clients, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_smaller_alpha_is_more_skewed() -> None:
    labels = np.repeat(np.arange(10), 200)

    def largest_share(alpha: float) -> float:
        parts = partition.create("dirichlet", alpha=alpha)(labels, 10, 0)
        counts = partition.class_counts(parts, labels, 10)
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    assert largest_share(0.1) > largest_share(1.0) > largest_share(100.0)
    assert largest_share(1e4) < 0.15


def test_iid_sizes_differ_by_at_most_one() -> None:
    parts = partition.create("iid")(np.zeros(23, dtype=np.int64), 5, 0)
    assert sorted(len(part) for part in parts) == [4, 4, 5, 5, 5]


def test_domains_are_partitioned_by_themselves() -> None:
    groups = np.repeat(np.arange(3), [30, 60, 90])
    labels = np.arange(180) % 5
    parts = partition.split_by_group(partition.create("iid"), labels, groups, 8, 0)
    assert [len(np.unique(groups[part])) for part in parts] == [1] * 8
    assert [int(groups[part[0]]) for part in parts] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(np.concatenate(parts).tolist()) == list(range(180))
    with pytest.raises(ConfigError, match="each of 3 domains, got 2"):
        partition.split_by_group(partition.create("iid"), labels, groups, 2, 0)


def test_neighbouring_seeds_give_different_partitions() -> None:
    """Although the partitioner raises its seed until every client has a sample."""
    labels = np.arange(1200) % 10
    groups = np.zeros(1200, dtype=np.int64)
    scarce = partition.create("dirichlet", alpha=0.1)
    drawn = {
        tuple(len(part) for part in partition.split_by_group(scarce, labels, groups, 40, seed))
        for seed in range(6)
    }
    assert len(drawn) == 6


def reference_files() -> list[Path]:
    return sorted(REFERENCE.glob("partition_dirichlet_*.npz")) if REFERENCE.is_dir() else []


@pytest.mark.skipif(not reference_files(), reason="no reference vectors (FEDPROMPT_REFERENCE_DIR)")
@pytest.mark.parametrize("path", reference_files(), ids=lambda path: path.stem)
def test_equal_to_the_released_code(path: Path) -> None:
    with np.load(path) as case:
        parts = partition.create(
            "dirichlet", alpha=float(case["alpha"]), min_samples=int(case["least"]) + 1
        )(case["labels"], int(case["n_clients"]), int(case["seed"]))
        expected = np.split(case["indices"], np.cumsum(case["sizes"])[:-1])
    assert len(parts) == len(expected)
    for part, same in zip(parts, expected, strict=True):
        assert np.array_equal(part, same)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"partition\.alpha: expected a number > 0"):
        partition.create("dirichlet", alpha=alpha)


def test_more_clients_than_samples_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"need 10 samples, but the training split has 6"):
        partition.create("dirichlet", min_samples=2)(np.zeros(6, dtype=np.int64), 5, 0)


def test_redraws_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "MAX_REDRAWS", 20)
    with pytest.raises(ConfigError, match="in 20 tries"):
        partition.create("dirichlet", alpha=0.01, min_samples=9)(
            np.zeros(100, dtype=np.int64), 10, 0
        )
