"""The parts of benchmarks/extensions.py, on worlds small enough to check."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import extensions
from fedprompt import aggregation
from fedprompt.aggregation.pfpt import PfptOptions


def small(**changes: Any) -> Any:
    world = extensions.World(
        groups=2, prompts=2, clients=6, per_round=4, rounds=4, dimension=16, key_dimension=16
    )
    return dataclasses.replace(world, **{"key_noise": 0.05, "prompt_noise": 0.02, **changes})


def test_differences_are_paired() -> None:
    """Means 2 and 3 with a wide spread, but the differences are 1 with none."""
    default, changed = [{"ari": 0.0}, {"ari": 4.0}], [{"ari": 1.0}, {"ari": 5.0}]
    assert extensions.compare(default, changed) == {
        "ari": {"default": 2.0, "value": 3.0, "difference": {"mean": 1.0, "ci95": 0.0}}
    }
    only = extensions.compare(default[:1], changed[:1])["ari"]["difference"]
    assert only == {"mean": 1.0, "ci95": None}


def test_every_extension_is_compared_with_another_value_where_it_exists() -> None:
    for option, effect in extensions.EFFECTS.items():
        default = getattr(PfptOptions(), option)
        assert effect.worlds and set(effect.worlds) <= set(extensions.WORLDS)
        for value in effect.values:
            assert value != default
            aggregation.create("pfpt", **{option: value})
    used = {world for effect in extensions.EFFECTS.values() for world in effect.worlds}
    assert used == set(extensions.WORLDS)


def test_the_bound_is_the_number_of_true_prompts() -> None:
    for name in extensions.EFFECTS["max_prompts"].worlds:
        world = extensions.WORLDS[name]
        assert world.groups * world.prompts == extensions.TRUE_NUMBER


def test_a_run_repeats_and_forgetting_shows() -> None:
    """Two groups, two clients a round: often a group is absent, and at patience 1 it is lost."""
    world = small(per_round=2, rounds=12)
    scores = [extensions.run(world, 0, options) for options in ({}, {}, {"patience": 1})]
    for score in scores:
        assert score.pop("milliseconds") > 0
    assert scores[0] == scores[1]
    assert set(scores[0]) == {"ari", "pool", "pool_error", "start_error"}
    assert scores[2]["pool"] < 1.0 <= scores[0]["pool"]
    assert scores[2]["pool_error"] > 0.3 > scores[0]["pool_error"]


def test_a_single_call_is_measured_against_its_true_prompts() -> None:
    case = extensions.Case(clients=4, prompts=3, dimension=8, noise=0.0, scale=7.0)
    score = extensions.run(case, 0, {"restarts": 0})
    assert (score["ari"], score["pool"]) == (1.0, 1.0)
    assert score["pool_error"] == pytest.approx(0.0, abs=1e-5)


def test_the_command_writes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worlds = {"a": small(), "b": small(prompt_noise=0.1)}
    effects = {
        "patience": extensions.Effect((1, 3), ("a",)),
        "memory": extensions.Effect((0.0,), ("b", "a")),
        "restarts": extensions.Effect((0,), ("b",)),
    }
    monkeypatch.setattr(extensions, "WORLDS", worlds)
    monkeypatch.setattr(extensions, "EFFECTS", effects)
    path = tmp_path / "new" / "extensions.json"
    argv = ["extensions.py", "--options", "memory,patience", "--seeds", "2", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", argv)
    extensions.main()
    document = json.loads(path.read_text(encoding="utf-8"))
    rows = [(row["option"], row["value"], row["world"]) for row in document["effects"]]
    expected = [("memory", 0.0, "a"), ("memory", 0.0, "b")]
    assert rows == [*expected, ("patience", 1, "a"), ("patience", 3, "a")]
    assert document["effects"][2]["default"] == PfptOptions().patience
    assert document["worlds"]["b"]["keyed"]["prompt_noise"] == 0.1
    assert document["seeds"] == [0, 1]
    assert {"command", "date", "machine", "packages", "default_world"} <= set(document)
    for row in document["effects"]:
        assert set(row["measures"]) == {
            *("ari", "pool", "pool_error", "start_error", "milliseconds")
        }
        figures = row["measures"]["pool"]
        found = figures["value"] - figures["default"]
        assert figures["difference"]["mean"] == pytest.approx(found, abs=2e-4)


def test_an_unknown_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["extensions.py", "--options", "loops"])
    with pytest.raises(SystemExit):
        extensions.main()
