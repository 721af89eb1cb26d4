"""What a local objective is: a term of the client's loss, beside cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from fedprompt.registry import Registry


class Objective(Protocol):
    """A term that is added to the loss of every local step."""

    def penalty(self, current: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor | None:
        """The term's value, or None for none.

        Args:
            current: the client's trainable tensors by name (`prompts` and the shared tensors).
            start: the same tensors as they were broadcast, without gradient.

        Returns:
            A scalar that is differentiable in `current`.
        """
        ...


objectives: Registry[Objective] = Registry("objective", "fedprompt.objectives")
