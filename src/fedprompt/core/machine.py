"""What this machine offers, found without torch, which may be broken."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def available_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """What the processor calls itself, with family and model, on which the last bits of a product
    depend; as far as the system reports it.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    pairs = (line.partition(":") for line in reversed(lines))
    values = {key.strip(): value.strip() for key, _, value in pairs}
    name = values.get("model name") or platform.processor() or "unknown"
    if "cpu family" in values and "model" in values:
        name += f" (family {values['cpu family']}, model {values['model']})"
    return name
