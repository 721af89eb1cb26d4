"""FedAsync (Xie et al., "Asynchronous Federated Optimization", OPT 2020, Algorithm 1): each update
is mixed into the server's model as it arrives.

    w <- (1 - alpha s(tau)) w + alpha s(tau) w_k
"""

from __future__ import annotations

from torch import Tensor

from fedprompt.server.schedules.base import Schedule, towards


class FedAsync(Schedule):
    """Moves the server's model of now towards the client's."""

    default_step = 0.6
    takes_buffer = False

    def moved(self, sent: Tensor, base: Tensor, now: Tensor, step: float, weight: float) -> Tensor:
        """now + step * weight * (sent - now); the client's own bits where that is 1.

        Args:
            sent: by the client.
            base: what the client received.
            now: the server's.
            step: `system.step`.
            weight: s(tau).
        """
        return sent if step * weight == 1 else towards(now, sent, now, step * weight)
