"""One communication round, from top to bottom (PFPT, arXiv 2502.19752, Algorithm 1).

1. sample the cohort                      `sample_cohort`
2. make the jobs                          `make_jobs`
3. clients train                          `runtime.map`
4. sort by client, so that finishing order does not matter
5. check every update, quarantine bad ones `quarantine`
6. shared tensors: weighted mean          `merge_shared`
   the objective's server half            `objective.combine`
   the aggregator's rule, if it has one   `step_shared`
7. aggregate the prompt sets              `aggregate_prompts`
   or let a generator learn from them     `teach_generator`
8. next state, in fresh memory            `next_state`, `note_starts`
9. evaluate and report                     the workers measure while the next round begins
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedprompt.aggregation import Aggregation, AggregationInput, Aggregator, SharedRule
from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.errors import RoundError
from fedprompt.core.seeding import derive_seed, torch_generator
from fedprompt.core.types import (
    Broadcast,
    ClientJob,
    ClientState,
    ClientUpdate,
    Parts,
    RoundReport,
    ServerState,
    Tensors,
    fresh,
)
from fedprompt.objectives import Objective
from fedprompt.prompt_generators import PromptGenerator
from fedprompt.server.figures import Evaluation
from fedprompt.server.quarantine import Refusal, expected_of, fault_of_types, quarantine
from fedprompt.server.sampling import sample_cohort

logger = logging.getLogger(__name__)

Evaluate = Callable[[ServerState], Callable[[], tuple[Evaluation, Evaluation]]]
"""Begins to measure a state; what it returns waits for the figures of test and validation split."""


class ClientMap(Protocol):
    """What a round needs of a runtime."""

    def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        """Begin the jobs; the iterator waits for their updates, in any order."""
        ...


@dataclasses.dataclass(frozen=True)
class RoundSettings:
    """What stays the same in all rounds of a run."""

    seed: int
    rounds: int
    eval_every: int
    recipe: LocalRecipe
    generator: PromptGenerator | None = None
    """Makes every client's prompts; without one, all get the server's."""


@dataclasses.dataclass(frozen=True)
class BegunRound:
    """A round whose clients are at work."""

    jobs: Sequence[ClientJob]
    updates: Iterator[ClientUpdate]
    started: float


@dataclasses.dataclass(frozen=True)
class DoneRound:
    """A round that is done but for its evaluation."""

    state: ServerState
    report: RoundReport
    """Without the evaluation's figures."""
    evaluation: Callable[[], tuple[Evaluation, Evaluation]] | None
    """Waits for them; None in a round that is not evaluated."""
    begun: float
    """When the evaluation was begun."""

    def measured(self) -> RoundReport:
        """The whole report, as soon as the evaluation is over."""
        if self.evaluation is None:
            return self.report
        test, validation = self.evaluation()
        return dataclasses.replace(
            self.report,
            accuracy=test.accuracy,
            loss=test.loss,
            validation_accuracy=validation.accuracy,
            balanced_accuracy=test.balanced_accuracy,
            class_accuracy=test.class_accuracy,
            personalised={
                name: evaluation.clients.summary()
                for name, evaluation in (("test", test), ("validation", validation))
                if evaluation.clients is not None
            },
            seconds={**self.report.seconds, "evaluate": time.perf_counter() - self.begun},
        )


def run_round(
    state: ServerState,
    settings: RoundSettings,
    runtime: ClientMap,
    aggregator: Aggregator,
    evaluate: Evaluate,
) -> tuple[ServerState, RoundReport]:
    """From one server state to the next.

    Args:
        state: after `state.round_index` finished rounds; it is not changed.
        settings: seed, schedule and recipe.
        runtime: does the clients' work.
        aggregator: merges the prompt sets.
        evaluate: measures a state.

    Returns:
        The next state, which shares no memory with `state` or any update, and the round's report.

    Raises:
        ClientError: a client's work raised.
        RoundError: no update could be used.
    """
    begun = begin_round(state, settings, runtime)
    done = end_round(state, begun, settings, aggregator, evaluate)
    return done.state, done.measured()


def begin_round(state: ServerState, settings: RoundSettings, runtime: ClientMap) -> BegunRound:
    """Sample the cohort and put it to work."""
    started = time.perf_counter()
    jobs = make_jobs(state, settings)
    return BegunRound(jobs, runtime.map(settings.recipe, jobs), started)


def end_round(
    state: ServerState,
    begun: BegunRound,
    settings: RoundSettings,
    aggregator: Aggregator,
    evaluate: Evaluate,
) -> DoneRound:
    """Wait for the clients, merge what they send, and begin to evaluate; see `run_round`.

    The evaluation goes on while the next round begins.
    """
    round_index = state.round_index + 1
    objective = settings.recipe.build_objective()
    updates = sorted(begun.updates, key=lambda update: update.client_id)
    trained = time.perf_counter()

    expected = [expected_of(job, objective, settings.recipe, state) for job in begun.jobs]
    good, refused = quarantine(updates, expected)
    if not good:
        raise RoundError(
            f"round {round_index}: all {len(updates)} updates were refused "
            f"(client {refused[0].client}: {refused[0].reason}); "
            "lower the learning rates or check the data"
        )
    weights = objective.weights([update.num_examples for update in good])
    shared, memory = objective.combine(
        state.shared,
        merge_shared(good, weights),
        good,
        settings.recipe.training.population,
        state.objective,
    )
    shared, moments = step_shared(aggregator, objective, shared, state)
    made: Tensors = {}
    if settings.generator is None:
        merged = aggregate_prompts(good, weights, state, settings, aggregator, round_index)
    else:
        merged, made = teach_generator(settings.generator, good, weights, begun.jobs, state)
    memories = {"aggregator": moments, "generator": made, "objective": memory}
    state = next_state(state, merged, shared, good, memories)
    state = note_starts(state, objective, good)
    aggregated = time.perf_counter()

    due = round_index % settings.eval_every == 0 or round_index == settings.rounds
    evaluation = evaluate(state) if due else None
    seconds = {
        "train": trained - begun.started,
        "aggregate": aggregated - trained,
        "evaluate": 0.0,
    }
    updates = [update for update in updates if fault_of_types(update) is None]
    traffic = count_bytes(settings.recipe, begun.jobs, updates)
    told = report(state, updates, good, refused, merged, traffic, seconds)
    return DoneRound(state, told, evaluation, aggregated)


def make_jobs(state: ServerState, settings: RoundSettings) -> list[ClientJob]:
    """One job for each client of the next round's cohort; all share one broadcast."""
    training = settings.recipe.training
    cohort = sample_cohort(
        settings.seed, state.round_index + 1, training.population, training.cohort_size
    )
    broadcast = broadcast_of(state, settings)
    return [make_job(state, settings, client_id, broadcast) for client_id in cohort]


def broadcast_of(state: ServerState, settings: RoundSettings) -> Broadcast:
    """What all clients of the round after `state` receive."""
    shared = settings.recipe.build_objective().outgoing(state.shared)
    return dataclasses.replace(state.broadcast(), shared=shared)


def make_job(
    state: ServerState, settings: RoundSettings, client_id: int, broadcast: Broadcast
) -> ClientJob:
    """What one client gets for the round after `state`; a generator makes its prompts."""
    round_index = state.round_index + 1
    if settings.generator is not None:
        prompts = settings.generator.prompts_for(client_id, state.generator)
        broadcast = dataclasses.replace(broadcast, prompts=prompts)
    return ClientJob(
        client_id=client_id,
        round_index=round_index,
        seed=derive_seed(settings.seed, "client", round_index, client_id),
        broadcast=broadcast,
        state=state.clients.get(client_id, ClientState()),
    )


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


def aggregate_prompts(
    updates: Sequence[ClientUpdate],
    weights: Sequence[float],
    state: ServerState,
    settings: RoundSettings,
    aggregator: Aggregator,
    round_index: int,
) -> Aggregation | None:
    """Merge the prompt sets; None when no prompts travel."""
    options = settings.recipe.prompts
    if options.count == 0 or options.mode == "personal":
        return None
    return aggregator.merge(
        AggregationInput(
            [update.prompts for update in updates],
            weights=torch.tensor(weights),
            origins=[update.origins for update in updates],
            previous=state.prompts,
            keys=[update.keys for update in updates] if options.sends_keys else None,
            state=state.aggregator,
            generator=torch_generator(settings.seed, "aggregate", round_index),
            previous_keys=state.keys if options.sends_keys else None,
        )
    )


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
        memories: of the aggregator beside what `merged` has, the generator and the objective, by
            field of the state.
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
        clients={client: kept.cloned() for client, kept in {**state.clients, **own}.items()},
        fixed=state.fixed.cloned(),
    )


def note_starts(
    state: ServerState, objective: Objective, updates: Sequence[ClientUpdate]
) -> ServerState:
    """Add what participants start from the next time to their own states, if an objective asks."""
    starts = objective.remembered(state.received())
    if not starts.tensors():
        return state
    noted = {}
    for update in updates:
        own = state.clients.get(update.client_id, ClientState())
        noted[update.client_id] = ClientState(own.kept, starts.cloned())
    return dataclasses.replace(state, clients={**state.clients, **noted})


def report(
    state: ServerState,
    updates: Sequence[ClientUpdate],
    good: Sequence[ClientUpdate],
    refused: Sequence[Refusal],
    merged: Aggregation | None,
    traffic: tuple[int, int],
    seconds: dict[str, float],
) -> RoundReport:
    """What the round tells but for its evaluation; see `RoundReport`."""
    total = sum(update.num_examples for update in good)
    losses = [update.metrics.get("loss", math.nan) * update.num_examples for update in good]
    clients = tuple(
        {
            "client": update.client_id,
            "num_examples": update.num_examples,
            "num_prompts": len(update.prompts),
            **update.metrics,
        }
        for update in updates
    )
    return RoundReport(
        round=state.round_index,
        accuracy=float("nan"),
        loss=float("nan"),
        validation_accuracy=float("nan"),
        train_loss=sum(losses) / total,
        num_prompts=len(state.prompts),
        bytes_up=traffic[0],
        bytes_down=traffic[1],
        seconds=seconds,
        clients=clients,
        quarantined=tuple(dataclasses.asdict(each) for each in refused),
        diagnostics={} if merged is None else merged.diagnostics,
    )


def count_bytes(
    recipe: LocalRecipe, jobs: Sequence[ClientJob], updates: Sequence[ClientUpdate]
) -> tuple[int, int]:
    """Bytes up and down of a round."""
    selects = recipe.prompts.selection != "all"
    up = sum(upload_bytes(update, selects) for update in updates)
    return up, sum(download_bytes(job) for job in jobs)


def upload_bytes(update: ClientUpdate, selects: bool = True) -> int:
    """Bytes of the tensors that a client sends; its own state would not travel in reality.

    Args:
        update: what the client returned.
        selects: whether it chose among the prompts. If it did not, it returns all of them in their
            order, and need not say which they are and how often it used each.
    """
    sets = [update.prompts, update.keys]
    if selects:
        sets += [update.origins, update.use_counts]
    return _bytes(sets + list(update.shared.tensors().values()))


def download_bytes(job: ClientJob) -> int:
    """Bytes of the tensors that one client receives."""
    broadcast = job.broadcast
    return _bytes([broadcast.prompts, broadcast.keys, *broadcast.shared.tensors().values()])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _clone(tensors: Tensors) -> dict[str, Tensor]:
    return {name: fresh(tensor) for name, tensor in tensors.items()}
