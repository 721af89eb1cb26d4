"""`krum`: only updates that lie close to many others are merged.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS
2017, Section 4 (Krum) and Section 6 (Multi-Krum). Of m updates f may be anything. The score of an
update is the sum of the squared distances to its m - f - 2 nearest others, over prompts and shared
tensors as one vector. The `keep` updates with the lowest scores are merged, as ever by their
weights. The theorem asks for m > 2 f + 2.

Prompts are compared by broadcast row, and a row that a client did not use counts as unchanged. So
where clients of different domains use different prompts, a small domain may look like an attack.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fedprompt.core.checks import check_integer, check_number
from fedprompt.defences.base import Array, Defence, Defended, Updates, defences


@dataclasses.dataclass(frozen=True)
class KrumOptions:
    """Options of Krum."""

    share: float = 0.2
    """f as a share of the round's clients, rounded up."""
    keep: int | None = None
    """Updates that are merged; 1 is Krum itself, null for all but f (Multi-Krum)."""

    def __post_init__(self) -> None:
        check_number("defence.share", self.share, 0, below=0.5)
        if self.keep is not None:
            check_integer("defence.keep", self.keep, 1)


@defences.register("krum", KrumOptions)
class Krum(Defence):
    """Leaves out what lies apart."""

    options: KrumOptions

    def fault_of_cohort(self, size: int) -> str | None:
        """Whether the theorem does not hold.

        Args:
            size: clients of a round.
        """
        attackers = self.attackers(size)
        if size >= 2 * attackers + 3:
            return None
        return (
            f"expected at least 2 f + 3 clients a round, got {size} with f = {attackers} "
            f"(defence.share={self.options.share:g}); raise clients.per_round or lower "
            "defence.share"
        )

    def attackers(self, size: int) -> int:
        """f among `size` clients.

        >>> Krum(KrumOptions()).attackers(10), Krum(KrumOptions()).attackers(11)
        (2, 3)
        """
        return math.ceil(self.options.share * size - 1e-9)

    def defend(self, given: Updates) -> Defended:
        """Leave out the updates with the highest scores; ties keep the lower client.

        Args:
            given: a round's usable updates.
        """
        size = len(given)
        attackers = min(self.attackers(size), max((size - 3) // 2, 0))
        scores = krum_scores(given.changes(), max(size - attackers - 2, 1))
        keep = min(size - attackers if self.options.keep is None else self.options.keep, size)
        kept = set(np.argsort(scores, kind="stable")[:keep].tolist())
        updates = [update for place, update in enumerate(given.updates) if place in kept]
        out = [update.client_id for place, update in enumerate(given.updates) if place not in kept]
        return Defended(updates, dict.fromkeys(out, "left out"))


def krum_scores(points: Array, neighbours: int) -> Array:
    """(m,) sum of the squared distances to the nearest others.

    Args:
        points: (m, D)
        neighbours: how many others count.

    >>> krum_scores(np.array([[0.0], [1.0], [3.0], [50.0]]), 1)
    array([1.000e+00, 1.000e+00, 4.000e+00, 2.209e+03])
    """
    squared = np.stack([((points - point) ** 2).sum(axis=1) for point in points])
    np.fill_diagonal(squared, np.inf)
    nearest = np.sort(squared, axis=1)[:, : min(neighbours, len(points) - 1)]
    return np.asarray(nearest.sum(axis=1))
