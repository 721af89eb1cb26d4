"""`iid` and `dirichlet`: equal to the released code; how domains are divided."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fedprompt.core.errors import ConfigError
from fedprompt.data.partition import base as partition
from fedprompt.data.partition import dirichlet as partition_dirichlet

REFERENCE = Path(
    os.environ.get("FEDPROMPT_REFERENCE_DIR", Path(__file__).parents[3] / "shared" / "reference")
)


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
    return sorted(REFERENCE.glob("partition_*.npz")) if REFERENCE.is_dir() else []


@pytest.mark.skipif(not reference_files(), reason="no reference vectors (FEDPROMPT_REFERENCE_DIR)")
@pytest.mark.parametrize("path", reference_files(), ids=lambda path: path.stem)
def test_equal_to_the_released_code(path: Path) -> None:
    with np.load(path) as case:
        name = str(case["kind"])
        if name == "dirichlet":  # the released minimum is exceeded, ours is reached
            options = {"alpha": float(case["alpha"]), "min_samples": int(case["least"]) + 1}
        else:
            options = {"dominated": int(case["dominated"])}
        parts = partition.create(name, **options)(
            case["labels"], int(case["n_clients"]), int(case["seed"])
        )
        expected = np.split(case["indices"], np.cumsum(case["sizes"])[:-1])
    assert len(parts) == len(expected)
    for part, same in zip(parts, expected, strict=True):
        assert part.dtype == np.int64
        assert np.array_equal(part, same)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"partition\.alpha: expected a finite number > 0"):
        partition.create("dirichlet", alpha=alpha)


def test_more_clients_than_samples_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"need 10 samples, but the training split has 6"):
        partition.create("dirichlet", min_samples=2)(np.zeros(6, dtype=np.int64), 5, 0)


def test_redraws_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition_dirichlet, "MAX_REDRAWS", 20)
    with pytest.raises(ConfigError, match="in 20 tries"):
        partition.create("dirichlet", alpha=0.01, min_samples=9)(
            np.zeros(100, dtype=np.int64), 10, 0
        )


def test_a_domain_that_cannot_be_divided_is_named() -> None:
    groups, labels = np.repeat([0, 1], [50, 3]), np.zeros(53, np.int64)
    with pytest.raises(ConfigError, match=r"\(domain 'faces', which has 5 clients\)$"):
        partition.split_by_group(
            partition.create("iid"), labels, groups, 10, 0, ("digits", "faces")
        )


def test_the_classes_of_a_domain_count_from_its_lowest() -> None:
    """A released partition of the domain alone is found again, whatever its classes are called."""
    labels = np.arange(600) % 6
    groups = np.repeat([0, 1], 300)
    shifted = labels + 6 * groups
    dirichlet = partition.create("dirichlet", alpha=0.5)
    parts = partition.split_by_group(dirichlet, shifted, groups, 8, 3)
    alone = dirichlet(labels[300:], 4, partition.derive_seed(3, "partition", 1))
    assert all(np.array_equal(a, b + 300) for a, b in zip(parts[4:], alone, strict=True))


def test_redraws_of_large_requests_are_bounded_by_their_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """10 classes x 1,000 clients are 10,000 shares a try."""
    monkeypatch.setattr(partition_dirichlet, "MAX_SHARES", 300_000)
    labels = np.repeat(np.arange(10), 200)
    with pytest.raises(ConfigError, match="at least 1 of 2000 samples in 30 tries"):
        partition.create("dirichlet", alpha=1e-3)(labels, 1000, 0)
    monkeypatch.setattr(partition_dirichlet, "MAX_SHARES", 3_000)
    with pytest.raises(ConfigError, match="in 1 tries"):
        partition.create("dirichlet", alpha=1e-3)(labels, 1000, 0)


def test_clients_without_samples_are_named() -> None:
    full, none = np.array([1, 2]), np.array([], np.int64)
    partition.check_none_empty([full, full])
    with pytest.raises(ConfigError, match=r"got none for 2 of them \(the first is client 1\)"):
        partition.check_none_empty([full, none, none])
