"""The figures of rounds become metrics of Ray, and nothing that Ray does with them ends a run."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from fedprompt.runtime.ray.metrics import GAUGES, RoundGauges


def test_each_figure_is_a_gauge_with_run_and_method(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[tuple[str, str, str], float] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description.endswith(".")
            assert tag_keys == ("run", "method")
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            values[self.name, tags["run"], tags["method"]] = value

    metrics: Any = types.ModuleType("ray.util.metrics")
    metrics.Gauge = Gauge
    monkeypatch.setitem(sys.modules, "ray.util.metrics", metrics)
    gauges = RoundGauges()
    gauges.set("mine", "pfpt", {"round": 1, "bytes_up": 5, "seconds.train": 3.0})
    gauges.set("mine", "pfpt", {"round": 2, "accuracy": 0.5, "bytes_up": 7})
    gauges.set("mine", "fedavg_pt", {"round": 1})
    assert values == {
        ("fedprompt_round", "mine", "pfpt"): 2,
        ("fedprompt_accuracy", "mine", "pfpt"): 0.5,
        ("fedprompt_bytes_up", "mine", "pfpt"): 7,
        ("fedprompt_round", "mine", "fedavg_pt"): 1,
    }
    assert {"round", "accuracy", "loss", "bytes_up", "bytes_down"} <= GAUGES.keys()


def test_a_ray_without_metrics_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.util.metrics", None)
    gauges = RoundGauges()
    for round_index in (1, 2):
        gauges.set("mine", "pfpt", {"round": round_index})
