"""`free_rider`: what was received, sent back as if it had been trained.

Lin, Du and Liu, "Free-riders in Federated Learning: Attacks and Defenses", 2019, Section 3. In the
simulation a free rider trains all the same, and throws the result away: its loss and accuracy are
those that it would have to make up.
"""

from __future__ import annotations

import torch

from fedprompt.attacks.base import Attack, AttackOptions, attacks, changed
from fedprompt.core.types import Broadcast, ClientUpdate


@attacks.register("free_rider", AttackOptions)
class FreeRider(Attack):
    """Sends no change."""

    def tamper(
        self, update: ClientUpdate, before: Broadcast, generator: torch.Generator
    ) -> ClientUpdate:
        """Take every change back.

        Args:
            update: of the attacker's training.
            before: what it received.
            generator: not used.
        """
        return changed(update, before, torch.zeros_like)
