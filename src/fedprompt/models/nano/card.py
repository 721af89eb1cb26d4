"""The card beside embedded weights: JSON that says how they were made and what they reach."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from fedprompt.core.files import Json, atomic_write
from fedprompt.models.nano.recipe import TASKS, PretrainConfig


@dataclasses.dataclass(frozen=True)
class Training:
    """What a training of embedded weights was, besides its recipe."""

    classes: int
    images: int
    """Masks that were drawn."""
    parameters: int
    """Of the network, without task tokens."""
    device: str
    history: Sequence[Mapping[str, float]]
    """Loss and accuracy over the steps."""
    seconds: float
    init: Path | None
    """Weights that it continued from."""
    commit: str | None
    """Of the source tree when it started."""


def make_card(config: PretrainConfig, training: Training, weights: bytes) -> Json:
    """Everything that says how weights were made.

    Args:
        config: the recipe.
        training: what came of it.
        weights: the content of the file.
    """
    init = training.init
    return {
        "name": config.name,
        "recipe": dataclasses.asdict(config),
        "seed": config.seed,
        "init": None if init is None else {"file": init.name, "sha256": _sha256(init.read_bytes())},
        "tasks": list(TASKS) if config.promptable else [],
        "classes": training.classes,
        "images": training.images,
        "presentations": config.steps * config.batch_size,
        "parameters": training.parameters,
        "seconds": round(training.seconds, 1),
        "threads": config.threads,
        "device": training.device,
        "history": training.history,
        "versions": _versions(),
        "commit": training.commit,
        "sha256": _sha256(weights),
    }


def write_card(weights: Path, card: Mapping[str, object]) -> None:
    """Write the JSON card beside the weights."""
    atomic_write(weights.with_suffix(".json"), json.dumps(card, indent=2) + "\n")


def source_commit() -> str | None:
    """The commit of the source tree, or None outside a git checkout."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _versions() -> dict[str, str]:
    packages = ("torch", "timm", "numpy", "pillow", "matplotlib", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
