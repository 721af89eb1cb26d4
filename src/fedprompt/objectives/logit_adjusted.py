"""`logit_adjusted`: cross-entropy that knows how often each class occurs at the client.

    loss    = CE(logits + tau log pi_t, label)
    pi_t(c) = (N_tc + smoothing) / sum over classes c' of (N_tc' + smoothing)

A client that has one class nearly alone lowers plain cross-entropy by predicting that class for
everything; that drift says nothing about the images, and here it gains nothing. Predictions use the
logits as they are. Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021, Eq. 10; for
clients' label skew: Zhang et al., "Federated Learning with Label Distribution Skew via Logits
Calibration", ICML 2022 (whose margin is a power of N_tc in place of its logarithm).
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from fedprompt.core.checks import check_number
from fedprompt.objectives.base import Objective, objectives


@dataclasses.dataclass(frozen=True)
class LogitAdjustedOptions:
    """Options of the adjustment."""

    tau: float = 1.0
    """Factor on the log class frequencies; 0 is plain cross-entropy."""
    smoothing: float = 1.0
    """Images that are added to each class, so that an absent one has a finite logarithm."""

    def __post_init__(self) -> None:
        check_number("objective.tau", self.tau, 0)
        check_number("objective.smoothing", self.smoothing, 0, above=True)


@objectives.register("logit_adjusted", LogitAdjustedOptions)
class LogitAdjusted(Objective):
    """Adds the client's log class frequencies to the logits of its loss."""

    options: LogitAdjustedOptions

    def logit_shift(self, class_counts: Tensor) -> Tensor | None:
        """tau log pi_t, or None when tau is 0.

        >>> import torch
        >>> LogitAdjusted(LogitAdjustedOptions()).logit_shift(torch.tensor([2, 0])).exp()
        tensor([0.7500, 0.2500])
        """
        if self.options.tau == 0:
            return None
        counts = class_counts.float() + self.options.smoothing
        return self.options.tau * (counts / counts.sum()).log()
