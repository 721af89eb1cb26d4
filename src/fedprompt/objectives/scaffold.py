"""`scaffold`: SCAFFOLD, control variates against client drift.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
Algorithm 1. With y the client's tensors, g their gradient, c the server's variate and c_i the
client's, K local steps of rate eta and N clients in all:

    y  <- y - eta (g(y) - c_i + c)                                            (Eq. 3)
    c_i+ = c_i - c + (x - y) / (K eta)                                        (Eq. 4, option II)
    c  <- c + (1 / N) sum over the cohort of (c_i+ - c_i)                     (Eq. 5)

The variates cover the prompts (row by row of the broadcast) and all shared tensors, whose paths are
their names. c is broadcast; c_i is kept by the client and never leaves it: the client returns the
difference c_i+ - c_i. Variates double what is sent, and the byte counts say so.

Prompt variates need rows that mean the same in every round. With an aggregator that makes a new set
of prompts each round, the shared tensors alone have variates.

`variant=released` is what the authors of PFPT ran (their repository
Probabilistic_Prompt_Aggregation_Baseline, `Algo/scaffold.py`): a client starts from x_i, the
server's tensors after the round in which it last took part (the initial ones at first), instead of
x, and its change enters uniformly, x <- x + mean(y_i - x_i); Eq. 4 has x_i for x. With full
participation only the uniform mean differs.

`variant=sampled` divides the sum of Eq. 5 by the size of the cohort instead of N, a common slip of
published programs: c then overshoots by N / |cohort| under partial participation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fedprompt.core.checks import check_choice
from fedprompt.core.types import ClientUpdate, Parts, Tensors
from fedprompt.objectives.base import Finished, LocalResult, Objective, Teacher, objectives

VARIANTS = ("scaffold", "released", "sampled")


@dataclasses.dataclass(frozen=True)
class ScaffoldOptions:
    """Options of SCAFFOLD."""

    variant: str = "scaffold"
    """`scaffold`: as published; `released`: clients start from what they last saw; `sampled`: the
    sum of Eq. 5 divided by the size of the cohort."""

    def __post_init__(self) -> None:
        check_choice("objective.variant", self.variant, VARIANTS)


@objectives.register("scaffold", ScaffoldOptions)
class Scaffold(Objective):
    """Corrects every local gradient by the difference of two control variates."""

    needs_sgd = True
    options: ScaffoldOptions

    def begin(self, trainable: Parts) -> Tensors:
        """Zero variates: the first round is FedAvg."""
        return {path: torch.zeros_like(value) for path, value in trainable.tensors().items()}

    def correction(self, received: Tensors, own: Tensors) -> dict[str, Tensor]:
        """c - c_i for every tensor that has a variate."""
        return {
            path: control - own.get(path, torch.zeros_like(control))
            for path, control in received.items()
        }

    def finish(self, result: LocalResult) -> Finished:
        """The change of the client's variates (sent) and the variates (kept)."""
        start, end = result.start.tensors(), result.end.tensors()
        changes, variates = {}, {}
        for path, control in result.received.objective.items():
            before = result.own.get(path, torch.zeros_like(control))
            length = result.steps * result.rates[path]
            # Nothing moved at rate 0, so nothing was learnt about the gradient.
            moved = (start[path] - end[path]) / length if length else control
            variates[path] = before - control + moved
            changes[path] = variates[path] - before
        if self.options.variant != "released":
            return Finished(changes, variates)
        x = result.received.tensors()
        instead = {path: x[path] + (end[path] - start[path]) for path in changes}
        return Finished(changes, variates, Parts.from_tensors(instead))

    def remembered(self, tensors: Parts) -> Parts:
        """With `variant=released`, all that has a variate."""
        if self.options.variant != "released":
            return Parts()
        return tensors.only(tensors.objective)

    def weights(self, num_examples: Sequence[int]) -> list[float]:
        """By sample counts; with `variant=released` all alike."""
        if self.options.variant == "released":
            return [1.0] * len(num_examples)
        return super().weights(num_examples)

    def keeps(self, start: Teacher) -> Tensors:
        """A variate like each of the server's."""
        return start.parts.objective

    def combine(
        self,
        before: Parts,
        mean: Parts,
        updates: Sequence[ClientUpdate],
        num_clients: int,
        memory: Tensors,
    ) -> tuple[Parts, Tensors]:
        """Eq. 5 for the variates; everything else is the mean.

        Args:
            before: the shared tensors before the round.
            mean: those that the clients returned, averaged with `weights`.
            updates: the round's good updates.
            num_clients: clients of the whole federation.
            memory: what this method returned the last time; empty at first.
        """
        number = len(updates) if self.options.variant == "sampled" else num_clients
        variates = {}
        for path, control in before.objective.items():
            changes = torch.stack([update.shared.objective[path] for update in updates])
            variates[path] = control + changes.sum(dim=0) / number
        return dataclasses.replace(mean, objective=variates), memory
