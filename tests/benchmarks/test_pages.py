"""Pages equal what the committed results say."""

from __future__ import annotations

import pytest

from benchmarks import quickstart, skew
from benchmarks.harness import DOCS, RESULTS, read_json


@pytest.mark.parametrize("experiment", quickstart.ON_THE_PAGE)
def test_the_page_of_the_quickstart_has_what_was_measured(experiment: str) -> None:
    result = read_json(RESULTS / f"{experiment}.json")
    page = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    assert quickstart.text_of(result, experiment) in page
    hashes = {row["state_sha256"] for row in result["same_bits"].values()}
    assert len(hashes) == 1
    assert set(result["same_bits"]) == set(quickstart.RUNTIMES)


def test_the_page_of_skew_has_what_was_measured() -> None:
    sweeps = read_json(skew.OUTPUT)["sweeps"]
    assert set(sweeps) == {f"{task}-{axis}" for task in skew.TASKS for axis in skew.AXES}
    assert all(cell["seeds"] == [0, 1, 2] for each in sweeps.values() for cell in each["cells"])
    assert skew.text_of(sweeps) in (DOCS / "benchmark.md").read_text(encoding="utf-8")
