"""`none`: all clients are honest."""

from __future__ import annotations

import dataclasses

from fedprompt.attacks.base import Attack, attacks


@dataclasses.dataclass(frozen=True)
class NoneOptions:
    """No options."""


@attacks.register("none", NoneOptions)
class NoAttack(Attack):
    """Nobody attacks."""

    acts = False
