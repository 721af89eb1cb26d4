"""Figures of the rounds as metrics of Ray, which Prometheus reads where Ray's dashboard is up."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

GAUGES = {
    "round": "Finished rounds.",
    "accuracy": "Accuracy of the global model on the test split.",
    "validation_accuracy": "Accuracy of the global model on the validation split.",
    "loss": "Loss of the global model on the test split.",
    "train_loss": "Mean of the clients' losses.",
    "bytes_up": "Bytes from the clients to the server in the round.",
    "bytes_down": "Bytes from the server to the clients in the round.",
}
"""Ray puts `ray_` before the name, so that the first is called `ray_fedprompt_round`."""


class RoundGauges:
    """Gauges `fedprompt_NAME`, each with the tags `run` and `method`; made when first set."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] | None = None

    def set(self, run: str, method: str, figures: Mapping[str, float]) -> None:
        """Set the gauges; if Ray cannot, nothing else happens.

        Args:
            run: name of the run's directory.
            method: as tables name it.
            figures: of a round, by name; those that were not measured are missing.
        """
        try:
            if self._gauges is None:
                metrics: Any = importlib.import_module("ray.util.metrics")
                self._gauges = {
                    name: metrics.Gauge(
                        f"fedprompt_{name}", description=text, tag_keys=("run", "method")
                    )
                    for name, text in GAUGES.items()
                }
            for name, gauge in self._gauges.items():
                if name in figures:
                    gauge.set(figures[name], tags={"run": run, "method": method})
        except Exception as error:
            self._gauges = {}
            logger.info("no metrics for Prometheus: %s", error)
