"""Where a result comes from: versions, machine, commit and date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from fedprompt.core.files import Json
from fedprompt.core.machine import available_cpus, cpu_name

if TYPE_CHECKING:
    pass


PACKAGES = (
    *("fedprompt", "torch", "torchvision", "timm", "pytorch-lightning", "torchmetrics", "ray"),
    *("numpy", "scipy", "scikit-learn", "omegaconf", "safetensors", "matplotlib", "rich", "click"),
)


def manifest() -> Json:
    """What is needed to tell where a result comes from: versions, machine, commit and date."""
    return {
        "date": now_utc(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "usable_cpus": available_cpus(),
        "git": _git_commit(Path(__file__).resolve()),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit(file: Path) -> Json | None:
    """Commit of the checkout that `file` is tracked in and whether it was changed, or None."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(file.parent), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return result.stdout.strip()

    try:
        # The package may be installed inside a checkout of something else: is it tracked?
        git("ls-files", "--error-unmatch", file.name)
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def now_utc() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
