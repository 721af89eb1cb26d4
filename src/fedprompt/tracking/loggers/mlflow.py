"""`mlflow`: Lightning's `MLFlowLogger`, on a local store or a tracking server."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from fedprompt.tracking.loggers import LoggedRun, Tracker, full_path, loggers

if TYPE_CHECKING:  # takes seconds to import
    from pytorch_lightning.loggers import MLFlowLogger

ALWAYS = "num_prompts"
"""A figure that every round has: its history says which rounds a store has."""
ENVIRONMENT = {
    # A server that does not answer would hold each round up for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # Else a store of plain files, which the user has asked for, is refused.
    "MLFLOW_ALLOW_FILE_STORE": "true",
}
"""What MLflow reads, unless the user has set it."""


@dataclasses.dataclass(frozen=True)
class MLflowOptions:
    """Options of `mlflow`."""

    tracking_uri: str | None = None
    """`http://HOST:5000`, `sqlite:///FILE` or a folder; null means `loggers/mlflow.db` in the run
    directory."""
    experiment: str | None = None
    """MLflow's experiment; null means the name of ours."""

    def __post_init__(self) -> None:
        if self.tracking_uri is not None and ":" not in self.tracking_uri:
            object.__setattr__(self, "tracking_uri", full_path(self.tracking_uri))


@loggers.register("mlflow", MLflowOptions)
class MLflowTracker(Tracker):
    """One MLflow run for each method, named after it."""

    def __init__(self, options: MLflowOptions) -> None:
        self.options = options

    def open(self, run: LoggedRun) -> MLFlowLogger:
        """See `Tracker.open`."""
        from pytorch_lightning.loggers import MLFlowLogger

        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        uri = self.options.tracking_uri
        if uri is None:
            run.shared.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{run.shared / 'mlflow.db'}"
        logger = MLFlowLogger(
            experiment_name=self.options.experiment or run.experiment,
            run_name=run.method,
            tracking_uri=uri,
            tags={"fedprompt.run": run.name},
            artifact_location=None
            if self.options.tracking_uri
            else (run.shared / "mlflow").as_uri(),
            run_id=run.identity,
        )
        if run.identity is not None:
            logger.experiment.update_run(run.identity, status="RUNNING")
        return logger

    def identity(self, logger: Any) -> str | None:
        """MLflow's id of the run."""
        return str(logger.version)

    def last_step(self, logger: Any, noted: int) -> int:
        """By the store itself: it takes the figures of a round together or not at all."""
        history = logger.experiment.get_metric_history(logger.version, ALWAYS)
        return max((metric.step for metric in history), default=0)

    def close(self, logger: Any, state: str) -> None:
        """MLflow calls a run that was stopped killed."""
        logger.finalize({"finished": "success", "stopped": "KILLED"}.get(state, "failed"))
