"""`gaussian`: noise in the place of a change.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS
2017, Section 5 (Gaussian attack): x + e with e ~ N(0, std^2 I).
"""

from __future__ import annotations

import dataclasses

import torch

from fedprompt.attacks.base import Attack, AttackOptions, attacks, changed
from fedprompt.core.checks import check_number
from fedprompt.core.types import Broadcast, ClientUpdate


@dataclasses.dataclass(frozen=True)
class GaussianOptions(AttackOptions):
    """Options of noise."""

    std: float = 1.0
    """Standard deviation of each number's noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("attack.std", self.std, 0, above=True)


@attacks.register("gaussian", GaussianOptions)
class Gaussian(Attack):
    """Sends noise around what was received."""

    options: GaussianOptions

    def tamper(
        self, update: ClientUpdate, before: Broadcast, generator: torch.Generator
    ) -> ClientUpdate:
        """Draw every change.

        Args:
            update: of the attacker's training.
            before: what it received.
            generator: draws the noise.
        """

        def noise(change: torch.Tensor) -> torch.Tensor:
            drawn = torch.randn(change.shape, generator=generator, dtype=torch.float64)
            return drawn * self.options.std

        return changed(update, before, noise)
