"""benchmarks/real/keys.py on queries that are drawn so that the answer is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.real import keys
from fedprompt.core.errors import ConfigError
from fedprompt.data.prefix.tables import FeatureTable

WIDTH = 12


def table_of(seed: int, count: int = 1600) -> FeatureTable:
    """Four domains of ten classes. Style: the domain in the last two coordinates, by 8 deviations
    of one image or more, and up to hundred times as much noise in the others. CLS: noise alone.
    """
    draws = np.random.default_rng(seed)
    groups, labels = np.arange(count) % 4, np.arange(count) // 4 % 10
    style = draws.normal(size=(count, WIDTH)) * np.geomspace(10, 0.1, WIDTH)
    style[:, -2] += 1.2 * (groups // 2)
    style[:, -1] += 1.2 * (groups % 2)
    return FeatureTable(
        tokens=np.zeros((count, 2, WIDTH), np.float32),
        style=style.astype(np.float32),
        cls=draws.normal(size=(count, WIDTH)).astype(np.float32),
        features=np.zeros((count, WIDTH), np.float32),
        labels=labels.astype(np.int64),
        groups=groups.astype(np.int64),
    )


@pytest.mark.parametrize("setting", keys.SETTINGS)
def test_the_metric_knows_what_plain_keys_do_not(setting: str) -> None:
    train, test = table_of(0), table_of(1, 640)
    clients = keys.clients_of(train, setting, 0)
    assert len(clients.parts) == keys.CLIENTS
    assert all(
        (train.groups[p] == d).all() for p, d in zip(clients.parts, clients.domain, strict=True)
    )
    world = keys.World.of(clients, train.style.astype(float), test.style.astype(float), test.groups)
    plain, whitened = (keys.figures(world, metric, 0) for metric in (False, True))
    assert plain["known"]["single"] < 0.5
    assert whitened["known"]["single"] > 0.99
    for row in ("found", "ten rounds"):
        assert whitened[row]["single"] > 0.99
        assert whitened[row]["16"] == 1.0
        assert whitened[row]["ari"] > 0.8  # clients of a few images may stand apart


def test_imbalance_gives_every_class_of_a_domain_to_someone() -> None:
    """21 classes and 8 clients for each of 5 domains: three classes each."""
    table = table_of(0, 2100)
    object.__setattr__(table, "groups", np.arange(2100) % 5)
    object.__setattr__(table, "labels", np.arange(2100) // 5 % 21)
    clients = keys.clients_of(table, "imbalance", 0)
    counts = [np.bincount(table.labels[part], minlength=21) for part in clients.parts]
    assert all(np.sort(each)[-3:].sum() > 0.7 * each.sum() for each in counts)


def test_a_task_that_is_not_there_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent(task: str, seeds: int, weights: str | None) -> None:
        raise ConfigError(f"no {task} here")

    output = tmp_path / "keys.json"
    output.write_text(json.dumps({"tasks": {"domains": {"images": 7}}}))
    monkeypatch.setattr(keys, "measure", absent)
    monkeypatch.setattr(sys, "argv", ["keys", "--tasks", "emoji", "--output", str(output)])
    keys.main()
    document = json.loads(output.read_text())
    assert document["skipped"] == {"emoji": "no emoji here"}
    assert document["tasks"] == {"domains": {"images": 7}}
