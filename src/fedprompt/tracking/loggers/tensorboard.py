"""`tensorboard`: Lightning's `TensorBoardLogger`, with scalars in double precision."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprompt.tracking.loggers import LoggedRun, Tracker, full_path, loggers

if TYPE_CHECKING:  # takes seconds to import
    from pytorch_lightning.loggers import TensorBoardLogger


@dataclasses.dataclass(frozen=True)
class TensorBoardOptions:
    """Options of `tensorboard`."""

    folder: str | None = None
    """Where to write, in `RUN/METHOD`; null means `loggers/tensorboard` in the run directory."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", full_path(self.folder))


@loggers.register("tensorboard", TensorBoardOptions)
class TensorBoardTracker(Tracker):
    """Writes event files, which `tensorboard --logdir` reads."""

    starts_over = True

    def __init__(self, options: TensorBoardOptions) -> None:
        self.options = options

    def open(self, run: LoggedRun) -> TensorBoardLogger:
        """See `Tracker.open`."""
        folder = run.folder / "tensorboard"
        if self.options.folder is not None:
            folder = Path(self.options.folder) / run.name / run.method
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        (folder / "hparams.yaml").unlink(missing_ok=True)
        return _logger_class()(folder.parent, name="", version=folder.name, default_hp_metric=False)


def _logger_class() -> type[TensorBoardLogger]:
    """Lightning's logger, but for the precision of scalars: Ray brings tensorboardX, whose
    `add_scalar` rounds to float32.
    """
    from pytorch_lightning.loggers import TensorBoardLogger

    class DoubleTensorBoardLogger(TensorBoardLogger):
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            for name, value in metrics.items():
                _add_double(self.experiment, name, float(value), step)

    return DoubleTensorBoardLogger


def _add_double(writer: Any, name: str, value: float, step: int | None) -> None:
    """One scalar as TensorBoard keeps those of double precision: a tensor without axes.

    Args:
        writer: the `SummaryWriter` of torch or of tensorboardX.
        name: of the curve.
        value: at the step.
        step: from 1.
    """
    if not type(writer).__module__.startswith("tensorboardX"):
        writer.add_scalar(name, value, step, new_style=True, double_precision=True)
        return
    summaries: Any = importlib.import_module("tensorboardX.proto.summary_pb2")
    tensors: Any = importlib.import_module("tensorboardX.proto.tensor_pb2")
    plugin = summaries.SummaryMetadata.PluginData(plugin_name="scalars")
    entry = summaries.Summary.Value(
        tag=name,
        tensor=tensors.TensorProto(double_val=[value], dtype="DT_DOUBLE"),
        metadata=summaries.SummaryMetadata(plugin_data=plugin),
    )
    writer.file_writer.add_summary(summaries.Summary(value=[entry]), step)
