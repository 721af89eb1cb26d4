"""A head that all clients' class sums give in closed form, before the first round.

The rules are those of `objective=closed_form`; here its head is where training begins and not where
it ends. Features are those without prompts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fedprompt.client.worker import ClientData
from fedprompt.core.types import ClientUpdate, Parts, Tensors
from fedprompt.objectives import LocalResult, Objective, objectives


@dataclasses.dataclass(frozen=True)
class StartingHead:
    """What was computed."""

    tensors: Tensors
    """`0.weight` (classes, feature_dim), as a linear head without biases names it."""
    bytes_up: int
    """What all clients sent for it."""


def starting_head(rule: str, data: ClientData, num_classes: int) -> StartingHead:
    """The head of one round of `objective=closed_form` with all clients.

    Args:
        rule: `ncm`, `cof` or `ridge`.
        data: features and labels of all clients.
        num_classes: rows of the head.

    Raises:
        RoundError: the sums do not determine a head; see `objectives.closed_form`.
    """
    objective = objectives.create("closed_form", rule=rule)
    updates = [sums_of(client, objective, data, num_classes) for client in range(len(data.parts))]
    blank = Parts(head={"0.weight": torch.zeros(num_classes, data.table.features.shape[1])})
    shared, _ = objective.combine(blank, blank, updates, len(updates), {})
    sent = [tensor for update in updates for tensor in update.shared.objective.values()]
    return StartingHead(shared.head, sum(each.numel() * each.element_size() for each in sent))


def sums_of(client: int, objective: Objective, data: ClientData, num_classes: int) -> ClientUpdate:
    """What one client sends.

    Args:
        client: its number.
        objective: decides which sums.
        data: features and labels of all clients.
        num_classes: rows of the sums.
    """
    rows = data.rows(client, pooled=False)
    nothing: Tensor = torch.empty(0, 0)
    none = torch.empty(0, dtype=torch.int64)
    result = LocalResult(
        start=Parts(),
        end=Parts(),
        received=Parts(),
        own={},
        steps=0,
        rates={},
        features=torch.from_numpy(data.table.features[rows]),
        labels=torch.from_numpy(data.table.labels[rows]),
        num_classes=num_classes,
    )
    sent = objective.finish(result).sent
    return ClientUpdate(
        client_id=client,
        round_index=0,
        num_examples=len(rows),
        prompts=nothing,
        keys=nothing,
        origins=none,
        use_counts=none,
        shared=Parts(objective=sent),
    )
