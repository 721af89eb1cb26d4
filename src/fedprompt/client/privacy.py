"""The Gaussian mechanism on a client's whole update, before anything of it leaves the client.

With D the difference of all that a client sends to what it received (prompts, head, adaptation and
query projection as one vector), clip C and noise multiplier z:

    D <- D min(1, C / ||D||) + N(0, (z C)^2 I)

McMahan, Ramage, Talwar and Zhang, "Learning Differentially Private Recurrent Language Models", ICLR
2018, Algorithm 1, with the noise at each client: the server sees noisy updates alone, so that
whatever it makes of them, matching included, is post-processing. Nothing else is sent that depends
on the client's images.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fedprompt.core.types import Broadcast, ClientUpdate, Parts


@dataclasses.dataclass(frozen=True)
class GaussianMechanism:
    """Clips a client's update and adds noise to it."""

    clip: float
    """C, the largest L2 norm of a whole update."""
    noise_multiplier: float
    """z, the noise's standard deviation as a multiple of C."""

    def release(
        self, update: ClientUpdate, before: Broadcast, generator: torch.Generator
    ) -> ClientUpdate:
        """What a client sends in place of its update.

        Every prompt that was received is sent, in its order, so that origins say nothing. Each
        client counts as one image, and of its metrics only the size of its pack is left. What it
        keeps for itself stays as it is. An update that is not finite counts as no change.

        Args:
            update: as the client's training made it; it is not changed.
            before: what the client received.
            generator: draws the noise, on the CPU.

        Raises:
            ValueError: the update has a tensor that is no change of a received one, or keys.
        """
        received = {"prompts": before.prompts, **before.shared.trained().tensors()}
        sent = {"prompts": _all_rows(update, before.prompts), **update.shared.tensors()}
        if sent.keys() != received.keys() or update.keys.numel() or update.spread is not None:
            unknown = sorted(sent.keys() ^ received.keys()) or ["keys or spread"]
            raise ValueError(
                f"privacy: expected changes of {', '.join(received)} alone, got {unknown}"
            )
        # In an order of names: a state out of a checkpoint has its tensors in another one.
        paths = sorted(received)
        changes = {path: sent[path].double() - received[path].double() for path in paths}
        clipped = self.clipped(changes)
        made = {path: received[path].double() + change for path, change in clipped.items()}
        for path in made:
            noise = torch.randn(made[path].shape, generator=generator, dtype=torch.float64)
            made[path] = made[path] + self.clip * self.noise_multiplier * noise
        noisy = {path: value.to(received[path].dtype) for path, value in made.items()}
        prompts = noisy.pop("prompts")
        rows = len(prompts)
        return dataclasses.replace(
            update,
            num_examples=1,
            prompts=prompts,
            keys=update.keys.new_zeros(rows, 0),
            origins=torch.arange(rows),
            use_counts=torch.ones(rows, dtype=torch.int64),
            shared=Parts.from_tensors(noisy),
            metrics={"pack": update.metrics["pack"]},
        )

    def clipped(self, changes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Changes whose norm, all of them taken together, is at most `clip`.

        >>> mechanism = GaussianMechanism(clip=1.0, noise_multiplier=1.0)
        >>> mechanism.clipped({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
        """
        norm = float(sum(float(change.square().sum()) for change in changes.values())) ** 0.5
        if not norm < float("inf"):
            return {path: torch.zeros_like(change) for path, change in changes.items()}
        factor = min(1.0, self.clip / norm) if norm > 0 else 1.0
        return {path: change * factor for path, change in changes.items()}


def _all_rows(update: ClientUpdate, received: Tensor) -> Tensor:
    """(n, d) the prompts that were received, with the client's in the place of those it used."""
    if "prompts" in update.state.kept.tensors():
        return received
    rows = received.clone()
    rows[update.origins] = update.prompts
    return rows
