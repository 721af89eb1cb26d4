"""FedBuff (Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS
2022, Algorithm 1): the server steps by the mean of K clients' differences, each scaled by s(tau).

    w <- w + eta * mean_k s(tau_k) (w_k - w^(version of k))

The mean is that of a synchronous round, weighted by sample counts; the paper's has equal weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedprompt.server.schedules.base import Schedule, towards


class FedBuff(Schedule):
    """Adds a client's difference to the server's model of now."""

    default_step = 1.0
    takes_buffer = True

    def moved(self, sent: Tensor, base: Tensor, now: Tensor, step: float, weight: float) -> Tensor:
        """now + step * weight * (sent - base); what is not stale keeps its bits at step 1.

        Args:
            sent: by the client.
            base: what the client received.
            now: the server's.
            step: `system.step`.
            weight: s(tau).
        """
        if step * weight == 1 and torch.equal(base, now):
            return sent
        return towards(now, sent, base, step * weight)
