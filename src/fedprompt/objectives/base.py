"""What a local objective is: what a client minimises beside cross-entropy, and its server half.

An objective is pure: tensors in, tensors out. What it remembers lies where the federation keeps it:
a client's memory in the client's own state, the server's in the shared tensors (if clients need it)
or in `ServerState.objective` (if they do not).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedprompt.core.registry import Registry
from fedprompt.core.types import ClientUpdate, Tensors

START = "start."
"""Prefix of tensors that a client starts from instead of those it receives."""


@dataclasses.dataclass(frozen=True)
class LocalResult:
    """A client's finished work, as its objective sees it."""

    start: Tensors
    """The trainable tensors by name (`prompts`, `head.*`, ...) as the client began with them."""
    end: Tensors
    """The same after the local epochs."""
    received: Tensors
    """All shared tensors of the broadcast, and its `prompts`."""
    own: Tensors
    """The client's own state, as its last update left it."""
    steps: int
    rates: Mapping[str, float]
    """Learning rate of each trainable tensor."""
    features: Tensor
    """(N, ...) what the client's images are to the module: tokens, or the CLS features."""
    labels: Tensor
    """(N,)"""
    num_classes: int


class Objective:
    """Plain federated averaging; an objective overrides what it does otherwise."""

    trains: bool = True
    """False: clients send what `finish` computes and take no training step."""
    needs_sgd: bool = False
    """True: the arithmetic holds for plain gradient steps only (`clients.optimizer=sgd`)."""

    def __init__(self, options: Any) -> None:
        self.options = options

    # The client's half.

    def penalty(self, current: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor | None:
        """A term that is added to the loss of every local step, or None for none.

        Args:
            current: the client's trainable tensors by name (`prompts` and the shared tensors).
            start: the same tensors as they were broadcast, without gradient.

        Returns:
            A scalar that is differentiable in `current`.
        """
        return None

    def logit_shift(self, class_counts: Tensor) -> Tensor | None:
        """(C,) what the loss of every local step adds to the logits, or None for nothing.

        Args:
            class_counts: (C,) int64, the client's images of each class.
        """
        return None

    def correction(self, received: Tensors, own: Tensors) -> dict[str, Tensor]:
        """Constants that are added to the gradients of every local step, by trainable tensor.

        Args:
            received: the shared tensors of the broadcast.
            own: the client's own state.

        Returns:
            Like each tensor that is named; the others' gradients stay as they are.
        """
        return {}

    def finish(self, result: LocalResult) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is left to do after the last local step.

        Args:
            result: the client's work.

        Returns:
            What the client sends beside its trained tensors or, by their names, instead of them;
            and what it keeps for itself until it is sampled again.
        """
        return {}, {}

    # The server's half.

    def begin(self, trainable: Tensors) -> dict[str, Tensor]:
        """Shared tensors of its own in the initial state.

        Args:
            trainable: the initial tensors that are trained and shared; `prompts` is among them if
                its rows mean the same in every round.
        """
        return {}

    def remembered(self, tensors: Tensors) -> dict[str, Tensor]:
        """What clients start from the next time they are sampled instead of what they will receive
        then, as `START` + name: noted in the initial state for all, and after a round in the own
        state of the clients that took part.

        Args:
            tensors: the server's shared tensors and its `prompts`.
        """
        return {}

    def weights(self, num_examples: Sequence[int]) -> list[float]:
        """How much each client counts in the averages of shared tensors and prompts."""
        return [float(number) for number in num_examples]

    def outgoing(self, shared: Tensors) -> Tensors:
        """The part of the server's shared tensors that clients receive."""
        return shared

    def reply(self, shared: Tensors) -> Tensors:
        """A tensor like each one that a client must return: same names, shapes and dtypes."""
        return shared

    def is_mean(self, name: str) -> bool:
        """Whether a shared tensor that `combine` returns is the mean of what clients trained, from
        which a server's optimiser may go on; False for what the objective computes itself.
        """
        return True

    def combine(
        self,
        before: Tensors,
        mean: Tensors,
        updates: Sequence[ClientUpdate],
        num_clients: int,
        memory: Tensors,
    ) -> tuple[Tensors, Tensors]:
        """The next shared tensors and the server's memory.

        Args:
            before: the shared tensors before the round.
            mean: those that the clients returned, averaged with `weights`.
            updates: the round's good updates.
            num_clients: clients of the whole federation.
            memory: what this method returned the last time; empty at first.
        """
        return mean, memory


objectives: Registry[Objective] = Registry("objective", "fedprompt.objectives")
