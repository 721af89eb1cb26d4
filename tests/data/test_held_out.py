"""Each client's own held-out images, data without a validation split, and data of one class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import cifar10_binary, class_folders, four, noise, png

import fedprompt
import package_trees
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.data.partition.base import create as create_partition
from fedprompt.data.partition.mirror import owned_shares
from fedprompt.data.sets.digits import DigitsOptions, digits
from fedprompt.data.task import datasets
from fedprompt.runs.federation import prepare
from fedprompt.sweep.space import build_sweep

Overrides = Callable[..., list[str]]
LEARNS_ALONE = ("method=local_only", "compare=[]", "prompts.pool=null")


@pytest.fixture
def two_hospitals(tmp_path: Path) -> str:
    """Two owners whose images mean the opposite: what is `ill` here is `well` there. Of the test
    images 2 are the first's and 6 the second's.
    """
    lines = ["path,label,client,split"]
    for client in "AB":
        for split, count in (("train", 6), ("val", 2), ("test", 1 if client == "A" else 3)):
            for label in ("ill", "well"):
                dark = (label == "ill") == (client == "A")
                for number in range(count):
                    name = f"img/{client}{split}{label}{number}.png"
                    png(tmp_path / name, noise(1, 32, 32, number)[0] // 4 + (0 if dark else 190))
                    lines.append(f"{name},{label},{client},{split}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "list.csv")


def test_clients_that_are_owners_are_measured_on_their_own_images(
    two_hospitals: str, tiny: Overrides
) -> None:
    overrides = [*LEARNS_ALONE, "data=imagefolder", f"data.csv={two_hospitals}", "data.size=32"]
    counts = ["clients.count=2", "clients.per_round=2"]
    by_owner = prepare(compose("digits", tiny(*overrides, *counts, "partition=natural")))
    test = by_owner.task.test
    owners = np.asarray(test.clients)
    assert owners.tolist() == [0, 0] + [1] * 6
    for split in range(2):
        held = (test, by_owner.task.validation)[split]
        for client, own in enumerate(by_owner.own_images(split)):
            assert own.tolist() == np.flatnonzero(np.asarray(held.clients) == client).tolist()
    # Another partition divides what an owner has: shares by class, as before.
    by_class = prepare(compose("digits", tiny(*overrides, *counts, "partition=iid")))
    assert sorted(np.concatenate(by_class.own_images(0)).tolist()) == list(range(8))
    assert {len(each) for each in by_class.own_images(0)} == {4}


def test_a_reused_partition_goes_by_owners_as_before(
    two_hospitals: str, tiny: Overrides, tmp_path: Path
) -> None:
    overrides = tiny(
        *(*LEARNS_ALONE, "data=imagefolder", f"data.csv={two_hospitals}", "data.size=32"),
        *("clients.count=2", "clients.per_round=2", "rounds=1"),
    )
    first = fedprompt.run("digits", [*overrides, "partition=natural"])
    assert first.reports[-1]["personalised"]["test"]["clients"] == 2
    config = compose("digits", [*overrides, "partition=file", f"partition.file={first.run_dir}"])
    assert [len(each) for each in prepare(config).own_images(0)] == [2, 6]


def test_owners_that_are_divided_or_unknown() -> None:
    owners, held = np.array([4, 4, 7, 7]), np.array([7, 4, 9, 7])
    assert owned_shares([np.array([0, 2]), np.array([1, 3])], owners, held) is None
    parts = owned_shares([np.array([0, 1]), np.array([2])], owners, held)  # 3 is left out
    assert parts is not None and [part.tolist() for part in parts] == [[1], [0, 3]]
    natural: Any = create_partition("natural", by="domain")
    assert not natural.by_owner


# No validation split


def test_everything_trains_without_a_validation_split(tmp_path: Path) -> None:
    cifar10_binary(tmp_path / "cifar-10-batches-bin", per_batch=20)
    task = datasets.create("cifar10", root=str(tmp_path), validation=0)
    assert (len(task.train), len(task.validation), len(task.test)) == (100, 0, 20)
    class_folders(tmp_path / "files", ["."], ("ant", "bee"), 10, 8)
    task = datasets.create("imagefolder", root=str(tmp_path / "files"), validation=0, size=8)
    assert (len(task.train), len(task.validation), len(task.test)) == (16, 0, 4)
    task = digits(DigitsOptions(validation=0, test=0.2))
    assert (len(task.train), len(task.validation)) == (1797 - len(task.test), 0)
    with pytest.raises(
        ConfigError, match=r"^data\.validation: .*, got -0\.1; 0 means no such split$"
    ):
        datasets.create("cifar10", root=str(tmp_path), validation=-0.1)


@pytest.mark.parametrize("name", ["emoji", "mixed", "fourdataset"])
def test_composed_data_sets_without_a_validation_split(name: str, tmp_path: Path) -> None:
    """Of fourdataset, two domains keep the split of their publishers."""
    {"emoji": package_trees.emoji, "mixed": package_trees.mixed, "fourdataset": four}[name](
        tmp_path
    )
    options = {"root": str(tmp_path), "size": 32, "max_train": None, "max_test": None}
    task = datasets.create(name, **options, validation=0)
    before = datasets.create(name, **options, validation=0.25)
    cut = len(before.validation) - len(task.validation)
    assert cut > 0 and len(task.train) == len(before.train) + cut
    assert len(np.unique(task.validation.groups)) == (2 if name == "fourdataset" else 0)


def test_a_run_without_a_validation_split(tiny: Overrides) -> None:
    no_split = "data={name: digits, train: 0.12, validation: 0, test: 0.05}"
    alone = ("rounds=1", "method=head_only", "prompts.count=0", "eval_clients=last")
    result = fedprompt.run("digits", tiny(no_split, *alone))
    record, row = result.reports[-1], result.summary
    assert record["validation_accuracy"] is None and record["accuracy"] == row["accuracy"] > 0
    assert set(record["personalised"]) == {"test"}
    assert row["best_round"] is None and row["best_accuracy"] is None


def test_what_needs_a_validation_split_is_refused() -> None:
    sweep = build_sweep(
        {
            "experiment": "digits",
            "set": {"data.validation": 0},
            "space": {"clients.lr": [0.1, 0.2]},
            "stop": {"grace": 1},
        }
    )
    with pytest.raises(
        ConfigError, match=r"^stop: .* data\.validation=0 in .*clients\.lr=0\.1; set"
    ):
        sweep.trials()


# One class


def test_one_class_is_refused_in_one_line(tiny: Overrides, tmp_path: Path) -> None:
    class_folders(tmp_path / "files", ["."], ("images",), 10, 8)
    overrides = tiny("data=imagefolder", f"data.root={tmp_path / 'files'}", "partition=iid")
    with pytest.raises(
        ConfigError, match=r"^data=imagefolder: expected at least two classes, got 'i"
    ):
        fedprompt.run("digits", overrides)
    assert not (tmp_path / "run").exists()
