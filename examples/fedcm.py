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
from fedprompt.core.types import ClientUpdate, Parts, Tensors
from fedprompt.objectives.base import Finished, LocalResult, Objective, objectives


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
    """Every local step is pulled towards the average step of the last round.

    Delta has a tensor for each trained one, under its path (`prompts`, `head.weight`, ...).
    """

    needs_sgd = True
    options: FedCmOptions

    # The client's half.

    def correction(self, received: Tensors, own: Tensors) -> dict[str, Tensor]:
        """(1 - alpha) / alpha Delta."""
        factor = (1 - self.options.alpha) / self.options.alpha
        return {path: factor * delta for path, delta in received.items()}

    def finish(self, result: LocalResult) -> Finished:
        """The average step v of each tensor goes to the server; nothing is kept."""
        start, end = result.start.tensors(), result.end.tensors()
        sent = {}
        for path, delta in result.received.objective.items():
            length = result.steps * result.rates[path]
            moved = self.options.alpha * (start[path] - end[path])
            # Nothing moved at rate 0, so nothing was learnt about the gradient.
            sent[path] = moved / length if length else delta.clone()
        return Finished(sent)

    # The server's half.

    def begin(self, trainable: Parts) -> Tensors:
        """Zero: the first round is FedAvg."""
        return {path: torch.zeros_like(value) for path, value in trainable.tensors().items()}

    def combine(
        self,
        before: Parts,
        mean: Parts,
        updates: Sequence[ClientUpdate],
        num_clients: int,
        memory: Tensors,
    ) -> tuple[Parts, Tensors]:
        """Delta is the plain mean over the clients, however many images each has."""
        delta = {
            path: torch.stack([update.shared.objective[path] for update in updates]).mean(dim=0)
            for path in before.objective
        }
        return dataclasses.replace(mean, objective=delta), memory
