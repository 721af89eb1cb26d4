"""Partitions on disk: read back index by index, refused for other data, the same run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import fedprompt
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.data.partition import base as partition
from fedprompt.data.partition.file import (
    labels_digest,
    make_recipe,
    partition_bytes,
    read_partition,
)
from fedprompt.runs.directory import RunDirectory

LABELS = np.arange(60) % 3


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Four clients in an order that is not ascending, one sample left out."""
    parts = [np.array([5, 2, 9]), np.arange(10, 59), np.array([0]), np.array([1, 3, 4, 6, 7, 8])]
    recipe = make_recipe("shards", {"classes_per_client": 2}, 3, parts, LABELS)
    path = tmp_path / "mine.npz"
    path.write_bytes(partition_bytes(parts, recipe))
    return path


def reload(path: Path, labels: Any = LABELS, num_clients: int = 4) -> list[Any]:
    return partition.create("file", file=str(path))(labels, num_clients, 0)


def test_a_file_is_read_as_it_was_written(saved: Path) -> None:
    parts = reload(saved)
    assert [part.tolist() for part in parts] == [
        *([5, 2, 9], list(range(10, 59)), [0], [1, 3, 4, 6, 7, 8])
    ]
    assert all(part.dtype == np.int64 for part in parts)
    assert read_partition(saved).recipe == {
        "name": "shards",
        "options": {"classes_per_client": 2},
        "seed": 3,
        "clients": 4,
        "samples": 60,
        "labels_sha256": labels_digest(LABELS),
    }


def test_a_partition_of_another_program_needs_indices_and_sizes_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "theirs.npz", indices=np.array([3, 1, 2], np.int32), sizes=[1, 2])
    parts = reload(tmp_path / "theirs.npz", np.zeros(4, np.int64), 2)
    assert [part.tolist() for part in parts] == [[3], [1, 2]]
    assert parts[0].dtype == np.int64
    np.savez(
        tmp_path / "labelled.npz", indices=np.array([3, 1]), sizes=np.array([1, 1]), labels=LABELS
    )
    assert len(reload(tmp_path / "labelled.npz", LABELS, 2)) == 2
    with pytest.raises(ConfigError, match="was made for other labels"):
        reload(tmp_path / "labelled.npz", LABELS[::-1], 2)


def test_changing_a_part_does_not_change_the_partitioner(saved: Path) -> None:
    again = partition.create("file", file=str(saved))
    again(LABELS, 4, 0)[0][:] = 0
    assert again(LABELS, 4, 0)[0].tolist() == [5, 2, 9]


@pytest.mark.parametrize(
    ("labels", "num_clients", "message"),
    [
        (LABELS, 5, r"^clients\.count: the partition in .* is for 4 clients, got 5; set .*=4$"),
        (LABELS[:59], 4, "divides 60 samples, but the training split has 59"),
        (1 - LABELS % 2, 4, "was made for other labels"),
    ],
)
def test_other_data_are_refused(saved: Path, labels: Any, num_clients: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reload(saved, labels, num_clients)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"indices": np.array([1, 2])}, "sizes"),
        ({"indices": np.array([1, 1]), "sizes": np.array([2])}, "out of range or comes twice"),
        ({"indices": np.array([-1, 1]), "sizes": np.array([2])}, "out of range or comes twice"),
        ({"indices": np.array([0, 1]), "sizes": np.array([3])}, "2 indices for clients of 3"),
        ({"indices": np.array([0, 1]), "sizes": np.array([3, -1])}, "2 indices for clients of 2"),
        ({"indices": np.array([0.0]), "sizes": np.array([1])}, "of float64"),
        ({"indices": np.array([[0]]), "sizes": np.array([1])}, r"of shape \(1, 1\)"),
        ({"indices": np.array([0]), "sizes": np.array([1]), "recipe": np.array("{")}, "Expecting"),
        (
            {"indices": np.array([0, None]), "sizes": np.array([2])},
            "pickled objects, which are not read",
        ),
    ],
)
def test_a_file_that_is_no_partition(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, allow_pickle=True, **arrays)
    with pytest.raises(ConfigError, match=f"^partition.file: expected a partition .*{message}"):
        read_partition(path)


def test_a_recipe_that_is_no_mapping(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", indices=[0], sizes=[1], recipe=np.array("[1]"))
    with pytest.raises(ConfigError, match="a recipe that is a list"):
        read_partition(tmp_path / "bad.npz")


def test_an_index_beyond_the_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "far.npz", indices=[0, 60], sizes=[1, 1])
    with pytest.raises(ConfigError, match="holds sample 60, but the training split ends at 59"):
        reload(tmp_path / "far.npz", LABELS, 2)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken", b"\x93NUMPY\x01\x00"])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^partition\.file: expected a partition .*got .+$"):
        read_partition(path)


def test_a_torn_file_and_a_single_array(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-30])
    with pytest.raises(ConfigError, match=r"^partition\.file: expected a partition"):
        read_partition(saved)
    np.save(saved.with_suffix(".npy"), LABELS)
    with pytest.raises(ConfigError, match="got one array and no archive"):
        read_partition(saved.with_suffix(".npy"))


def test_a_path_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got .*nowhere, where there is no such file$"):
        read_partition(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"where there is no partition\.npz$"):
        read_partition(tmp_path)


# In experiments


def test_the_file_alone_picks_the_entry(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    short = compose("digits", ["partition.file=mine.npz"])
    assert short.partition.tree() == {"name": "file", "file": str(saved.resolve())}
    named = compose("digits", ["partition.file=mine.npz", "partition=file"])
    assert named.partition == short.partition
    assert compose(yaml.safe_load(short.to_yaml())) == short
    assert compose({"partition": {"file": "mine.npz"}}).partition == short.partition
    assert compose("digits", ["partition=file"]).partition.tree()["file"] is None


def test_options_of_another_partition_beside_a_file(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"'partition\.alpha': expected one of file"):
        compose("digits", [f"partition.file={saved}", "partition.alpha=1"])
    with pytest.raises(ConfigError, match=r"unknown config key 'partition\.file'"):
        compose("digits", [f"partition.file={saved}", "partition=dirichlet"])


def test_options_of_the_partition_behind_the_long_tail() -> None:
    config = compose(
        "digits",
        ["partition=long_tail", "partition.then=shards", "partition.options.classes_per_client=3"],
    )
    assert config.partition.tree() == {
        "name": "long_tail",
        "imbalance_factor": 100.0,
        "then": "shards",
        "options": {"classes_per_client": 3},
    }
    assert compose(yaml.safe_load(config.to_yaml())) == config
    with pytest.raises(ConfigError, match="unknown option 'alpha' for partition 'shards'"):
        compose("digits", ["partition={name: long_tail, then: shards, options: {alpha: 1}}"])


def test_a_run_on_a_saved_partition_has_the_same_bits(
    tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    """From the run directory, from its file, and from a run that was reloaded itself."""
    first = fedprompt.run("digits", tiny("rounds=1"))
    recipe = json.loads((first.run_dir / "partition.json").read_text())["recipe"]
    assert (recipe["name"], recipe["seed"], recipe["clients"]) == ("dirichlet", 0, 6)
    assert recipe["options"] == {"alpha": 0.5, "min_samples": 1}
    assert read_partition(first.run_dir).recipe == recipe

    def again(name: str, *overrides: str) -> fedprompt.RunResult:
        return fedprompt.run("digits", tiny("rounds=1", f"run_dir={tmp_path / name}", *overrides))

    second = again("second", f"partition.file={first.run_dir}")
    third = again("third", "partition=file", f"partition.file={second.run_dir}/partition.npz")
    for result in (second, third):
        assert result.state.sha256() == first.state.sha256()
        indices = RunDirectory(result.run_dir).read_indices()
        before = RunDirectory(first.run_dir).read_indices()
        assert all(np.array_equal(a, b) for a, b in zip(indices, before, strict=True))
    assert read_partition(second.run_dir).recipe["origin"] == recipe
    with pytest.raises(ConfigError, match=r"is for 6 clients, got 5; set clients\.count=6"):
        again("fourth", f"partition.file={first.run_dir}", "clients.count=5")
    assert not (tmp_path / "fourth").exists()


def test_a_run_refuses_clients_without_samples(
    tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"expected at least 1 sample for each of 6 clients"):
        fedprompt.run("digits", tiny("partition.min_samples=0", "partition.alpha=1e-6"))
    assert not (tmp_path / "run").exists()
