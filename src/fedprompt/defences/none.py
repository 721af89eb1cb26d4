"""`none`: every update is merged as it is."""

from __future__ import annotations

import dataclasses

from fedprompt.defences.base import Defence, Defended, Updates, defences


@dataclasses.dataclass(frozen=True)
class NoneOptions:
    """No options."""


@defences.register("none", NoneOptions)
class NoDefence(Defence):
    """Changes nothing."""

    acts = False

    def defend(self, given: Updates) -> Defended:
        """All updates.

        Args:
            given: a round's usable updates.
        """
        return Defended(given.updates)
