"""Accuracy over virtual hours: the numbers that are drawn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fedprompt.core.types import RoundReport
from fedprompt.report.figures import draw_all
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.summary import comparison_table, read_runs


def write_run(path: Path, hours: list[float]) -> Path:
    """A run of three rounds, of which the second was not evaluated."""
    run = RunDirectory.create(path)
    for index, (accuracy, passed) in enumerate(zip((0.2, math.nan, 0.6), hours, strict=True), 1):
        known = RoundReport(
            *(index, accuracy, 1.0, accuracy, 1.0, 5, 10, 10, {"train": 1.0}), virtual_hours=passed
        )
        run.append_round(known)
    return run.path


@pytest.mark.figures
def test_accuracy_is_drawn_where_both_numbers_are_known(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [0.5, 1.25, 3.0])
    (run,) = read_runs([path])
    assert run.over_hours("accuracy") == ([0.5, 3.0], [0.2, 0.6])
    axes = draw_all([run])["virtual"].axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0.5, 20.0], [3.0, 60.0]]  # type: ignore[union-attr]
    assert axes.get_xlabel() == "virtual hours"
    assert axes.get_xlim() == (0, 3)
    assert comparison_table([path])[0]["virtual_hours"] == 3.0


@pytest.mark.figures
def test_there_is_no_figure_without_virtual_time(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "run", [math.nan] * 3)])
    assert "virtual" not in draw_all(runs)
    assert comparison_table([tmp_path / "run"])[0]["virtual_hours"] is None
