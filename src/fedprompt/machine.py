"""What this machine offers, found without torch, which may be broken."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
