"""What a prompt generator is: a model at the server that makes each client's prompts.

With a generator the server keeps no prompt set that is merged; it learns from how each client
changed the prompts it was given. Pure: state in, state out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fedprompt.core.registry import Registry
from fedprompt.core.types import Tensors


class PromptGenerator(Protocol):
    """Makes prompts for known clients."""

    def begin(
        self, prompts: Tensor, num_clients: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The initial state.

        Args:
            prompts: (n, d) the initial prompts.
            num_clients: of the whole federation.
            generator: draws initial values.
        """
        ...

    def prompts_for(self, client_id: int, state: Tensors) -> Tensor:
        """(n, d) prompts of one client, in fresh memory."""
        ...

    def consensus(self, state: Tensors) -> Tensor:
        """(n, d) prompts for images that belong to no client, in fresh memory."""
        ...

    def learn(
        self, state: Tensors, returned: Mapping[int, Tensor], weights: Mapping[int, float]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Update the model after a round.

        Args:
            state: what the round's prompts were made from.
            returned: per client (n, d), its prompts after local training.
            weights: per client how much it counts, its sample count if the objective has no other.

        Returns:
            The next state in fresh memory, and figures for the round's report.
        """
        ...


generators: Registry[PromptGenerator | None] = Registry(
    "prompt generator", "fedprompt.prompt_generators"
)
