"""Runs that differ in the seed alone are one line; what differs is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprompt.core.intervals import share_interval, t_interval
from fedprompt.core.types import RoundReport
from fedprompt.report.lines import average, difference, lines_of, series_of
from fedprompt.report.page import make_report
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.summary import read_runs


def write(path: Path, accuracies: list[float], config: str) -> Path:
    run = RunDirectory.create(path)
    run.write_config(config)
    for index, accuracy in enumerate(accuracies, start=1):
        run.append_round(RoundReport(index, accuracy, 1.0, accuracy, 1.0, 5, 10, 20, {}))
    run.write_status({"state": "finished"})
    return path


def config(seed: int, method: str = "pfpt", **more: object) -> str:
    lines = {"seed": seed, "method": method, "run_dir": f"runs/{seed}", "rounds": 2, **more}
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


def test_seeds_are_one_line_with_an_interval(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a", [0.5, 0.8], config(0)),
        write(tmp_path / "b", [0.5, 0.9], config(1, runtime="{name: ray, actors: 2}")),
        write(tmp_path / "c", [0.5], config(2)),
        write(tmp_path / "again", [0.1, 0.1], config(0)),  # the same seed is no repetition
        write(tmp_path / "other", [0.2, 0.2], config(0, "mean")),
    ]
    first, again, other = lines_of(read_runs(paths))
    assert (first.name, first.seeds) == ("pfpt", (0, 1, 2))
    assert [run.directory.path.name for run in (*again.runs, *other.runs)] == ["again", "other"]
    curve = first.curve(series_of("accuracy"), share=True)
    assert (curve.x, curve.y) == ([1.0], [0.5])  # round 2 is not known of all
    assert len({first.name, again.name, other.name}) == 3


def test_the_interval_of_a_line_by_hand(tmp_path: Path) -> None:
    """Mean 0.85, standard error 0.05, t(0.975, 1) = 12.7062; delta method on the logit scale."""
    paths = [write(tmp_path / str(s), [0.8 + 0.1 * s], config(s)) for s in (0, 1)]
    (line,) = lines_of(read_runs(paths))
    mean = line.figures()["accuracy"]
    assert mean.mean == pytest.approx(0.85)
    # logit(0.85) = 1.734601; 12.7062 * 0.05 / (0.85 * 0.15) = 4.982831
    assert (mean.low, mean.high) == pytest.approx((0.037392, 0.998792), abs=1e-5)
    assert line.curve(series_of("accuracy"), share=True).low == pytest.approx([mean.low])
    assert average([3.0], share=False).low is None


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.99, 1.0, 0.5], [1.0, 1.0], [0.0, 0.0, 0.0]])
def test_intervals_of_shares_stay_within_bounds_and_hold_the_mean(values: list[float]) -> None:
    mean, half = t_interval(values)
    low, high = share_interval(mean, half) or (2.0, -1.0)
    assert 0.0 <= low <= mean <= high <= 1.0


def test_narrow_intervals_are_those_of_student() -> None:
    low, high = share_interval(0.7, 0.001) or (0.0, 0.0)
    assert (low, high) == pytest.approx((0.699, 0.701), abs=2e-6)


def test_names_say_what_sets_lines_of_a_method_apart(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{alpha}{seed}", [0.5], config(seed, partition=f"{{alpha: {alpha}}}"))
        for alpha in (0.1, 5.0)
        for seed in (0, 1)
    ]
    names = [line.name for line in lines_of(read_runs(paths))]
    assert names == ["pfpt (partition.alpha=0.1)", "pfpt (partition.alpha=5.0)"]
    page = make_report(paths, tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "What differs" in page
    assert '<td data-head="key">partition.alpha</td>' in page
    assert "Mean and 95 % interval over 2 seeds" in page


def test_options_of_different_plug_ins_are_no_difference() -> None:
    one = {"head.lr": 1, "aggregator.name": "pfpt", "aggregator.gamma": 1.0, "aggregator.x": 1}
    two = {"head.lr": 2, "aggregator.name": "mean", "aggregator.x": 2}
    assert difference([one, two]) == {
        "head.lr": [1, 2],
        "aggregator.name": ["pfpt", "mean"],
        "aggregator.x": [1, 2],
    }
    assert difference([one, one]) == {}
