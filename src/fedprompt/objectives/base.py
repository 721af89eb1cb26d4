"""What a local objective is: what a client minimises beside cross-entropy, and its server half.

An objective is pure: tensors in, tensors out. What it remembers lies where the federation keeps it,
under names of its own choice that no one else reads: a client's memory in
`ClientState.kept.objective`, the server's in `ServerState.shared.objective` (if clients need it) or
in `ServerState.objective` (if they do not).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from fedprompt.core.registry import Registry
from fedprompt.core.types import ClientUpdate, Parts, Tensors


@dataclasses.dataclass(frozen=True)
class LocalResult:
    """A client's finished work, as its objective sees it."""

    start: Parts
    """The trainable tensors as the client began with them."""
    end: Parts
    """The same after the local epochs."""
    received: Parts
    """What was broadcast: prompts, shared tensors, and the objective's own."""
    own: Tensors
    """What the objective kept at the client, as its last update left it."""
    steps: int
    rates: Mapping[str, float]
    """Learning rate of each trainable tensor, by its path in `end.tensors()`."""
    features: Tensor
    """(N, ...) what the client's images are to the module: tokens, or the CLS features."""
    labels: Tensor
    """(N,)"""
    num_classes: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """What an objective makes of a client's finished work."""

    sent: Tensors = dataclasses.field(default_factory=dict)
    """Its own tensors for the server: `ClientUpdate.shared.objective`."""
    kept: Tensors = dataclasses.field(default_factory=dict)
    """Its memory at the client: `ClientState.kept.objective`."""
    instead: Parts = dataclasses.field(default_factory=Parts)
    """Sent in place of trained tensors; those that are absent are sent as they are."""


class Objective:
    """Plain federated averaging; an objective overrides what it does otherwise."""

    trains: bool = True
    """False: clients send what `finish` computes and take no training step."""
    averages: bool = True
    """False: the trained tensors that `combine` returns are computed and no mean of the clients',
    so that an aggregator with a rule for shared tensors leaves them alone."""
    needs_sgd: bool = False
    """True: the arithmetic holds for plain gradient steps only (`clients.optimizer=sgd`)."""

    def __init__(self, options: object) -> None:
        self.options = options

    # The client's half.

    @property
    def penalises(self) -> bool:
        """Whether `penalty` is its own; the tensors to compare with are on the device only then."""
        return type(self).penalty is not Objective.penalty

    def penalty(self, current: Parts, start: Parts) -> Tensor | None:
        """A term that is added to the loss of every local step, or None for none.

        Args:
            current: the client's trainable tensors.
            start: the same tensors as training began, without gradient.

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

    def correction(self, received: Tensors, own: Tensors) -> Mapping[str, Tensor]:
        """Constants that are added to the gradients of every local step.

        Args:
            received: the objective's own tensors of the broadcast.
            own: what the objective kept at the client.

        Returns:
            Like each tensor whose gradient is to change, by its path in `Parts.tensors`.
        """
        return {}

    def finish(self, result: LocalResult) -> Finished:
        """What is left to do after the last local step.

        Args:
            result: the client's work.
        """
        return Finished()

    # The server's half.

    def begin(self, trainable: Parts) -> Tensors:
        """Its own tensors in the first broadcast: `ServerState.shared.objective`.

        Args:
            trainable: the initial tensors that are trained and shared; prompts are among them if
                their rows mean the same in every round.
        """
        return {}

    def remembered(self, tensors: Parts) -> Parts:
        """What clients start from the next time they are sampled instead of what they will receive
        then: noted in the initial state for all, and after a round in the own state of the clients
        that took part.

        Args:
            tensors: the server's shared tensors, its prompts, and the objective's own.
        """
        return Parts()

    def weights(self, num_examples: Sequence[int]) -> list[float]:
        """How much each client counts in the averages of shared tensors and prompts."""
        return [float(number) for number in num_examples]

    def outgoing(self, shared: Parts) -> Parts:
        """The part of the server's shared tensors that clients receive."""
        return shared

    def reply(self, shared: Parts) -> Parts:
        """Like what a client must return, given what the server shares: same parts, names, shapes
        and dtypes.
        """
        return shared

    def keeps(self, shared: Parts) -> Tensors:
        """Like what `finish` keeps at a client, given what the server shares: same names, shapes
        and dtypes.
        """
        return {}

    def combine(
        self,
        before: Parts,
        mean: Parts,
        updates: Sequence[ClientUpdate],
        num_clients: int,
        memory: Tensors,
    ) -> tuple[Parts, Tensors]:
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
