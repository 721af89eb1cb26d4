"""Feed the loggers of one method's run; nothing that they do ends it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprompt.core.files import Json, atomic_write
from fedprompt.core.quiet import quiet_libraries
from fedprompt.tracking.figures import figures_of
from fedprompt.tracking.loggers import LoggedRun, Tracker

if TYPE_CHECKING:  # takes seconds to import
    from pytorch_lightning.loggers import Logger

logger = logging.getLogger(__name__)

LIBRARIES = (
    *("pytorch_lightning", "lightning_fabric", "pytorch_lightning.loggers.mlflow"),
    *("lightning.pytorch", "mlflow", "mlflow.store.db.utils", "alembic", "urllib3", "wandb"),
)
"""Whose messages would come between the lines of the terminal."""


class _Line:
    """One logger: what it has, and what it still has to get."""

    def __init__(self, name: str, tracker: Tracker, run: LoggedRun) -> None:
        self.name = name
        self.tracker = tracker
        self.run = run
        self.note = run.folder / f"{name}.json"
        self.logger: Logger | None = None
        self.waiting: list[Json] = []
        """Records that the logger does not have."""
        self.missing = False
        """Its package is not installed."""
        self.failed = False

    def open(self, config: Json) -> None:
        """Open the logger; one that an earlier process opened does not get its rounds again."""
        noted = read_note(self.note)
        known = noted is not None and not self.tracker.starts_over
        identity = noted["identity"] if noted is not None and known else None
        opened = self.tracker.open(dataclasses.replace(self.run, identity=identity))
        done = 0
        if noted is not None and known:
            done = self.tracker.last_step(opened, noted["step"])
        else:
            self.write(opened, 0)
            opened.log_hyperparams(config)
        self.waiting = [record for record in self.waiting if record["round"] > done]
        self.logger = opened

    def deliver(self, opened: Logger, domains: Sequence[str]) -> None:
        """Give the logger what is waiting.

        Args:
            opened: the logger.
            domains: names of the task's domains.
        """
        while self.waiting:
            record = self.waiting[0]
            opened.log_metrics(figures_of(record, domains), step=record["round"])
            self.waiting.pop(0)
            self.write(opened, record["round"])
        opened.save()

    def write(self, opened: Logger, step: int) -> None:
        """Note which run of the logger this is, and how far it is.

        Args:
            opened: the logger.
            step: the last round that it has.
        """
        self.note.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"identity": self.tracker.identity(opened), "step": step})
        atomic_write(self.note, text + "\n")


class Feed:
    """The loggers of one method's run.

    A logger that cannot be opened or fails is said so once, and gets what it lacks at the end of
    the run, if it can be reached then, or when the run is resumed.

    Args:
        trackers: with their names.
        run: whom they follow.
        config: the composed config, the hyperparameters of a logger.
        domains: names of the task's domains.
    """

    def __init__(
        self,
        trackers: Sequence[tuple[str, Tracker]],
        run: LoggedRun,
        config: Json,
        domains: Sequence[str],
    ) -> None:
        self._lines = [_Line(name, tracker, run) for name, tracker in trackers]
        self._config = config
        self._domains = domains

    def start(self, records: Sequence[Json]) -> list[str]:
        """Open the loggers.

        Args:
            records: of the rounds that were done before.

        Returns:
            What the user should read.
        """
        for line in self._lines:
            line.waiting = list(records)
        return self._deliver(self._lines)

    def add(self, record: Json) -> list[str]:
        """Give a round to the loggers.

        Returns:
            What the user should read.
        """
        for line in self._lines:
            line.waiting.append(record)
        return self._deliver([line for line in self._lines if not line.failed])

    def end(self, state: str) -> list[str]:
        """Close the loggers, after a last attempt where one failed.

        Args:
            state: `finished`, `stopped` or `failed`.

        Returns:
            What the user should read.
        """
        notes = []
        for line in self._lines:
            if line.missing:
                continue
            before = line.failed
            try:
                if before and state != "failed":
                    self._attempt(line)
                    notes.append(f"logger {line.name}: it has all rounds after all")
                if line.logger is not None:
                    with quiet_libraries(LIBRARIES):
                        line.tracker.close(line.logger, state)
            except Exception as error:
                logger.info("logger %s: %s", line.name, error)
                if not before:
                    notes.append(trouble(line.name, error))
        return notes

    def _deliver(self, lines: Sequence[_Line]) -> list[str]:
        notes = []
        for line in lines:
            try:
                self._attempt(line)
            except ImportError as error:
                line.failed = line.missing = True
                notes.append(
                    f"logger {line.name} is off: its package cannot be imported "
                    f"({one_line(error).split('. HINT')[0]}); pip install 'fedprompt[loggers]'"
                )
            except Exception as error:
                line.failed = True
                notes.append(trouble(line.name, error))
        return notes

    def _attempt(self, line: _Line) -> None:
        with quiet_libraries(LIBRARIES):
            if line.logger is None:
                _as_first_process()
                line.open(self._config)
            if line.logger is not None:
                line.deliver(line.logger, self._domains)


def trouble(name: str, error: Exception) -> str:
    """One line about a logger that failed."""
    return (
        f"logger {name} failed and is left out from here on; the run goes on "
        f"({type(error).__name__}: {one_line(error)})"
    )


def one_line(error: Exception, length: int = 200) -> str:
    """The text of an error of any library.

    >>> one_line(ValueError("two\\n  lines"))
    'two lines'
    """
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"{text[:length]}..."


def read_note(path: Path) -> Json | None:
    """What `_Line.write` wrote; None if there is nothing that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"identity": content["identity"], "step": int(content["step"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _as_first_process() -> None:
    """Tell Lightning that this process may log: the driver is one, whatever its number is in the
    job of a batch system.
    """
    rank_zero: Any = importlib.import_module("pytorch_lightning.utilities.rank_zero")
    rank_zero.rank_zero_only.rank = 0
