"""benchmarks/partition.py: it sees a lost sample, and what it measured is within the target."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import partition as benchmark
from fedprompt.data.partition.base import create, partitioners

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_lost_or_repeated_sample_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "CLIENTS", 4)
    labels = np.arange(40) % 10
    parts = create("iid")(labels, 4, 0)
    benchmark.check(parts, labels, {})
    for wrong in (
        [*parts[:3], parts[3][1:]],
        [*parts[:3], np.append(parts[3][1:], parts[0][0])],
        [np.concatenate(parts)],
    ):
        with pytest.raises(SystemExit, match="a sample was lost or repeated"):
            benchmark.check(wrong, labels, {})
    with pytest.raises(SystemExit, match="a sample was lost or repeated"):
        benchmark.check(parts, labels, {"imbalance_factor": 2.0})


def test_every_partitioner_was_measured_within_the_target() -> None:
    document = json.loads((BENCHMARKS / "results" / "partition.json").read_text())
    cases = document["cases"]
    assert [row["case"] for row in cases] == list(benchmark.CASES)
    assert {row["partition"] for row in cases} == set(partitioners.names())
    assert document["request"]["clients"] == benchmark.CLIENTS == 100_000
    for row in cases:
        assert row["seconds"] <= document["target"]["seconds"] == 10
        assert row["start_mb"] < row["peak_mb"] <= document["target"]["peak_mb"] == 1000
