"""`wandb`: Lightning's `WandbLogger`, offline by default."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprompt.core.checks import check_choice
from fedprompt.tracking.loggers import LoggedRun, Tracker, full_path, loggers

if TYPE_CHECKING:  # takes seconds to import
    from pytorch_lightning.loggers import WandbLogger

MODES = ("offline", "online")


@dataclasses.dataclass(frozen=True)
class WandbOptions:
    """Options of `wandb`."""

    project: str = "fedprompt"
    """W&B's project."""
    entity: str | None = None
    """User or team; null means the account's own."""
    mode: str = "offline"
    """`offline` writes files, which `wandb sync` uploads; `online` needs a login."""
    folder: str | None = None
    """Where to write; null means `loggers` in the run directory."""

    def __post_init__(self) -> None:
        check_choice("wandb.mode", self.mode, MODES)
        object.__setattr__(self, "folder", full_path(self.folder))


@loggers.register("wandb", WandbOptions)
class WandbTracker(Tracker):
    """One W&B run for each method, in a group that is named after the run directory."""

    def __init__(self, options: WandbOptions) -> None:
        self.options = options

    def open(self, run: LoggedRun) -> WandbLogger:
        """See `Tracker.open`."""
        from pytorch_lightning.loggers import WandbLogger

        os.environ.setdefault("WANDB_SILENT", "true")
        folder = self.options.folder or str(run.shared)
        Path(folder).mkdir(parents=True, exist_ok=True)  # without it W&B writes elsewhere
        logger = WandbLogger(
            name=run.method,
            save_dir=folder,
            project=self.options.project,
            entity=self.options.entity,
            offline=self.options.mode == "offline",
            id=run.identity,
            resume="allow",
            group=run.name,
            reinit="create_new",  # the methods of a run follow each other in one process
        )
        # Silent or not, it warns of an argument that Lightning gives it.
        with contextlib.redirect_stderr(io.StringIO()):
            _ = logger.experiment
        return logger

    def identity(self, logger: Any) -> str | None:
        """W&B's id of the run."""
        return str(logger.experiment.id)

    def close(self, logger: Any, state: str) -> None:
        """End W&B's own process, too."""
        logger.finalize("failed" if state == "failed" else "success")
        logger.experiment.finish(exit_code=int(state == "failed"))
