"""Asynchronous schedules: what an update counts that was trained on an older model."""

from __future__ import annotations

from fedprompt.server.schedules.base import Schedule, Staleness
from fedprompt.server.schedules.fedasync import FedAsync
from fedprompt.server.schedules.fedbuff import FedBuff

SCHEDULES: dict[str, type[Schedule]] = {"fedasync": FedAsync, "fedbuff": FedBuff}

__all__ = ["SCHEDULES", "FedAsync", "FedBuff", "Schedule", "Staleness"]
