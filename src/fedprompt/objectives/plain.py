"""`plain`: cross-entropy alone, the local objective of FedAvg.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, Algorithm 1.
"""

from __future__ import annotations

import dataclasses

from fedprompt.objectives.base import Objective, objectives


@dataclasses.dataclass(frozen=True)
class PlainOptions:
    """No options."""


@objectives.register("plain", PlainOptions)
class Plain(Objective):
    """Adds nothing to the loss."""
