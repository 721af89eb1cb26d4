"""Which frozen backbone an experiment stands on: plain options, imported without timm."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The `model` section."""

    backbone: str = "nano"
