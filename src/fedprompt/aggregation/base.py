"""The contract of an aggregator: prompt sets in, one prompt set out.

An aggregator is pure. Its outputs share no memory with its inputs, its inputs are unchanged, it
draws no random number but from the given generator, and its result depends neither on the order
of the clients nor on the order of the rows within a client. `Cohort` is how that last promise is
kept: it sorts clients and rows by content before any arithmetic, and maps the assignment back
afterwards.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedprompt.aggregation.inputs import AggregationInput
from fedprompt.core.registry import Registry


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """What an aggregator returns. Written by the aggregator, read by the server's round."""

    prompts: Tensor
    """(n', d), the dtype of the inputs."""
    keys: Tensor | None
    """(n', q) address of each prompt in query space; None if there were no keys at all, neither of
    clients nor of the previous prompts.
    """
    assignment: list[Tensor]
    """Per client (n_t,) int64: the row of `prompts` that each local prompt belongs to."""
    state: dict[str, Tensor]
    """The aggregator's memory, to be handed to its next call; flat, to be saved and hashed."""
    diagnostics: dict[str, float]
    """Figures about the work done; `num_prompts` is always among them."""


class Aggregator(abc.ABC):
    """Merges the clients' prompt sets; a plug-in derives from it and has one method, `merge`."""

    keeps_rows: bool = False
    """Whether row i is the same prompt in every round; control variates need it."""
    adds_prompts: bool = True
    """Whether there may be more prompts than were broadcast, if rows are not kept. If not, there
    is nothing to select from without a pool."""

    @abc.abstractmethod
    def merge(self, given: AggregationInput) -> Aggregation:
        """Merge m prompt sets into one."""

    def aggregate(
        self,
        prompt_sets: Sequence[Tensor],
        weights: Tensor | None = None,
        origins: Sequence[Tensor] | None = None,
        previous: Tensor | None = None,
        keys: Sequence[Tensor] | None = None,
        state: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        previous_keys: Tensor | None = None,
        metric: Tensor | None = None,
        others: Tensor | None = None,
    ) -> Aggregation:
        """Check the arguments and merge.

        Args:
            prompt_sets: one (n_t, d) float32 or float64 tensor per client; n_t may be 0.
            weights: (m,) positive sample counts; equal if None.
            origins: per client (n_t,) int64, the row of `previous` that each prompt started from.
            previous: (n, d) prompts that were broadcast.
            keys: per client (n_t, q), each prompt's address in query space.
            state: the `Aggregation.state` of the previous round.
            generator: source of every random draw.
            previous_keys: (n, q) keys that were broadcast with `previous`.
            metric: (q, q) in which keys are compared; None for the Euclidean distance.
            others: (M, q) keys of clients that were met before and are not among these.

        Raises:
            InputError: an argument is malformed; the message names the client.
        """
        return self.merge(
            AggregationInput(
                prompt_sets,
                weights=weights,
                origins=origins,
                previous=previous,
                keys=keys,
                state=state or {},
                generator=generator,
                previous_keys=previous_keys,
                metric=metric,
                others=others,
            )
        )


@runtime_checkable
class SharedRule(Protocol):
    """An aggregator that has a rule of its own for the shared tensors, too."""

    def merge_shared(
        self,
        mean: Mapping[str, Tensor],
        previous: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The next shared tensors, and what is added to the aggregator's state.

        Args:
            mean: the shared tensors that clients returned, averaged by sample counts.
            previous: those that were broadcast.
            state: the aggregator's state before the round.
        """
        ...


aggregators: Registry[Aggregator] = Registry("aggregator", "fedprompt.aggregation")
