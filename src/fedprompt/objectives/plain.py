"""`plain`: cross-entropy alone (FedAvg's local objective)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from fedprompt.objectives.base import objectives


@dataclasses.dataclass(frozen=True)
class PlainOptions:
    """No options."""


@objectives.register("plain", PlainOptions)
class Plain:
    """Adds nothing to the loss."""

    def __init__(self, options: PlainOptions) -> None:
        self.options = options

    def penalty(self, current: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor | None:
        """None: nothing is added."""
        return None
