"""An objective with a server half: FedCM, whose clients step along the last round's direction, too.

Xu, Wang, Wang and Yao, "FedCM: Federated Learning with Client-level Momentum", arXiv 2106.10874,
2021, Algorithm 2. With x the broadcast values, S the round's clients, K local steps at rate eta and
g a batch's gradient:

    client  v = alpha g + (1 - alpha) Delta;  x_i <- x_i - eta v
    server  Delta <- mean over S of (x - x_i) / (eta K);  x <- mean over S of x_i

The local loop adds constants to gradients, so a client steps by v / alpha = g + (1 - alpha) / alpha
Delta: the configured rate is alpha eta. The server's rate is 1, as in the mean of FedAvg.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fedprompt.core.errors import ConfigError
from fedprompt.core.types import ClientUpdate, Tensors
from fedprompt.objectives.base import LocalResult, Objective, objectives

PREFIX = "momentum."
"""Of Delta's part for each trained tensor, among the shared tensors."""


@dataclasses.dataclass(frozen=True)
class FedCmOptions:
    """Options of `fedcm`."""

    alpha: float = 0.5
    """How much a step follows the client's own gradient; 1 is FedAvg."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(
                f"objective.alpha: expected a number above 0 and at most 1, got {self.alpha}"
            )


@objectives.register("fedcm", FedCmOptions)
class FedCm(Objective):
    """Every local step is pulled towards the average step of the last round."""

    needs_sgd = True
    options: FedCmOptions

    def begin(self, trainable: Tensors) -> dict[str, Tensor]:
        """Zero: the first round is FedAvg."""
        return {PREFIX + name: torch.zeros_like(value) for name, value in trainable.items()}

    # The client's half.

    def correction(self, received: Tensors, own: Tensors) -> dict[str, Tensor]:
        """(1 - alpha) / alpha Delta for every tensor that has a part of it."""
        factor = (1 - self.options.alpha) / self.options.alpha
        return {
            name.removeprefix(PREFIX): factor * delta
            for name, delta in received.items()
            if name.startswith(PREFIX)
        }

    def finish(self, result: LocalResult) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The average step v of each tensor goes to the server; nothing is kept."""
        sent = {}
        for key, delta in result.received.items():
            if key.startswith(PREFIX):
                name = key.removeprefix(PREFIX)
                length = result.steps * result.rates[name]
                moved = self.options.alpha * (result.start[name] - result.end[name])
                sent[key] = moved / length if length else delta
        return sent, {}

    # The server's half.

    def is_mean(self, name: str) -> bool:
        """Delta is computed here: an optimiser of the server leaves it alone."""
        return not name.startswith(PREFIX)

    def combine(
        self,
        before: Tensors,
        mean: Tensors,
        updates: Sequence[ClientUpdate],
        num_clients: int,
        memory: Tensors,
    ) -> tuple[Tensors, Tensors]:
        """Delta is the plain mean over the clients, however many images each has."""
        shared = dict(mean)
        for name in before:
            if name.startswith(PREFIX):
                steps = torch.stack([update.shared[name] for update in updates])
                shared[name] = steps.mean(dim=0)
        return shared, memory
