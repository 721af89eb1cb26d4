"""`label_smoothing`: cross-entropy against labels that leave a share to the other classes.

With e the share and D the classes of the image's domain, C of them in number:

    loss = -(1 - e) log p(label) - e / C sum over classes c of D of log p(c)

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, Section 7.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fedprompt.core.checks import check_number
from fedprompt.objectives.base import LossContext, Objective, objectives


@dataclasses.dataclass(frozen=True)
class LabelSmoothingOptions:
    """Options of label smoothing."""

    smoothing: float = 0.1
    """Share of a label that is spread evenly over all classes of the image's domain; 0 is plain
    cross-entropy."""

    def __post_init__(self) -> None:
        check_number("objective.smoothing", self.smoothing, 0, below=1)


@objectives.register("label_smoothing", LabelSmoothingOptions)
class LabelSmoothing(Objective):
    """Mixes each label with the even distribution."""

    options: LabelSmoothingOptions

    def loss(
        self, logits: Tensor, labels: Tensor, features: Tensor, context: LossContext
    ) -> Tensor:
        """Cross-entropy against smoothed labels.

        Args:
            logits: (B, C), minus infinity for the classes of other domains.
            labels: (B,)
            features: (B, feature_dim); not used.
            context: not used.

        """
        share = self.options.smoothing
        plain = super().loss(logits, labels, features, context)
        if share == 0:
            return plain
        known = torch.isfinite(logits)
        logs = logits.log_softmax(dim=1).where(known, torch.zeros_like(logits))
        even = -(logs.sum(dim=1) / known.sum(dim=1)).mean()
        return (1 - share) * plain + share * even
