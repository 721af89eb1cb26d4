"""The run directory: everything that a run leaves on disk, and nothing else knows its file names.

RUN_DIR/
  config.yaml      the configuration, complete
  manifest.json    versions, machine, commit, date
  plugins/         the plug-in files that the run was made with
  partition.json   recipe, and samples of each class that each client holds
  partition.npz    recipe and indices, to be used again (see `data.partition.file`)
  task.json        classes, domains, and how images were read
  system.json      speed and bandwidth of each client, with virtual time
  whitening.npz    with `prompts.whiten=public`, the map of queries
  rounds.jsonl     one object a round
  predictions.npz  the class that the global model gives each test image, last evaluated round
  status.json      running, finished, failed or stopped; round, message
  summary.json     the result; present when the run is finished
  state/           checkpoints (see `checkpoint`)
  figures/         pictures; report.html gathers them
  compare/NAME/    runs of other methods on the same data, each a run directory of its own
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.core.errors import CheckpointError, ConfigError, InputError
from fedprompt.core.files import TEMPORARY_FILES, Json, atomic_write, json_ready
from fedprompt.data.partition.file import partition_bytes, read_partition
from fedprompt.runs.checkpoint import CHECKPOINT_FILES
from fedprompt.runs.json_lines import append_line, read_lines, write_lines
from fedprompt.runs.manifest import now_utc

if TYPE_CHECKING:
    from fedprompt.core.types import RoundReport


logger = logging.getLogger(__name__)

STATES = ("running", "finished", "failed", "stopped", "interrupted")
"""The last one is what earlier versions called a run that was stopped."""
FILES = (
    *("config.yaml", "partition.json", "partition.npz", "rounds.jsonl", "report.html"),
    *("task.json", "whitening.npz", "system.json", "predictions.npz"),
    # Last, so that a folder whose clearing was interrupted still counts as a run directory.
    *("summary.json", "manifest.json", "status.json"),
)
PICTURES = re.compile(r".+\.(png|svg|pdf)")
PLUGINS = "plugins"
PLUGIN_FILES = re.compile(r".+\.(py|yaml)")


@dataclasses.dataclass(frozen=True)
class Partition:
    """Who holds what. Written by the experiment, read by the report."""

    class_names: tuple[str, ...]
    class_counts: NDArray[np.int64]
    """(clients, classes): number of training samples."""


class RunDirectory:
    """Reads and writes the files of one run.

    Args:
        path: the folder; use `create` for a new run and `open` for one that exists.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.state_folder = self.path / "state"
        self.figures_folder = self.path / "figures"
        self.compare_folder = self.path / "compare"
        self.plugins_folder = self.path / PLUGINS
        self.loggers_folder = self.path / "loggers"
        """What the loggers of `tracking` write, and nothing else."""
        self.report_path = self.path / "report.html"
        self._rounds_path = self.path / "rounds.jsonl"

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | os.PathLike[str], overwrite: bool = False) -> RunDirectory:
        """Make the folder of a new run.

        Args:
            path: a folder that does not exist, is empty, or, with `overwrite`, holds a run.
            overwrite: remove the files of the run that is there; any other file stays.

        Raises:
            ConfigError: the folder holds a run and `overwrite` is off, or holds something else.
        """
        run = cls(path)
        cls.check_new(path, overwrite)
        try:
            if run.is_run():
                run.clear()
            run.path.mkdir(parents=True, exist_ok=True)
            run.write_status({"state": "running", "round": 0})
        except OSError as error:
            raise _not_writable(run.path, error) from error
        return run

    @classmethod
    def made(cls, path: str | os.PathLike[str]) -> Path:
        """The folder of a run, made if it is not there.

        Raises:
            ConfigError: it cannot be made.
        """
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(Path(path), error) from error
        return Path(path)

    @classmethod
    def check_new(cls, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Raise what `create` would raise about the folder, and write nothing.

        Raises:
            ConfigError: the folder holds a run and `overwrite` is off, or holds something else.
        """
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise ConfigError(
                f"run_dir {run.path}: expected a folder, got a file; choose another run_dir"
            )
        if run.is_run():
            if not overwrite:
                raise ConfigError(run._why_not())
        elif _content(run.path):
            raise ConfigError(
                f"run_dir {run.path}: expected an empty folder or a run directory, got a folder "
                "with other files; choose another run_dir"
            )

    def last_round(self) -> int | None:
        """The round of the newest checkpoint, good or damaged; None if there is none."""
        cards = self.state_folder.glob("round_*.json") if self.state_folder.is_dir() else ()
        return max((int(card.stem.removeprefix("round_")) for card in cards), default=None)

    def has_header(self) -> bool:
        """Whether config, manifest and partition were all written."""
        names = ("config.yaml", "manifest.json", "partition.json")
        return all((self.path / name).is_file() for name in names)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """The run directory that exists at `path`.

        Raises:
            ConfigError: there is no run.
        """
        run = cls(path)
        if not run.is_run():
            is_folder, exists = run.path.is_dir(), run.path.exists()
            got = "another folder" if is_folder else "a file" if exists else "nothing there"
            raise ConfigError(
                f"{run.path}: expected a run directory (it has config.yaml and status.json), "
                f"got {got}; give the run_dir of an earlier run"
            )
        return run

    def is_run(self) -> bool:
        """Whether the folder holds a run, finished or not."""
        # Names alone prove little: other programs write a status.json or a manifest.json too.
        evidence = ("config.yaml", "manifest.json", "rounds.jsonl")
        return self.read_status().get("state") in STATES or all(
            (self.path / name).is_file() for name in evidence
        )

    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        has_summary = (self.path / "summary.json").is_file()
        return has_summary or self.read_status().get("state") == "finished"

    def has_result(self) -> bool:
        """Whether the run is finished, or was stopped after a round by a callback or the user."""
        is_stopped = self.read_status().get("state") == "stopped"
        return self.is_finished() or (is_stopped and self.last_round() is not None)

    def clear(self) -> None:
        """Remove the files of this run and of its comparison runs; files of other origin stay."""
        for run in self.comparisons():
            run.clear()
            _remove_if_empty(run.path)
        shutil.rmtree(self.loggers_folder, ignore_errors=True)
        conf = self.plugins_folder / "conf"
        for folder, pattern in (
            (self.state_folder, CHECKPOINT_FILES),
            (self.figures_folder, PICTURES),
            *((folder, PLUGIN_FILES) for folder in (*_content(conf), self.plugins_folder)),
            (self.path, TEMPORARY_FILES),
        ):
            for path in _content(folder):
                ours = pattern.fullmatch(path.name) or TEMPORARY_FILES.fullmatch(path.name)
                if ours and path.is_file():
                    path.unlink()
        folders = (self.state_folder, self.figures_folder, self.compare_folder)
        for folder in (*folders, *_content(conf), conf, self.plugins_folder):
            _remove_if_empty(folder)
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)

    def comparison(self, name: str) -> RunDirectory:
        """The folder of the comparison run `name`; it may not exist yet.

        Raises:
            ConfigError: `name` cannot be the name of a folder.
        """
        if not re.fullmatch(r"[\w][\w.+-]*", name):
            raise ConfigError(
                f"comparison run '{name}': expected a name of letters, digits and . _ + -; "
                "rename it"
            )
        return RunDirectory(self.compare_folder / name)

    def comparisons(self) -> list[RunDirectory]:
        """The comparison runs that exist, by name."""
        return [run for run in map(RunDirectory, _content(self.compare_folder)) if run.is_run()]

    def write_config(self, yaml_text: str) -> None:
        """Write `config.yaml`."""
        atomic_write(self.path / "config.yaml", yaml_text)

    def read_config(self) -> str:
        """The text of `config.yaml`; empty when there is none."""
        path = self.path / "config.yaml"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def write_manifest(self, values: Mapping[str, object]) -> None:
        """Write `manifest.json`; see `manifest`."""
        self._write_json("manifest.json", values)

    def read_manifest(self) -> Json:
        """Content of `manifest.json`; empty when there is none."""
        return self._read_json("manifest.json")

    def check_backbone(self, found: str) -> None:
        """Refuse a backbone with other weights than those that the run was made with.

        Args:
            found: its `checksum`.

        Raises:
            CheckpointError: names both.
        """
        expected = self.read_manifest().get("backbone_sha256")
        if not isinstance(expected, str):
            raise CheckpointError(
                f"{self.path}: expected backbone_sha256 in manifest.json, got none; copy the whole "
                "folder again"
            )
        if found != expected:
            raise CheckpointError(
                f"{self.path}: expected a backbone of sha256 {expected[:12]}, as the run was made "
                f"with, got {found[:12]}; put the old weights back or start a new run"
            )

    def write_summary(self, values: Mapping[str, object]) -> None:
        """Write `summary.json`; from then on the run counts as finished."""
        self._write_json("summary.json", values)

    def read_summary(self) -> Json:
        """Content of `summary.json`; empty when there is none."""
        return self._read_json("summary.json")

    def write_status(self, values: Mapping[str, object]) -> None:
        """Replace `status.json`; the time is added.

        Args:
            values: `state` (one of `STATES`) and, as they apply, `round`, `rounds`, `message`,
                `client`, `stage`.

        Raises:
            InputError: unknown state.
        """
        if values.get("state") not in STATES:
            raise InputError(
                f"status: expected state to be one of {', '.join(STATES)}, "
                f"got {values.get('state')!r}"
            )
        self._write_json("status.json", {**values, "updated": now_utc()})

    def read_status(self) -> Json:
        """Content of `status.json`; empty when it is missing or damaged."""
        try:
            return self._read_json("status.json")
        except CheckpointError as error:
            logger.warning("%s", error)
            return {}

    def write_task(self, values: Mapping[str, object]) -> None:
        """Write `task.json`; see `runs.task_card`."""
        self._write_json("task.json", values)

    def read_task(self) -> Json:
        """Content of `task.json`; empty when there is none."""
        return self._read_json("task.json")

    def write_system(self, values: Mapping[str, object]) -> None:
        """Write `system.json`; see `runs.devices.record_of`."""
        self._write_json("system.json", values)

    def read_system(self) -> Json:
        """Content of `system.json`; empty when there is none."""
        return self._read_json("system.json")

    def write_whitening(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        """Write `whitening.npz`: a few matrices by name."""
        self._write_arrays("whitening.npz", arrays)

    def read_whitening(self) -> dict[str, NDArray[np.float64]]:
        """What `write_whitening` wrote; empty when there is none."""
        return self._read_arrays("whitening.npz")

    def write_predictions(self, arrays: Mapping[str, NDArray[np.int64]]) -> None:
        """Write `predictions.npz`; see `runs.predictions`."""
        self._write_arrays("predictions.npz", arrays)

    def read_predictions(self) -> dict[str, NDArray[np.int64]]:
        """What `write_predictions` wrote; empty when there is none.

        Raises:
            CheckpointError: the file is damaged.
        """
        return self._read_arrays("predictions.npz")

    def append_round(self, report: RoundReport) -> None:
        """Add one line to `rounds.jsonl`; NaN is written as null."""
        append_line(self._rounds_path, report)

    def read_rounds(self) -> list[Json]:
        """The records of `rounds.jsonl` in order; a torn last line is left out, null stays None.

        Raises:
            CheckpointError: a line before the last is damaged.
        """
        return read_lines(self._rounds_path)

    def truncate_rounds(self, after: int) -> None:
        """Drop the records of rounds later than `after`, which a resumed run writes again."""
        kept = [record for record in self.read_rounds() if record["round"] <= after]
        write_lines(self._rounds_path, kept)

    def write_partition(
        self,
        indices: Sequence[NDArray[np.int64]],
        class_counts: NDArray[np.int64],
        class_names: Sequence[str],
        recipe: Mapping[str, object] | None = None,
    ) -> None:
        """Write who holds what: `partition.json` (counts) and `partition.npz` (indices).

        Args:
            indices: for each client the rows of the training split that it holds.
            class_counts: (clients, classes) number of samples.
            class_names: one name a class.
            recipe: how the partition came about; goes into both files.

        Raises:
            InputError: the shapes do not fit together.
        """
        if class_counts.shape != (len(indices), len(class_names)):
            raise InputError(
                f"partition: expected class counts of shape ({len(indices)}, {len(class_names)}), "
                f"one row a client and one column a class, got {class_counts.shape}"
            )
        recipe = dict(recipe or {})
        atomic_write(self.path / "partition.npz", partition_bytes(indices, recipe))
        clients = [
            {"client": client, "num_examples": int(counts.sum()), "class_counts": counts.tolist()}
            for client, counts in enumerate(class_counts)
        ]
        self._write_json(
            "partition.json",
            {"recipe": recipe, "class_names": list(class_names), "clients": clients},
        )

    def read_partition(self) -> Partition | None:
        """The class counts of all clients, or None when the run wrote none.

        Raises:
            CheckpointError: the file is damaged.
        """
        content = self._read_json("partition.json")
        if not content:
            return None
        try:
            names = tuple(str(name) for name in content["class_names"])
            rows = [client["class_counts"] for client in content["clients"]]
            counts = np.array(rows, dtype=np.int64).reshape(len(rows), len(names))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path / 'partition.json'}: expected class_names and clients, got {error!r}; "
                "delete the file"
            ) from error
        return Partition(names, counts)

    def read_indices(self) -> list[NDArray[np.int64]]:
        """The rows of the training split that each client holds; empty when the run wrote none.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self.path / "partition.npz"
        return read_partition(path).parts if path.is_file() else []

    def _why_not(self) -> str:
        if self.is_finished():
            return (
                f"run_dir {self.path}: expected a new folder, got a finished run; "
                "choose another run_dir or replace it with --overwrite"
            )
        return (
            f"run_dir {self.path}: expected a new folder, got an unfinished run; continue it with "
            f"'fedprompt run --resume {self.path}' or replace it with --overwrite"
        )

    def _write_arrays(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        atomic_write(self.path / name, buffer.getvalue())

    def _read_arrays(self, name: str) -> dict[str, NDArray[Any]]:
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {each: arrays[each] for each in arrays.files}
        except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise CheckpointError(
                f"{path}: expected a NumPy archive, got '{error}'; delete the file"
            ) from error

    def _write_json(self, name: str, values: Mapping[str, object]) -> None:
        atomic_write(self.path / name, json.dumps(json_ready(values), indent=2) + "\n")

    def _read_json(self, name: str) -> Json:
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(
                f"{path}: expected JSON, got '{error}'; delete the file"
            ) from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
        return content


def _not_writable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run_dir {path}: expected a folder that can be written, got "
        f"'{error.strerror or error}'; choose another run_dir"
    )


def _content(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not _content(folder):
        folder.rmdir()
