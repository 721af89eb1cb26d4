"""The folder of a sweep."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from fedprompt.core.errors import ConfigError
from fedprompt.core.files import Json, atomic_write, new_name
from fedprompt.core.plugins import Plugin
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.plugins import copy_of, keep
from fedprompt.runs.summary import comparison_table, read_runs
from fedprompt.sweep.space import Sweep, Trial, build_sweep, read_sweep
from fedprompt.sweep.table import MEASURES, interval, table_csv

# ---------------------------------------------------------------- the folder


class SweepDirectory:
    """Reads and writes the files of one sweep."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.figures_folder = self.path / "figures"
        self.report_path = self.path / "report.html"

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], sweep: Sweep, plugins: Sequence[Plugin] = ()
    ) -> SweepDirectory:
        """Make the folder of a new sweep.

        Args:
            path: a folder that is new or empty.
            sweep: goes into `sweep.yaml`.
            plugins: those of all trials; the folder keeps copies, which `sweep.yaml` names.

        Raises:
            ConfigError: there is something already, or it cannot be written.
        """
        directory = cls(path)
        if directory.path.exists() and (
            not directory.path.is_dir() or any(directory.path.iterdir())
        ):
            more = (
                f"; continue it with 'fedprompt sweep --resume {directory.path}'"
                if (directory.path / "sweep.yaml").is_file()
                else ""
            )
            raise ConfigError(f"--dir {directory.path}: expected a new or empty folder{more}")
        try:
            (directory.path / "trials").mkdir(parents=True, exist_ok=True)
            tree = sweep.tree()
            if plugins:
                keep(directory.path, plugins)
                tree["set"]["plugins"] = [copy_of(plugin) for plugin in plugins]
            text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
            atomic_write(directory.path / "sweep.yaml", f"# fedprompt sweep sweep.yaml\n{text}")
        except OSError as error:
            raise ConfigError(
                f"--dir {directory.path}: expected a folder that can be written, got "
                f"'{error.strerror or error}'"
            ) from error
        return directory

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> tuple[SweepDirectory, Sweep]:
        """The sweep that exists at `path`.

        Raises:
            ConfigError: there is none.
        """
        directory = cls(path)
        file = directory.path / "sweep.yaml"
        if not file.is_file():
            raise ConfigError(
                f"{directory.path}: expected the folder of a sweep (it has sweep.yaml), got "
                f"{'another folder' if directory.path.is_dir() else 'nothing there'}"
            )
        return directory, build_sweep(read_sweep(os.fspath(file)))

    def run(self, trial: Trial) -> RunDirectory:
        """The run directory of a trial; it may not exist yet."""
        return RunDirectory(self.path / "trials" / trial.folder)

    def stopped(self) -> dict[str, int]:
        """Trials that the stopping rule ended, by folder, with the last round of each."""
        file = self.path / "stopped.json"
        return dict(json.loads(file.read_text())) if file.is_file() else {}

    def add_stopped(self, trial: Trial, round_index: int) -> None:
        """Remember that a trial is not to be continued."""
        stopped = {**self.stopped(), trial.folder: round_index}
        atomic_write(self.path / "stopped.json", json.dumps(stopped, indent=2) + "\n")

    def unfinished(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials that are still to be done, or to be continued."""
        stopped = self.stopped()
        return [
            trial
            for trial in trials
            if trial.folder not in stopped and not self.run(trial).is_finished()
        ]

    def write_table(self, sweep: Sweep, trials: Sequence[Trial]) -> Json:
        """Write `table.json` and `table.csv`; see `make_table`."""
        table = make_table(self, sweep, trials)
        atomic_write(self.path / "table.json", json.dumps(table, indent=2) + "\n")
        atomic_write(self.path / "table.csv", table_csv(table))
        return table


def default_folder(sweep: Sweep) -> Path:
    """A new folder, named by sweep and time."""
    return Path("runs") / new_name(f"sweep-{Path(sweep.name).name}")


# ---------------------------------------------------------------- the table


def make_table(directory: SweepDirectory, sweep: Sweep, trials: Sequence[Trial]) -> Json:
    """What a sweep found: no times and no dates, so that it is a function of the trials' results.

    Args:
        directory: the sweep's folder.
        sweep: its space and seeds.
        trials: all of them, finished or not.

    Returns:
        `keys`, `kinds` (how each was drawn), `cells` (values, seeds that are done, mean and 95 %
        interval of each measure) and `trials` (values, seed, state, measures, state hash, best
        validation accuracy, run directory).
    """
    stopped = directory.stopped()
    rows: list[Json] = []
    for trial in trials:
        run = directory.run(trial)
        measured: Json = dict.fromkeys((*MEASURES, "rounds", "state_sha256"))
        judged: float | None = None
        state = run.read_status().get("state", "missing") if run.is_run() else "missing"
        if run.is_run() and run.read_rounds():
            row = comparison_table([run.path])[0]
            measured = {name: row[name] for name in measured}
            judged = max(read_runs([run.path])[0].series("validation_accuracy")[1], default=None)
        rows.append(
            {
                "values": dict(trial.cell),
                "seed": trial.seed,
                "state": "stopped" if trial.folder in stopped else state,
                **measured,
                "validation_accuracy": judged,
                "run_dir": f"trials/{trial.folder}",
            }
        )
    cells = []
    for values, group in itertools.groupby(rows, key=lambda row: row["values"]):
        members = list(group)
        done = [row for row in members if row["state"] == "finished"]
        cell: Json = {
            "values": values,
            "seeds": [row["seed"] for row in done],
            "stopped": sum(row["state"] == "stopped" for row in members),
            "missing": sum(row["state"] not in ("finished", "stopped") for row in members),
        }
        for name in MEASURES:
            cell[name] = interval([row[name] for row in done if row[name] is not None])
        cell["run_dirs"] = [row["run_dir"] for row in members]
        cells.append(cell)
    return {
        "name": sweep.name,
        "note": sweep.note,
        "keys": [axis.key for axis in sweep.space],
        "kinds": {axis.key: axis.kind for axis in sweep.space},
        "cells": cells,
        "trials": rows,
    }
