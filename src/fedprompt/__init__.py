"""Federated prompt-tuning of a frozen Vision Transformer, simulated with PyTorch Lightning and Ray.

`fedprompt.run("quickstart")` runs an experiment, `fedprompt.load(RUN_DIR)` is the model of a run,
and `fedprompt.aggregation.create("pfpt")` makes an aggregator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["RunResult", "aggregation", "data", "export", "load", "models", "resume", "run"]

if TYPE_CHECKING:
    from fedprompt import aggregation, data, models
    from fedprompt.experiment import RunResult, resume, run
    from fedprompt.results import export, load


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing `fedprompt.aggregation` must not import Ray, Lightning or timm.
    if name in ("RunResult", "resume", "run"):
        return getattr(importlib.import_module("fedprompt.experiment"), name)
    if name in ("export", "load"):
        return getattr(importlib.import_module("fedprompt.results"), name)
    if name in ("aggregation", "data", "models"):
        return importlib.import_module(f"fedprompt.{name}")
    raise AttributeError(f"module 'fedprompt' has no attribute '{name}'")
