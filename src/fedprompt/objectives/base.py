"""What a local objective is: what a client minimises, and its server half.

An objective is pure: tensors in, tensors out. What it remembers lies where the federation keeps it,
under names of its own choice that no one else reads: a client's memory in
`ClientState.kept.objective`, the server's in `ServerState.shared.objective` (if clients need it) or
in `ServerState.objective` (if they do not).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.core.registry import Registry
from fedprompt.core.types import ClientJob, ClientUpdate, Parts, Tensors


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Another model whose view of each batch a loss compares with; it is not trained."""

    parts: Parts
    """Prompts, query projection, head and adaptation; without head tensors its logits mean nothing.
    """
    keys: Tensor
    """(n, q) as they were broadcast with these prompts."""

    @classmethod
    def before(cls, job: ClientJob) -> Teacher:
        """The model that a client's training begins with; `parts.objective` are the objective's
        own tensors of the broadcast.
        """
        broadcast = job.broadcast
        parts = broadcast.start(job.state)
        return cls(dataclasses.replace(parts, objective=broadcast.shared.objective), broadcast.keys)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a teacher makes of a batch, without gradient."""

    features: Tensor
    """(B, feature_dim)"""
    logits: Tensor
    """(B, C); minus infinity for classes of other domains."""


@dataclasses.dataclass(frozen=True)
class LossContext:
    """What a loss may use beside logits, labels and features; all of it on the client's device."""

    logit_shift: Tensor | None
    """(C,) of `Objective.logit_shift`."""
    groups: Tensor
    """(B,) each image's domain."""
    teachers: Mapping[str, Seen]
    """What each of `Objective.teachers` makes of the batch."""
    received: Tensors
    """The objective's own tensors of the broadcast; empty with the loss of `Objective`."""
    own: Tensors
    """What the objective kept at the client; empty with the loss of `Objective`."""


def _no_model() -> Tensor:
    raise ValueError("encode: expected the work of a client's model, got tensors alone")


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
    keys: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, 0))
    """(n, q) as they were broadcast."""
    encode: Callable[[], Tensor] = _no_model
    """Computes (N, feature_dim), what the trained model makes of the client's images."""


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
    compares_features: bool = False
    """True: the loss compares features, which prompts or a tuning have to change."""

    def __init__(self, options: object) -> None:
        self.options = options

    # The client's half.

    def loss(
        self, logits: Tensor, labels: Tensor, features: Tensor, context: LossContext
    ) -> Tensor:
        """What every local step minimises, but for `penalty` and the similarity of prompts.

        It runs within a step: nothing in it may wait for the device (no `item`, no condition on a
        value). The loss that a client reports is this one.

        Args:
            logits: (B, C), minus infinity for the classes of other domains.
            labels: (B,) of the image's domain, so that their logits are finite.
            features: (B, feature_dim) of which the head made the logits.
            context: what else there is.

        Returns:
            A scalar; by default the cross-entropy of the shifted logits.
        """
        shift = context.logit_shift
        return F.cross_entropy(logits if shift is None else logits + shift, labels)

    @property
    def has_own_loss(self) -> bool:
        """Whether `loss` is its own; what it received and keeps is on the device only then."""
        return type(self).loss is not Objective.loss

    def teachers(self, start: Teacher, own: Tensors) -> Mapping[str, Teacher]:
        """Models that `loss` compares with; each costs a forward pass of every batch.

        Args:
            start: the model that training begins with: the server's, with what is personal.
            own: what the objective kept at the client; empty before its first round.
        """
        return {}

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

    def keeps(self, start: Teacher) -> Tensors:
        """Like what `finish` keeps at a client: same names, shapes and dtypes.

        Args:
            start: what the client's training begins with; `start.parts.objective` are the
                objective's own tensors of the broadcast.
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
