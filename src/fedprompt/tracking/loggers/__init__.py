"""Loggers of a run: `loggers` of an experiment names them.

Each is one of Lightning's loggers, opened by a registered `Tracker` in a file here or in a plug-in.
Every method of a run is one logger run; the feed gives it the composed config and the figures of
each round, with the round as the step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprompt.core.registry import Registry

if TYPE_CHECKING:  # takes seconds to import
    from pytorch_lightning.loggers import Logger


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    """Which run a logger is opened for."""

    experiment: str
    method: str
    """As tables name it; the name of the logger run."""
    name: str
    """Of the run's directory."""
    folder: Path
    """For the files of this method's loggers, inside its run directory."""
    shared: Path
    """The same of the experiment's own method: for stores that hold all methods."""
    identity: str | None = None
    """What `Tracker.identity` said when an earlier process opened the run; None for a new one."""


class Tracker:
    """Base class: how a logger of Lightning is opened, continued and closed."""

    starts_over = False
    """Whether `open` clears what an earlier process wrote, so that a run that goes on is logged
    from its first round again."""

    def open(self, run: LoggedRun) -> Logger:
        """The logger of a run.

        Raises:
            Exception: any; the run goes on without the logger and says so in one line.
        """
        raise NotImplementedError

    def identity(self, logger: Any) -> str | None:
        """What finds the logger run again when the run goes on; None if its folder does."""
        return None

    def last_step(self, logger: Any, noted: int) -> int:
        """The last round that the logger has.

        Args:
            logger: of a run that goes on.
            noted: the last round of which this program knows that it was given.
        """
        return noted

    def close(self, logger: Any, state: str) -> None:
        """End the logger run.

        Args:
            logger: that was opened.
            state: `finished`, `stopped` or `failed`.
        """
        logger.finalize("failed" if state == "failed" else "success")


loggers: Registry[Tracker] = Registry("logger", "fedprompt.tracking.loggers")


def full_path(folder: str | None) -> str | None:
    """A folder of the user's, so that it is the same in every process."""
    return None if folder is None else str(Path(folder).expanduser().absolute())
