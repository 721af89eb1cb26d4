"""Sweeps: the list of trials, what is refused, the table; without Ray."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import fedprompt
from fedprompt.cli.main import main
from fedprompt.config import compose
from fedprompt.core.errors import CheckpointError, ConfigError
from fedprompt.core.plugins import find
from fedprompt.core.types import RoundReport
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.events import Note, RoundFinished
from fedprompt.runs.plugins import check_same, records
from fedprompt.runtime import RuntimeOptions
from fedprompt.runtime.placement import Node
from fedprompt.sweep.directory import SweepDirectory, make_table
from fedprompt.sweep.figures import heat_map, line_plot, write_figures
from fedprompt.sweep.page import (
    best_command,
    best_text,
    best_trial,
    make_sweep_page,
    sweep_page,
)
from fedprompt.sweep.ray_tune import bundles, check_resources, figures_for_tune
from fedprompt.sweep.space import Trial, build_sweep, load_sweep
from fedprompt.sweep.table import interval, table_csv

EXAMPLES = Path(__file__).parents[2] / "examples"
TREE = {
    "experiment": "digits",
    "set": {"compare": [], "prompts.pool": None},
    "space": {"partition.alpha": {"grid": [0.1, 1.0]}, "prompts.count": {"grid": [2, 5]}},
    "seeds": [3, 7],
}


def test_cells_and_seeds_in_order() -> None:
    trials = build_sweep(TREE).trials()
    found = [(dict(each.cell), each.seed) for each in trials]
    assert found[:3] == [
        ({"partition.alpha": 0.1, "prompts.count": 2}, 3),
        ({"partition.alpha": 0.1, "prompts.count": 2}, 7),
        ({"partition.alpha": 0.1, "prompts.count": 5}, 3),
    ]
    assert len(trials) == 8
    last = trials[-1].config
    assert (last.partition.options.alpha, last.prompts.count, last.seed) == (1.0, 5, 7)
    assert len({each.folder for each in trials}) == 8
    whole = ["compare=[]", "prompts.pool=null", "partition.alpha=1.0", "prompts.count=5", "seed=7"]
    assert last == compose("digits", whole)
    assert trials[0].folder == "000-alpha=0.1,count=2,seed=3"


def test_the_list_of_trials_is_the_same_whenever_it_is_made() -> None:
    tree = {
        **TREE,
        "space": {
            "partition.alpha": {"loguniform": [0.01, 10.0]},
            "clients.epochs": {"randint": [1, 4]},
            "prompts.lr": {"uniform": [0.001, 0.1]},
            "method": {"choice": ["pfpt", "fedavg_pt_plus"]},
            "prompts.count": [2, 5],
        },
        "samples": 4,
    }
    sweep = build_sweep(tree)
    again = build_sweep(yaml.safe_load(yaml.safe_dump(sweep.tree(), sort_keys=False)))
    assert again == sweep
    assert again.trials() == sweep.trials()
    cells = [dict(cell) for cell in sweep.cells()]
    assert len(cells) == 2 * 4
    assert len({cell["partition.alpha"] for cell in cells}) == 8
    assert all(0.01 <= cell["partition.alpha"] <= 10 for cell in cells)
    assert {cell["clients.epochs"] for cell in cells} <= {1, 2, 3}
    other = build_sweep({**tree, "sampling_seed": 1}).cells()
    assert other != sweep.cells()


def test_equal_draws_are_one_cell() -> None:
    tree = {**TREE, "space": {"prompts.count": {"choice": [2, 5]}}, "samples": 20}
    sweep = build_sweep(tree)
    assert sorted(dict(cell)["prompts.count"] for cell in sweep.cells()) == [2, 5]
    assert len({(each.cell, each.seed) for each in sweep.trials()}) == len(sweep.trials()) == 4


def test_numbers_in_a_sweep_are_those_of_an_experiment(tmp_path: Path) -> None:
    """PyYAML alone takes 1e-3 for text."""
    (tmp_path / "mine.yaml").write_text(
        "experiment: digits\nspace: {prompts.lr: {loguniform: [1e-4, 1e-1]}}\n"
    )
    sweep = load_sweep(str(tmp_path / "mine.yaml"), ["head.lr=1e-3"])
    assert sweep.space[0].values == (1e-4, 0.1)
    assert sweep.set["head.lr"] == 1e-3
    other = load_sweep(str(tmp_path / "mine.yaml"), ["prompts.lr=[1e-2, 5e-1]", "note="])
    assert other.space[0].values == (0.01, 0.5)


def test_the_command_line_changes_a_sweep() -> None:
    sweep = load_sweep(
        "alpha_prompts", ["partition.alpha=[0.3]", "prompts.count=4", "rounds=2", "sweep.seeds=[5]"]
    )
    (trial,) = sweep.trials()
    config = trial.config
    assert (config.partition.options.alpha, config.prompts.count, config.rounds) == (0.3, 4, 2)
    assert (config.seed, config.runtime.actors) == (5, 1)


def test_tune_gets_the_figures_that_all_loggers_get() -> None:
    seconds = {"train": 1.0, "aggregate": 0.1, "evaluate": 0.2}
    report = RoundReport(3, 0.75, 0.5, 0.625, 0.25, 8, 100, 200, seconds, 2.0)
    assert figures_for_tune(RoundFinished(report, "pfpt"), "pfpt") == {
        **{"round": 3, "accuracy": 0.75, "loss": 0.5, "validation_accuracy": 0.625},
        **{"train_loss": 0.25, "num_prompts": 8, "bytes_up": 100, "bytes_down": 200},
        **{"seconds.train": 1.0, "seconds.aggregate": 0.1, "seconds.evaluate": 0.2},
        "wall_seconds": 2.0,
    }
    # Of another method of a compared trial, of a round that was not evaluated, and of no round.
    assert figures_for_tune(RoundFinished(report, "fedavg_pt"), "pfpt") is None
    unmeasured = dataclasses.replace(report, accuracy=math.nan, validation_accuracy=math.nan)
    assert figures_for_tune(RoundFinished(unmeasured, "pfpt"), "pfpt") is None
    # Without a validation split there is a figure all the same, which no rule can judge by.
    unjudged = dataclasses.replace(report, validation_accuracy=math.nan)
    found = figures_for_tune(RoundFinished(unjudged, "pfpt"), "pfpt")
    assert found is not None
    assert (found["accuracy"], math.isnan(found["validation_accuracy"])) == (0.75, True)
    assert figures_for_tune(Note("hello"), "pfpt") is None


def test_the_loggers_of_tune_are_known_and_come_back() -> None:
    sweep = build_sweep({**TREE, "tune_loggers": ["csv", "tensorboard"]})
    assert sweep.tune_loggers == ("csv", "tensorboard")
    assert build_sweep(sweep.tree()) == sweep
    with pytest.raises(ConfigError, match=r"tune_loggers: expected .*'csw'.*did you mean 'csv'"):
        build_sweep({**TREE, "tune_loggers": ["csw"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": {}, "seeds": 1}, "space: expected at least one config key"),
        ({"space": {"partition.alpha": 0.1}}, r"space.partition.alpha: expected one of grid"),
        ({"space": {"partition.alpha": {"grd": [1]}}}, "got 'grd'; did you mean 'grid'"),
        ({"space": {"partition.alpha": {"grid": []}}}, "at least one value"),
        ({"space": {"prompts.count": {"grid": [2, 2]}}}, r"each value once, got \[2, 2\]"),
        ({"space": {"prompts.lr": {"loguniform": [0, 1]}}}, "two numbers above 0 in order"),
        ({"space": {"prompts.lr": {"uniform": [2, 1]}}}, r"in order, got \[2, 1\]"),
        ({"space": {"clients.epochs": {"randint": [1, 2.5]}}}, "two integers in order"),
        ({"space": {"seed": {"grid": [1]}}}, "seed: a sweep sets it .* use seeds"),
        (
            {"space": {"plugins": {"grid": [["a.py"]]}}},
            "plugins: all trials .* write them under set",
        ),
        ({"seeds": 0}, "seeds: expected a number of seeds"),
        ({"seeds": [1, 1]}, "different integers"),
        ({"samples": 0}, "samples: expected an integer >= 1"),
        ({"stop": {"grace": 0}}, "stop.grace: expected an integer >= 1"),
        ({"stop": {"gracee": 2}}, "unknown sweep key 'stop.gracee'"),
        ({"sede": 3}, "unknown sweep key 'sede'.*did you mean 'seeds'"),
        ({"experiment": 3}, "experiment: expected the name or file"),
        ({"set": {"partition.alpha": 1}}, "it is in the space and in set"),
    ],
)
def test_a_wrong_sweep_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_sweep({**TREE, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"set": {"prompts.pool": 4}},
            r"sweep cell partition.alpha=0.1 prompts.count=5: prompts.count: 5 .* pool of 4",
        ),
        ({"space": {"partition.alfa": [1]}}, "'partition.alfa'.*did you mean 'partition.alpha'"),
        ({"space": {"partition.alpha": [-1.0]}}, "sweep cell partition.alpha=-1: partition.alpha"),
        ({"seeds": 9000}, "4 cells x 9000 seeds; expected at most 10000"),
    ],
)
def test_every_cell_is_composed_before_anything_starts(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_sweep({**TREE, **change}).trials()


def test_what_a_trial_reserves() -> None:
    assert bundles(RuntimeOptions(actors=1), [Node(2)]) == [{}, {"CPU": 1.0}]
    assert bundles(RuntimeOptions(actors=4), [Node(2)]) == [{}, *[{"CPU": 0.5}] * 4]
    assert bundles(RuntimeOptions("serial", threads=1), [Node(2)]) == [{"CPU": 1.0}]


def test_resources_that_cannot_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # on a machine with a GPU, say
    tree = {**TREE, "set": {**TREE["set"], "runtime.actors": 1, "runtime.gpus_per_actor": 2}}
    trials = build_sweep(tree).trials()
    with pytest.raises(ConfigError, match=r"sweep cell .*1 actors of 2 GPU .* in the 1 GPUs"):
        check_resources(trials, [Node(4, gpus=1)])
    check_resources(trials, [Node(4, gpus=2)])


def test_intervals_by_hand() -> None:
    # Mean 2, standard error 1 / sqrt(3); t(0.975, 2) = 4.302653.
    assert interval([1.0, 2.0, 3.0]) == {"mean": 2.0, "half_width": round(4.302653 / 3**0.5, 6)}
    assert interval([4.0]) == {"mean": 4.0, "half_width": None}


@pytest.fixture
def done(tiny: Callable[..., list[str]], tmp_path: Path) -> tuple[SweepDirectory, list[Trial]]:
    """A sweep of two cells with two seeds each; the last trial was not done."""
    shared = dict(each.split("=", 1) for each in tiny("rounds=1") if "run_dir" not in each)
    shared = {key: yaml.safe_load(value) for key, value in shared.items()}
    del shared["prompts.count"]
    sweep = build_sweep(
        {**TREE, "set": shared, "space": {"prompts.count": [2, 3]}, "seeds": [0, 1]}
    )
    directory = SweepDirectory.create(tmp_path / "sweep", sweep)
    trials = sweep.trials()
    for trial in trials[:-1]:
        tree = {**trial.config.tree(), "run_dir": str(directory.run(trial).path)}
        fedprompt.run(tree)
    return directory, trials


def test_the_table_of_runs(done: tuple[SweepDirectory, list[Trial]]) -> None:
    directory, trials = done
    _, sweep = SweepDirectory.open(directory.path)
    assert directory.unfinished(trials) == trials[-1:]
    table = make_table(directory, sweep, trials)
    first, second = table["cells"]
    accuracies = [
        json.loads((directory.run(trial).path / "summary.json").read_text())["accuracy"]
        for trial in trials[:-1]
    ]
    assert first["accuracy"]["mean"] == pytest.approx(sum(accuracies[:2]) / 2, abs=1e-6)
    # t(0.975, 1) = 12.7062; the standard error of two is half their distance.
    half = 12.7062 * abs(accuracies[0] - accuracies[1]) / 2
    assert first["accuracy"]["half_width"] == pytest.approx(half, rel=1e-4, abs=1e-5)
    assert (second["seeds"], second["missing"]) == ([0], 1)
    assert second["accuracy"]["mean"] == pytest.approx(accuracies[2], abs=1e-6)
    lines = table_csv(table).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("prompts.count,seeds,stopped,missing,accuracy_mean")
    assert all((directory.path / row["run_dir"]).is_dir() for row in table["trials"][:-1])
    # Nothing of the clock is in it: it is the same whenever it is made.
    assert json.dumps(table) == json.dumps(make_table(directory, sweep, trials))
    directory.add_stopped(trials[-1], 2)
    assert directory.unfinished(trials) == []
    assert make_table(directory, sweep, trials)["cells"][1]["stopped"] == 1
    assert [path.name for path in write_figures(table, directory.figures_folder)] == ["lines.png"]


def test_an_experiment_is_swept_without_a_file(tmp_path: Path) -> None:
    sweep = load_sweep("quickstart", ["seed=0..4", "rounds=2"])
    assert (sweep.name, sweep.experiment, sweep.seeds) == (
        "quickstart",
        "quickstart",
        (0, 1, 2, 3, 4),
    )
    assert [trial.folder for trial in sweep.trials()[:2]] == ["000-seed=0", "000-seed=1"]
    assert sweep.trials()[3].config == compose("quickstart", ["rounds=2", "seed=3"])
    assert build_sweep(yaml.safe_load(yaml.safe_dump(sweep.tree()))) == sweep

    more = ["partition.alpha=0.1,0.5", "prompts.count=2..4", "compare=[]", "note=a, b", "seed=7"]
    sweep = load_sweep("quickstart", [*more, "method=pfpt,fedavg_pt_plus"])
    assert [(axis.key, axis.kind, axis.values) for axis in sweep.space] == [
        ("partition.alpha", "grid", (0.1, 0.5)),
        ("prompts.count", "grid", (2, 3, 4)),
        ("method", "grid", ("pfpt", "fedavg_pt_plus")),
    ]
    assert sweep.set == {"compare": [], "note": "a, b"}
    assert sweep.seeds == (7,)
    lists = load_sweep("digits", ["compare=[],[head_only]", "seed=[1,2]"])
    assert lists.space[0].values == ([], ["head_only"])

    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nmethod: head_only\n")
    assert load_sweep(str(file), ["seed=0,2"]).seeds == (0, 2)
    assert load_sweep("alpha_prompts", ["prompts.count=3,4", "seed=9"]).seeds == (9,)


def rows_of(*trials: tuple[float, int, float, float | None]) -> list[dict]:
    return [
        {
            "values": {"lr": lr},
            "seed": seed,
            "state": "finished",
            "accuracy": accuracy,
            "validation_accuracy": validation,
            "run_dir": f"trials/{lr}-{seed}",
        }
        for lr, seed, accuracy, validation in trials
    ]


def test_the_best_trial_is_that_of_the_best_cell_on_validation() -> None:
    """Cell 0.1 has the best single trial, and the best on test; cell 0.2 the best mean."""
    rows = rows_of((0.1, 0, 0.99, 0.9), (0.1, 1, 0.9, 0.5), (0.2, 0, 0.6, 0.75), (0.2, 1, 0.7, 0.8))
    best = best_trial({"trials": rows})
    assert best is not None
    assert (best["values"], best["seed"]) == ({"lr": 0.2}, 1)
    assert best_text(best) == "lr=0.2 seed=1: 80.0 % on validation, 70.0 % on test"
    without = rows_of((0.1, 0, 0.99, None), (0.2, 0, 0.6, None))
    assert (best_trial({"trials": without}) or {})["values"] == {"lr": 0.1}
    assert best_trial({"trials": [{**rows[0], "state": "stopped"}]}) is None


def test_intervals_of_lines_stay_within_the_axis_and_drawn_keys_are_logarithmic() -> None:
    table = table_of(["lr"], [({"lr": 1e-4}, 0.97), ({"lr": 1e-2}, 0.6), ({"lr": 0.1}, 0.03)])
    for cell in table["cells"]:
        cell["accuracy"]["half_width"] = 2.0
    table["kinds"] = {"lr": "loguniform"}
    figure = line_plot(table)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    (bars,) = axes.containers
    _, _, (segments,) = bars
    ends = [y for segment in segments.get_segments() for _, y in segment]
    assert 0 <= min(ends) < 1 and 99 < max(ends) <= 100
    low, high = axes.get_ylim()
    assert low > -10 and high < 110


def test_the_page_of_a_sweep_names_the_best_trial_and_shows_the_stopped(
    done: tuple[SweepDirectory, list[Trial]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, trials = done
    _, sweep = SweepDirectory.open(directory.path)
    directory.add_stopped(trials[1], 1)
    table = directory.write_table(sweep, trials)
    page = make_sweep_page(directory, sweep, table)
    assert page == directory.path / "report.html"
    text = page.read_text(encoding="utf-8")
    best = best_trial(table)
    assert best is not None
    command = shlex.split(best_command(directory, best))
    assert compose(command[2], command[3:]).seed == best["seed"]
    assert command[2] in html.unescape(text)
    assert "Stopped trials: where they were" in text
    titles = [chart.title for chart in sweep_page(directory, sweep, table).figures]
    assert titles == ["Test accuracy over prompts.count", "Accuracy of the global model"]

    before = page.read_bytes()
    page.unlink()
    result = CliRunner().invoke(main, ["report", str(directory.path)])
    assert result.stdout.splitlines()[-1] == f"report: {page}"
    assert page.read_bytes() == before
    monkeypatch.chdir(directory.path.parent)
    result = CliRunner().invoke(main, ["report", str(directory.path), "--output", "elsewhere"])
    assert result.stdout.splitlines()[-1] == "report: elsewhere/report.html"


def table_of(keys: list[str], cells: list[tuple[dict, float]]) -> dict:
    return {
        "name": "t",
        "keys": keys,
        "cells": [
            {"values": values, "seeds": [0, 1], "accuracy": {"mean": mean, "half_width": 0.01}}
            for values, mean in cells
        ],
    }


def test_pictures_say_what_the_table_says() -> None:
    grid = [({"a": a, "b": b}, 0.5 + 0.1 * a + 0.01 * b) for a in (2, 1) for b in (3, 4)]
    figure = heat_map(table_of(["a", "b"], grid))
    assert figure is not None
    (axes,) = figure.axes
    texts = {each.get_text() for each in axes.texts}
    assert {"63.0 %\n± 1.0", "74.0 %\n± 1.0"} <= texts
    assert [each.get_text() for each in axes.get_yticklabels()] == ["1", "2"]
    lines = line_plot(table_of(["a", "b"], grid))
    assert lines is not None
    assert len(lines.axes[0].containers) == 2
    three = [({"a": 1, "b": 1, "c": 1}, 0.5)]
    assert heat_map(table_of(["a", "b", "c"], three)) is None
    assert line_plot(table_of(["a", "b", "c"], three)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no sweep 'nothing'"),
        (["quickstart"], "or several seeds, got none; on the command line"),
        (["quickstart", "seed=4..0"], "seed=4..0: expected a range"),
        (["quickstart", "rounds=1,,2"], "rounds=1,,2: expected a value between commas"),
        (["quickstart", "partition.alfa=1,2"], "did you mean 'partition.alpha'"),
        (["quickstartt", "seed=0..4"], "did you mean 'quickstart'"),
        (["alpha_prompts", "runtime.actors=4000"], "runtime.actors: 4000 actors"),
        (["--resume", "nowhere"], "expected the folder of a sweep"),
        (["--resume", "x", "alpha_prompts"], "--resume takes the sweep's folder alone"),
    ],
)
def test_a_wrong_call_is_one_line_and_starts_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["sweep", *arguments])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_folder_is_not_overwritten(tmp_path: Path) -> None:
    sweep = build_sweep(TREE)
    SweepDirectory.create(tmp_path / "sweep", sweep)
    with pytest.raises(ConfigError, match="--resume"):
        SweepDirectory.create(tmp_path / "sweep", sweep)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        SweepDirectory.create(tmp_path / "other", sweep)


def test_a_sweep_that_is_continued_is_the_one_that_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the experiment's file is gone and `conf/` has changed."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine\nrounds: 3\ncompare: [scaffold_pt]\nprompts: {lr: 0.2}\n")
    sweep = build_sweep({"experiment": str(mine), "space": {"method": ["pfpt", "fedopt_pt"]}})
    trials = sweep.trials()
    SweepDirectory.create(tmp_path / "sweep", sweep.settled(trials))
    mine.unlink()

    def changed(*names: object) -> dict[str, object]:
        raise AssertionError(f"{names} was read again")

    monkeypatch.setattr("fedprompt.config.layers.load_group", changed)
    monkeypatch.setattr("fedprompt.config.layers.read_yaml", changed)
    again = SweepDirectory.open(tmp_path / "sweep")[1].trials()
    assert again == trials
    for new, old in zip(again, trials, strict=True):
        assert new.config.with_method("scaffold_pt") == old.config.with_method("scaffold_pt")


@pytest.mark.usefixtures("forgotten_plugins")
def test_a_sweep_keeps_its_plug_ins_and_has_one_version_of_each(tmp_path: Path) -> None:
    rule = shutil.copy(EXAMPLES / "trimmed_mean.py", tmp_path)
    tree = {**TREE, "set": {"plugins": ["trimmed_mean.py"], "aggregator": "trimmed_mean"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**tree, "seeds": 1}))
    sweep = load_sweep(str(tmp_path / "mine.yaml"))
    used = find(sweep.trials()[0].config.plugins)
    SweepDirectory.create(tmp_path / "sweep", sweep, used)
    moved = (tmp_path / "sweep").rename(tmp_path / "moved")
    Path(rule).unlink()

    directory, sweep = SweepDirectory.open(moved)
    first = sweep.trials()[0]
    assert first.config.plugins == (str(moved / "plugins/trimmed_mean.py"),)
    run = RunDirectory.create(directory.run(first).path)
    run.write_manifest(records(used))
    check_same(run, first.config.plugins)
    run.write_manifest({"plugins": [{"name": "trimmed_mean", "sha256": "0" * 64}]})
    with pytest.raises(CheckpointError, match="expected sha256 000000000000, as in the trials"):
        check_same(run, first.config.plugins)


def test_what_killed_programs_left_is_removed_an_hour_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedprompt.runtime.ray import local

    monkeypatch.setattr(local, "short_folder", lambda: str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    hour_ago = time.time() - 3700
    kept = [
        f"{local.FOLDER}{os.getpid()}-a",  # its program runs
        f"{local.FOLDER}{gone.pid}-new",
        f"something-else-{gone.pid}-a",
    ]
    for name in (*kept, f"{local.FOLDER}{gone.pid}-old"):
        (tmp_path / name).mkdir()
        if not name.endswith("-new"):
            os.utime(tmp_path / name, (hour_ago, hour_ago))
    local.remove_stale_folders()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("experiment", ["domains", "mixed"])
@pytest.mark.parametrize(
    ("name", "trials"), [("skew_alpha", 54), ("skew_share", 36), ("skew_prompts", 30)]
)
def test_the_sweeps_over_skew_can_run(name: str, trials: int, experiment: str) -> None:
    sweep = load_sweep(name, [f"sweep.experiment={experiment}"])
    assert len(sweep.trials()) == trials
    assert {trial.config.data.name for trial in sweep.trials()} == {experiment}
