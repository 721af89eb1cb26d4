"""`proximal`: FedProx.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, Eq. 2.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fedprompt.core.checks import check_number
from fedprompt.core.types import Parts
from fedprompt.objectives.base import Objective, objectives


@dataclasses.dataclass(frozen=True)
class ProximalOptions:
    """Options of FedProx."""

    mu: float = 1e-3
    """Weight of the squared distance to the broadcast tensors; 0 is FedAvg."""

    def __post_init__(self) -> None:
        check_number("objective.mu", self.mu, 0)


@objectives.register("proximal", ProximalOptions)
class Proximal(Objective):
    """Adds (mu / 2) * ||w - w_broadcast||^2 over all trainable tensors."""

    options: ProximalOptions

    def penalty(self, current: Parts, start: Parts) -> Tensor | None:
        """The proximal term, or None when mu is 0."""
        if self.options.mu == 0:
            return None
        pairs = zip(current.tensors().values(), start.tensors().values(), strict=True)
        return self.options.mu / 2 * torch.stack([(w - w0).square().sum() for w, w0 in pairs]).sum()
