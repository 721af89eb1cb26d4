"""An objective with a loss of its own: FedProto, whose clients pull features to class prototypes.

Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI 2022,
arXiv 2105.00243, Eq. 6 and 7. With z the feature of an image of class c, N_ic the images of that
class at client i, and p_c the prototype of the class:

    loss = cross-entropy + weight mean over the batch of |z - p_c|^2 / d
    p_c  = sum over the cohort of (sum of z over the client's images of c) / sum of N_ic

d is the width of a feature. A class that no client of the last round holds keeps its prototype; one
without a prototype pulls nothing. Here prompts and head are averaged beside it, as everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.core.errors import ConfigError
from fedprompt.core.types import ClientUpdate, Parts, Tensors
from fedprompt.objectives import Finished, LocalResult, LossContext, Objective, objectives

WEIGHT = "0.weight"
"""The weight (C, d) of a linear head."""


@dataclasses.dataclass(frozen=True)
class FedProtoOptions:
    """Options of `fedproto`."""

    weight: float = 1.0
    """How much the distance to the prototypes counts; 0 is FedAvg."""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ConfigError(f"objective.weight: expected a number >= 0, got {self.weight}")


@objectives.register("fedproto", FedProtoOptions)
class FedProto(Objective):
    """Broadcasts a prototype for each class, and learns them from the clients' features."""

    compares_features = True
    options: FedProtoOptions

    # The client's half.

    def loss(
        self, logits: Tensor, labels: Tensor, features: Tensor, context: LossContext
    ) -> Tensor:
        """Cross-entropy, and the distance to the prototypes of the labels."""
        plain = super().loss(logits, labels, features, context)
        prototypes = context.received["prototypes"][labels]
        known = context.received["known"][labels]
        distances = (features - prototypes).square().mean(dim=1) * known
        return plain + self.options.weight * distances.mean()

    def finish(self, result: LocalResult) -> Finished:
        """The sums of the trained model's features for each class, and how many there are."""
        one_hot = F.one_hot(result.labels, result.num_classes).float()
        return Finished({"prototypes": one_hot.T @ result.encode(), "known": one_hot.sum(dim=0)})

    # The server's half.

    def begin(self, trainable: Parts) -> Tensors:
        """No prototype is known: the first round is FedAvg."""
        if not {WEIGHT} <= trainable.head.keys() <= {WEIGHT, "0.bias"}:
            raise ConfigError(
                "objective=fedproto: expected head=linear and head.mode=shared, which say how many "
                f"classes there are, got {sorted(trainable.head)}"
            )
        weight = torch.zeros_like(trainable.head[WEIGHT])
        return {"prototypes": weight, "known": torch.zeros(len(weight))}

    def combine(
        self,
        before: Parts,
        mean: Parts,
        updates: Sequence[ClientUpdate],
        num_clients: int,
        memory: Tensors,
    ) -> tuple[Parts, Tensors]:
        """The mean feature of each class over all images of the cohort."""
        sums = torch.stack([each.shared.objective["prototypes"] for each in updates]).sum(dim=0)
        counts = torch.stack([each.shared.objective["known"] for each in updates]).sum(dim=0)
        held = counts > 0
        own = {
            "prototypes": torch.where(
                held[:, None],
                sums / counts.clamp_min(1)[:, None],
                before.objective["prototypes"],
            ),
            "known": torch.maximum(held.float(), before.objective["known"]),
        }
        return dataclasses.replace(mean, objective=own), memory
