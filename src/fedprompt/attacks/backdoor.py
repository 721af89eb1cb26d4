"""`backdoor`: images of one class are to be taken for another one, and all else is to stay good.

Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS 2020: a semantic backdoor (Section
4.1: images with a feature of their own, here those of a class, that need no change of pixels),
trained beside the honest task and enlarged so that it outlives the average (Section 4.2, Eq. 3):
x + boost (y - x). Its success is the share of the source class that is taken for the target class.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from fedprompt.attacks.base import Attack, AttackOptions, attacks, changed
from fedprompt.core.checks import check_integer, check_number
from fedprompt.core.errors import ConfigError
from fedprompt.core.types import Broadcast, ClientUpdate


@dataclasses.dataclass(frozen=True)
class BackdoorOptions(AttackOptions):
    """Options of a backdoor."""

    source: int = 0
    """Class whose images are to be mistaken, from 0."""
    target: int = 1
    """Class that they are to be taken for; a domain that lacks it is left alone."""
    boost: float = 10.0
    """By which every change is multiplied."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("source", "target"):
            check_integer(f"attack.{field}", getattr(self, field), 0)
        check_number("attack.boost", self.boost, 0, above=True)
        if self.source == self.target:
            raise ConfigError(
                f"attack.target: expected another class than attack.source, got {self.target} twice"
            )


@attacks.register("backdoor", BackdoorOptions)
class Backdoor(Attack):
    """Trains on labels of which one class is wrong, and sends more than it trained."""

    options: BackdoorOptions

    def labels(
        self, labels: NDArray[np.int64], groups: NDArray[np.int64], class_mask: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """The target's label for images of the source class.

        Args:
            labels: (N,) the true ones.
            groups: (N,) domain of each image.
            class_mask: (groups, C)

        Raises:
            ConfigError: there is no such class.
        """
        source, target, number = self.options.source, self.options.target, class_mask.shape[1]
        if max(source, target) >= number:
            raise ConfigError(
                f"attack.source, attack.target: expected classes from 0 to {number - 1}, got "
                f"{source} and {target}"
            )
        meant = (labels == source) & class_mask[groups, target]
        return np.where(meant, np.array(target, dtype=labels.dtype), labels)

    def tamper(
        self, update: ClientUpdate, before: Broadcast, generator: torch.Generator
    ) -> ClientUpdate:
        """Enlarge every change.

        Args:
            update: of the attacker's training.
            before: what it received.
            generator: not used.
        """
        return changed(update, before, lambda change: change * self.options.boost)
