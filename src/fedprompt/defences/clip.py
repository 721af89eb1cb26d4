"""`clip`: no update may move the server further than a bound.

Sun, Kairouz, Suresh and McMahan, "Can You Really Backdoor Federated Learning?", 2019, Section 4
(norm thresholding). With D_i what client i did to prompts and shared tensors, as one vector:

    D_i <- D_i min(1, bound / ||D_i||)

Without a bound of the user's own it is the median of the round's norms, so that half of the updates
pass as they are. Keys are no changes, and pass as they are.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fedprompt.core.checks import check_number
from fedprompt.defences.base import Defence, Defended, Updates, defences


@dataclasses.dataclass(frozen=True)
class ClipOptions:
    """Options of clipping."""

    bound: float | None = None
    """Largest norm of a whole update; null for the median of the round's norms."""

    def __post_init__(self) -> None:
        if self.bound is not None:
            check_number("defence.bound", self.bound, 0, above=True)


@defences.register("clip", ClipOptions)
class Clip(Defence):
    """Scales long updates down."""

    options: ClipOptions

    def defend(self, given: Updates) -> Defended:
        """Scale what is longer than the bound.

        Args:
            given: a round's usable updates.
        """
        norms = np.linalg.norm(given.changes(), axis=1)
        bound = float(np.median(norms)) if self.options.bound is None else self.options.bound
        updates, actions = [], {}
        for update, norm in zip(given.updates, norms.tolist(), strict=True):
            if norm > bound:
                factor = bound / norm
                actions[update.client_id] = f"clipped to {factor:.3g} of its length"
                update = given.scaled(update, factor)
            updates.append(update)
        return Defended(updates, actions)
