"""`scale`: the honest change, many times as large.

Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS 2020, Section 4.2 (model
replacement), here with an honest model: x + factor (y - x) for x received and y trained.
"""

from __future__ import annotations

import dataclasses

import torch

from fedprompt.attacks.base import Attack, AttackOptions, attacks, changed
from fedprompt.core.checks import is_number
from fedprompt.core.errors import ConfigError
from fedprompt.core.types import Broadcast, ClientUpdate


@dataclasses.dataclass(frozen=True)
class ScaleOptions(AttackOptions):
    """Options of scaling."""

    factor: float = 100.0
    """By which every change is multiplied; below 0, it is turned round as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.factor) or self.factor in (0, 1):
            raise ConfigError(
                f"attack.factor: expected a finite number other than 0 and 1, got {self.factor!r}"
            )


@attacks.register("scale", ScaleOptions)
class Scale(Attack):
    """Enlarges what was trained."""

    options: ScaleOptions

    def tamper(
        self, update: ClientUpdate, before: Broadcast, generator: torch.Generator
    ) -> ClientUpdate:
        """Scale every change.

        Args:
            update: of the attacker's training.
            before: what it received.
            generator: not used.
        """
        return changed(update, before, lambda change: change * self.options.factor)
