"""`csv`: Lightning's `CSVLogger`, a table `metrics.csv` with a row for each round."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from fedprompt.tracking.loggers import LoggedRun, Tracker, full_path, loggers

if TYPE_CHECKING:  # takes seconds to import
    from pytorch_lightning.loggers import CSVLogger


@dataclasses.dataclass(frozen=True)
class CSVOptions:
    """Options of `csv`."""

    folder: str | None = None
    """Where to write, in `RUN/METHOD`; null means `loggers/csv` in the run directory."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", full_path(self.folder))


@loggers.register("csv", CSVOptions)
class CSVTracker(Tracker):
    """Writes `metrics.csv` and `hparams.yaml`."""

    starts_over = True  # as Lightning's logger does

    def __init__(self, options: CSVOptions) -> None:
        self.options = options

    def open(self, run: LoggedRun) -> CSVLogger:
        """See `Tracker.open`."""
        from pytorch_lightning.loggers import CSVLogger

        folder = run.folder / "csv"
        if self.options.folder is not None:
            folder = Path(self.options.folder) / run.name / run.method
        return CSVLogger(folder.parent, name="", version=folder.name, flush_logs_every_n_steps=1)
