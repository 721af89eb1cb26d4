"""`sign_flip`: the honest change, turned round.

Li et al., "RSA: Byzantine-Robust Stochastic Aggregation Methods for Distributed Learning from
Heterogeneous Datasets", AAAI 2019, Section 5 (sign-flipping attack): x - factor (y - x).
"""

from __future__ import annotations

import dataclasses

import torch

from fedprompt.attacks.base import Attack, AttackOptions, attacks, changed
from fedprompt.core.checks import check_number
from fedprompt.core.types import Broadcast, ClientUpdate


@dataclasses.dataclass(frozen=True)
class SignFlipOptions(AttackOptions):
    """Options of turning round."""

    factor: float = 4.0
    """How large the turned change is; 4 as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("attack.factor", self.factor, 0, above=True)


@attacks.register("sign_flip", SignFlipOptions)
class SignFlip(Attack):
    """Undoes what was trained."""

    options: SignFlipOptions

    def tamper(
        self, update: ClientUpdate, before: Broadcast, generator: torch.Generator
    ) -> ClientUpdate:
        """Turn every change round.

        Args:
            update: of the attacker's training.
            before: what it received.
            generator: not used.
        """
        return changed(update, before, lambda change: change * -self.options.factor)
