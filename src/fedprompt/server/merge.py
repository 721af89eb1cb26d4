"""What the server makes of a round's updates: shared tensors, memories, and the next state.

Prompt sets are merged by an aggregator; `round` calls it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedprompt.aggregation import Aggregation, Aggregator, SharedRule
from fedprompt.core.types import (
    ClientJob,
    ClientState,
    ClientUpdate,
    Parts,
    ServerState,
    Tensors,
    fresh,
)
from fedprompt.objectives import Objective
from fedprompt.prompt_generators import PromptGenerator


def merge_shared(updates: Sequence[ClientUpdate], weights: Sequence[float]) -> Parts:
    """Weighted mean of the shared tensors (FedAvg: by sample counts), accumulated in float64.

    Args:
        updates: with the same shared tensors.
        weights: of each update, > 0.
    """
    total = sum(weights)
    sent = [update.shared.tensors() for update in updates]
    merged: dict[str, Tensor] = {}
    for path, like in sent[0].items():
        weighted = torch.zeros_like(like, dtype=torch.float64)
        for tensors, weight in zip(sent, weights, strict=True):
            weighted += tensors[path].to(torch.float64) * (weight / total)
        merged[path] = weighted.to(like.dtype)
    return Parts.from_tensors(merged)


def step_shared(
    aggregator: Aggregator, objective: Objective, shared: Parts, state: ServerState
) -> tuple[Parts, Tensors]:
    """Let an aggregator with a rule for shared tensors go on from their mean; others keep it.

    What is no mean stays what the objective made of it: its own tensors, such as control variates,
    and all of them if it does not average.

    Args:
        aggregator: may have the rule.
        objective: says whether it averages.
        shared: what the objective made of the clients' shared tensors.
        state: before the round.

    Returns:
        The shared tensors, and what the aggregator remembers of them.
    """
    if not isinstance(aggregator, SharedRule) or not objective.averages:
        return shared, {}
    means, before = shared.trained().tensors(), state.shared.trained().tensors()
    stepped, moments = aggregator.merge_shared(means, before, state.aggregator)
    return shared.updated(Parts.from_tensors(stepped)), moments


def teach_generator(
    generator: PromptGenerator,
    updates: Sequence[ClientUpdate],
    weights: Sequence[float],
    jobs: Sequence[ClientJob],
    state: ServerState,
) -> tuple[Aggregation, Tensors]:
    """A generator's step from what clients made of their prompts; unused ones are unchanged.

    Args:
        generator: makes every client's prompts.
        updates: the round's good ones.
        weights: of each update.
        jobs: what the clients were sent.
        state: before the round.

    Returns:
        The prompts for images that belong to no client, and the generator's memory.
    """
    returned = {job.client_id: job.broadcast.prompts.clone() for job in jobs}
    for update in updates:
        returned[update.client_id][update.origins] = update.prompts
    memory, figures = generator.learn(
        state.generator,
        {update.client_id: returned[update.client_id] for update in updates},
        {update.client_id: weight for update, weight in zip(updates, weights, strict=True)},
    )
    prompts = generator.consensus(memory)
    merged = Aggregation(
        prompts=prompts,
        keys=None,
        assignment=[update.origins for update in updates],
        state={},
        diagnostics={"num_prompts": float(len(prompts)), **figures},
    )
    return merged, memory


def next_state(
    state: ServerState,
    merged: Aggregation | None,
    shared: Parts,
    updates: Sequence[ClientUpdate],
    memories: Mapping[str, Tensors],
) -> ServerState:
    """The state after the round; every tensor is a fresh copy that no one else holds.

    Args:
        state: before the round.
        merged: the new prompts; None when no prompts travel.
        shared: the new shared tensors.
        updates: the round's good ones; a client without one keeps its old state.
        memories: of the aggregator beside what `merged` has, the generator, the objective, the
            spread of queries and the virtual clock, by field of the state.
    """
    keys = state.keys
    if merged is not None:
        absent = state.keys.new_zeros(len(merged.prompts), state.keys.shape[1])
        keys = absent if merged.keys is None else merged.keys
    own = {update.client_id: update.state for update in updates if update.state.tensors()}
    aggregator = {**({} if merged is None else merged.state), **memories["aggregator"]}
    return ServerState(
        round_index=state.round_index + 1,
        prompts=fresh(state.prompts if merged is None else merged.prompts),
        keys=fresh(keys),
        shared=shared.cloned(),
        aggregator=_clone(aggregator),
        generator=_clone(memories["generator"]),
        objective=_clone(memories["objective"]),
        spread=_clone(memories["spread"]),
        system=_clone(memories["system"]),
        clients={client: kept.cloned() for client, kept in {**state.clients, **own}.items()},
        fixed=state.fixed.cloned(),
    )


def note_starts(
    state: ServerState, objective: Objective, updates: Sequence[ClientUpdate]
) -> ServerState:
    """Add what participants start from the next time to their own states, if an objective asks.

    Args:
        state: after the round.
        objective: decides what clients start from.
        updates: the good ones.
    """
    starts = objective.remembered(state.received())
    if not starts.tensors():
        return state
    noted = {}
    for update in updates:
        own = state.clients.get(update.client_id, ClientState())
        noted[update.client_id] = ClientState(own.kept, starts.cloned())
    return dataclasses.replace(state, clients={**state.clients, **noted})


def _clone(tensors: Tensors) -> dict[str, Tensor]:
    return {name: fresh(tensor) for name, tensor in tensors.items()}
