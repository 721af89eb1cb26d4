"""The parts of benchmarks/keyed.py, on worlds small enough to check."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import keyed
from fedprompt.aggregation import Aggregation


def small(**changes: Any) -> Any:
    world = keyed.World(
        groups=2, prompts=2, clients=6, per_round=4, rounds=4, dimension=16, key_dimension=16
    )
    return dataclasses.replace(world, **{"key_noise": 0.05, "prompt_noise": 0.02, **changes})


class Oracle:
    """Knows that local prompts come in the order of the labels it is told."""

    def __init__(self, labels: list[list[list[int]]]) -> None:
        self.labels = iter(labels)

    def aggregate(self, prompt_sets: list[torch.Tensor], **given: Any) -> Aggregation:
        assert len(given["origins"]) == len(prompt_sets)
        assert given["previous"].shape == (2, 16)
        rounds = next(self.labels)
        return Aggregation(
            torch.zeros(2, 16), None, [torch.tensor(rows) for rows in rounds], {}, {}
        )


def test_a_perfect_world_is_recovered() -> None:
    result = keyed.measure(small(rounds=6), 2, {})
    assert result["summary"]["ari"]["mean"] == 1.0
    assert result["summary"]["pool"]["mean"] == 1.0
    assert result["summary"]["start_error"]["mean"] < 0.3
    assert result["curves"]["round"] == [1, 2, 3, 4, 5, 6]
    assert json.loads(json.dumps(result)) == result


def test_a_wide_group_is_not_split() -> None:
    """The seed whose keys were split for chance, and its rows doubled, from the fifth round on."""
    world = keyed.World(rounds=12, key_noise=0.5, key_drift=0.02)
    curves = keyed.run(world, 4, keyed.aggregation.create("pfpt"))
    assert curves.pool == [1.0] * 12
    assert curves.ari == [1.0] * 12


def test_one_group_for_all_is_scored_as_such() -> None:
    """Half of the true pairs in the pool, and an assignment that says nothing about groups."""
    world = dataclasses.replace(small(), keyed=False, rounds=2)
    oracle = Oracle([[[0, 1]] * 4] * 2)
    curves = keyed.run(world, 0, oracle)
    assert curves.pool == [0.5, 0.5]
    assert max(curves.ari) < 1.0


def test_clients_take_the_rows_with_the_nearest_keys() -> None:
    planted = keyed.Planted(small(progress=1.0, prompt_noise=0.0), 0)
    pool = np.random.default_rng(0).normal(size=(6, 16))
    keys = np.stack([planted.key(0) + offset for offset in (5.0, 0.1, 3.0, 0.2, 4.0, 6.0)])
    result = keyed.train_client(planted, 0, pool, keys)
    np.testing.assert_array_equal(result.origins, [1, 3])
    np.testing.assert_allclose(result.prompts, planted.prompts[0][result.labels % 2])
    assert set(result.labels.tolist()) == {0, 1}


def test_local_training_goes_part_of_the_way() -> None:
    planted = keyed.Planted(small(progress=0.25, prompt_noise=0.0), 0)
    result = keyed.train_client(planted, 1, np.zeros((2, 16)), None)
    true = planted.prompts[1][result.labels % 2]
    np.testing.assert_allclose(result.prompts, 0.25 * true)
    assert result.start_error == pytest.approx(float((planted.prompts[1] ** 2).mean()))
    assert set(result.labels.tolist()) == {2, 3}


def test_worlds_have_the_stated_spreads() -> None:
    world = small(groups=50, clients=500, key_noise=0.3, key_dimension=64, own_prompts=0.1)
    planted = keyed.Planted(world, 0)
    assert float((planted.deviations**2).mean()) == pytest.approx(0.09, rel=0.6)  # 6 directions
    assert np.linalg.matrix_rank(planted.deviations) == world.key_rank
    own = planted.prompts - planted.prompts.mean(axis=0)
    assert float((own**2).mean()) == pytest.approx(0.01, rel=0.2)
    assert np.unique(keyed.Planted(small(own_keys=False), 0).keys, axis=0).shape[0] == 1


def test_rare_prompts_are_had_by_few_clients_of_a_group() -> None:
    world = small(clients=40, prompts=3, rare=1, rare_share=0.1, progress=1.0)
    planted = keyed.Planted(dataclasses.replace(world, prompt_noise=0.0), 0)
    assert planted.has[:, :2].all()
    owners = np.flatnonzero(planted.has[:, 2])
    np.testing.assert_array_equal(np.bincount(planted.group[owners]), [2, 2])  # of 20 each
    other = np.setdiff1d(np.arange(40), owners)[0]
    for client, number in ((owners[0], 3), (other, 2)):
        result = keyed.train_client(planted, client, np.zeros((3, 16)), None)
        group = planted.group[client]
        assert sorted(result.labels - 3 * group) == list(range(number))
        np.testing.assert_allclose(result.prompts, planted.prompts[group, result.labels % 3])
    with pytest.raises(ValueError, match="rare"):
        small(rare=2)


def test_noise_falls_with_the_sample_count() -> None:
    """And the aggregator is told the counts; without a spread it is told nothing."""
    planted = keyed.Planted(small(clients=2000, count_spread=0.7), 0)
    logs = np.log(planted.counts)
    assert (logs.mean(), logs.std()) == pytest.approx((0.0, 0.7), abs=0.05)
    assert planted.noise(3) * math.sqrt(planted.counts[3]) == pytest.approx(0.02)
    equal = keyed.Planted(small(count_spread=0.7, count_power=0.0), 0)
    assert equal.noise(3) == pytest.approx(0.02)

    class Listener:
        def aggregate(self, prompt_sets: list[torch.Tensor], weights: Any, **_: Any) -> None:
            heard.append(weights)

    heard: list[Any] = []
    for world in (equal.world, small()):
        each = keyed.Planted(world, 0)
        keyed.aggregate(Listener(), each, np.array([4, 2]), [], torch.zeros(2, 16), None, {})
    np.testing.assert_array_equal(heard[0], equal.counts[[4, 2]])
    assert heard[1] is None


def test_pool_error_is_the_distance_to_the_nearest_row() -> None:
    true = np.zeros((2, 1, 4))
    true[1] = 3.0
    assert keyed.pool_error(true, np.array([[1.0] * 4, [-2.0] * 4])) == math.sqrt((1 + 4) / 2)


def test_drift_keeps_the_spread_and_correlates_rounds() -> None:
    planted = keyed.Planted(small(groups=400, clients=400, key_drift=0.6), 0)
    before = planted.keys
    planted.move()
    assert float((planted.keys**2).mean()) == pytest.approx(1.0, abs=0.1)
    assert float((planted.keys * before).mean()) == pytest.approx(math.sqrt(1 - 0.36), abs=0.1)
    np.testing.assert_array_equal(planted.prompts, keyed.Planted(planted.world, 0).prompts)


def test_a_clients_key_is_the_same_in_all_rounds() -> None:
    planted = keyed.Planted(small(prompt_drift=0.1), 0)
    key = planted.key(3)
    planted.move()
    np.testing.assert_array_equal(planted.key(3), key)


def test_runs_repeat() -> None:
    first, second = (keyed.measure(small(), 1, {}) for _ in range(2))
    del first["summary"]["milliseconds"], second["summary"]["milliseconds"]
    assert first == second
    assert first["summary"]["ari"]["ci95"] is None


def test_figures_by_hand() -> None:
    pool = [0.25] * keyed.BURN_IN + [0.4, 1.0, 2.5, 2.0]
    number = len(pool)
    curves = keyed.Curves([0.0] * 12 + [1.0] * 12, pool, [0.5] * number, [0.002] * number)
    result = keyed.figures(curves)
    assert (result["pool_low"], result["pool_high"], result["in_bounds"]) == (0.4, 2.5, 0.5)
    assert (result["ari"], result["start_error"]) == (1.0, 0.5)
    assert result["milliseconds"] == pytest.approx(2.0)
    assert keyed.interval([1.0, 3.0]) == {
        "mean": 2.0,
        "ci95": 12.7062,
    }  # t(1) 12.7062, s/sqrt 2 = 1


def test_the_command_writes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "PARTS", {"keys": [small()]})
    path = tmp_path / "new" / "keyed.json"
    options = json.dumps({"memory": 2.0})
    monkeypatch.setattr(
        *(sys, "argv"),
        [
            "keyed.py",
            "--parts",
            "keys",
            "--seeds",
            "2",
            "--options",
            options,
            "--output",
            str(path),
        ],
    )
    keyed.main()
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["seeds"] == [0, 1]
    assert document["options"] == {"memory": 2.0}
    assert document["parts"]["keys"][0]["world"]["groups"] == 2
    assert {"command", "date", "machine", "packages", "default_world"} <= set(document)


def test_an_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["keyed.py", "--parts", "nothing"])
    with pytest.raises(SystemExit):
        keyed.main()
