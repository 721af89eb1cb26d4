"""Stopping: what SIGINT and SIGTERM do to the program."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """A signal asked the process to stop; no `Exception`, so that nothing swallows it."""


class StopSignals:
    """While entered, the first SIGINT or SIGTERM raises `Interrupted`; the third ends the process.

    `number` remembers the signal: an exception that is raised inside Ray's compiled code comes out
    as a `SystemError`, so its type does not show it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGINT, signal.SIGTERM):
                self._before[each] = signal.signal(each, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        # After a signal everything is on its way out, where a second one must not disturb.
        if self.number is None:
            for each, handler in self._before.items():
                signal.signal(each, handler)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._count += 1
        if self._count == 1:
            self.number = number
            raise Interrupted
        if self._count >= 3:  # putting things away hangs
            os._exit(128 + number)
