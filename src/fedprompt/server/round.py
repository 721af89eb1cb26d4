"""The rounds of a federation (PFPT, arXiv 2502.19752, Algorithm 1); `run_round` is one of them.

 1. sample the cohort                         `make_jobs`
 2. send each client its job
 3. the clients train                         `runtime.map`
 4. sort by client, so that finishing order does not matter
 5. check every update, quarantine bad ones   `quarantine`
 6. shared tensors: weighted mean             `merge_shared`
    the objective's server half               `objective.combine`
    the aggregator's rule, if it has one      `step_shared`
 7. aggregate the prompt sets                 `aggregate_prompts`
    or let a generator learn from them        `teach_generator`
 8. next state, in fresh memory               `next_state`, `note_starts`
 9. evaluate                                  goes on while the clients of the next round train
10. report                                    `report`, `Unmeasured.measured`
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from fedprompt.aggregation import Aggregation, Aggregator, SharedRule
from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.errors import RoundError
from fedprompt.core.seeding import derive_seed, torch_generator
from fedprompt.core.types import (
    Broadcast,
    ClientJob,
    ClientUpdate,
    RoundReport,
    ServerState,
    Tensors,
)
from fedprompt.objectives import Objective
from fedprompt.prompt_generators import PromptGenerator
from fedprompt.server.evaluate import Evaluation
from fedprompt.server.sampling import sample_cohort

logger = logging.getLogger(__name__)

Evaluate = Callable[[ServerState], Callable[[], tuple[Evaluation, Evaluation]]]
"""Starts to measure a state; what it returns waits for the figures of test and validation split."""


class ClientMap(Protocol):
    """What a round needs of a runtime."""

    def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        """Start the jobs; the iterator waits for their updates, in any order."""
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
class Unmeasured:
    """A round that is done but for its evaluation, which is under way."""

    state: ServerState
    report: RoundReport
    """Without the evaluation's figures."""
    evaluation: Callable[[], tuple[Evaluation, Evaluation]] | None
    """Waits for them; None in a round that is not evaluated."""
    evaluated_since: float

    def measured(self) -> tuple[ServerState, RoundReport]:
        """Wait for the evaluation; the state after the round, and the whole report."""
        if self.evaluation is None:
            return self.state, self.report
        test, validation = self.evaluation()
        report = dataclasses.replace(
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
            seconds={**self.report.seconds, "evaluate": perf_counter() - self.evaluated_since},
        )
        return self.state, report


def run_rounds(
    state: ServerState,
    settings: RoundSettings,
    runtime: ClientMap,
    aggregator: Aggregator,
    evaluate: Evaluate,
) -> Iterator[tuple[ServerState, RoundReport]]:
    """The rounds from `state` to the last, each yielded as soon as it is measured.

    A round's wall-clock seconds are those since the round before was yielded, what the caller did
    with that one included. So the rounds add up to what a stopwatch shows.

    Args:
        state: after `state.round_index` finished rounds; it is not changed.
        settings: seed, schedule and recipe.
        runtime: does the clients' work.
        aggregator: merges the prompt sets.
        evaluate: measures a state.

    Yields:
        The state after a round, which shares no memory with any other or any update, and the
        round's report.

    Raises:
        ClientError: a client's work raised.
        RoundError: no update of a round could be used.
    """
    before = perf_counter()
    for after, report in _overlapping(state, settings, runtime, aggregator, evaluate):
        now = perf_counter()
        yield after, dataclasses.replace(report, wall_seconds=now - before)
        before = now


def _overlapping(
    state: ServerState,
    settings: RoundSettings,
    runtime: ClientMap,
    aggregator: Aggregator,
    evaluate: Evaluate,
) -> Iterator[tuple[ServerState, RoundReport]]:
    """Round after round; each is yielded while the clients of the next one train."""
    before: Unmeasured | None = None
    while state.round_index < settings.rounds:
        before = yield from run_round(state, before, settings, runtime, aggregator, evaluate)
        state = before.state
    if before is not None:
        yield before.measured()


def run_round(
    state: ServerState,
    before: Unmeasured | None,
    settings: RoundSettings,
    runtime: ClientMap,
    aggregator: Aggregator,
    evaluate: Evaluate,
) -> Generator[tuple[ServerState, RoundReport], None, Unmeasured]:
    """One round; it yields the round before, whose evaluation ends meanwhile.

    Args:
        state: where the round starts.
        before: the round before; None in the first.
        settings: seed, schedule and recipe.
        runtime: does the clients' work.
        aggregator: merges the prompt sets.
        evaluate: measures a state.

    Returns:
        The round, whose evaluation goes on.
    """
    round_index, objective = state.round_index + 1, settings.recipe.build_objective()
    started = perf_counter()
    jobs = make_jobs(state, settings)  # 1, 2
    arriving = runtime.map(settings.recipe, jobs)  # 3
    if before is not None:
        yield before.measured()
    updates = sorted(arriving, key=lambda update: update.client_id)  # 4
    trained = perf_counter()

    good, refused = quarantine(updates, jobs, objective.reply(state.shared))  # 5
    check_not_empty(good, refused, round_index)
    weights = objective.weights([update.num_examples for update in good])
    population = settings.recipe.training.population
    mean = merge_shared(good, weights)  # 6
    shared, memory = objective.combine(state.shared, mean, good, population, state.objective)
    shared, moments = step_shared(aggregator, objective, shared, state)
    if settings.generator is None:  # 7
        merged = aggregate_prompts(good, weights, state, settings, aggregator, round_index)
    else:
        merged = teach_generator(settings.generator, good, weights, jobs, state)
    state = next_state(state, merged, shared, good, round_index, moments, memory)  # 8
    state = note_starts(state, objective, good)
    aggregated = perf_counter()

    due = round_index % settings.eval_every == 0 or round_index == settings.rounds
    evaluation = evaluate(state) if due else None  # 9
    traffic = count_bytes(settings.recipe, jobs, updates)
    seconds = {"train": trained - started, "aggregate": aggregated - trained, "evaluate": 0.0}
    known = report(state, updates, good, refused, merged, traffic, seconds)  # 10
    return Unmeasured(state, known, evaluation, aggregated)


def check_not_empty(
    good: Sequence[ClientUpdate], refused: Sequence[Mapping[str, Any]], round_index: int
) -> None:
    """Refuse a round without a usable update.

    Args:
        good: usable updates.
        refused: client and reason of the others.
        round_index: from 1.

    Raises:
        RoundError: names one of the refused updates and why.
    """
    if not good:
        raise RoundError(
            f"round {round_index}: all {len(refused)} updates were refused "
            f"(client {refused[0]['client']}: {refused[0]['reason']}); "
            "lower the learning rates or check the data"
        )


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
        prompts = settings.generator.prompts_for(client_id, state.aggregator)
        broadcast = dataclasses.replace(broadcast, prompts=prompts)
    return ClientJob(
        client_id=client_id,
        round_index=round_index,
        seed=derive_seed(settings.seed, "client", round_index, client_id),
        broadcast=broadcast,
        state=state.clients.get(client_id, {}),
    )


def quarantine(
    updates: Sequence[ClientUpdate], jobs: Sequence[ClientJob], reply: Tensors
) -> tuple[list[ClientUpdate], list[dict[str, Any]]]:
    """Part the updates into usable ones and refused ones (client and reason)."""
    broadcasts = {job.client_id: job.broadcast for job in jobs}
    good: list[ClientUpdate] = []
    refused: list[dict[str, Any]] = []
    for update in updates:
        reason = fault(update, broadcasts[update.client_id], reply)
        if reason is None:
            good.append(update)
        else:
            logger.warning("update of client %d is left out: %s", update.client_id, reason)
            refused.append({"client": update.client_id, "reason": reason})
    return good, refused


def fault(update: ClientUpdate, broadcast: Broadcast, reply: Tensors) -> str | None:
    """Why an update must not reach an aggregator, or None if nothing is wrong with it.

    Args:
        update: what a client returned.
        broadcast: what it had received.
        reply: a tensor like each shared one that it must return.
    """
    if update.num_examples < 1:
        return f"expected num_examples >= 1, got {update.num_examples}"
    if "loss" not in update.metrics:
        return f"expected the metric 'loss', got {sorted(update.metrics)}"
    rows = len(update.prompts)
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("prompts", update.prompts, (rows, broadcast.prompts.shape[1]), broadcast.prompts.dtype),
        ("keys", update.keys, (rows, broadcast.keys.shape[1]), broadcast.keys.dtype),
        ("origins", update.origins, (rows,), torch.int64),
        ("use_counts", update.use_counts, (rows,), torch.int64),
    ]
    if set(update.shared) != set(reply):
        return f"expected shared tensors {sorted(reply)}, got {sorted(update.shared)}"
    expected += [
        (name, update.shared[name], tuple(tensor.shape), tensor.dtype)
        for name, tensor in reply.items()
    ]
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            return f"{name}: expected {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            return f"{name}: {bad} of {tensor.numel()} values are not finite"
    if rows and not (
        int(update.origins.min()) >= 0 and int(update.origins.max()) < len(broadcast.prompts)
    ):
        return f"origins: expected rows 0..{len(broadcast.prompts) - 1}"
    return None


def merge_shared(updates: Sequence[ClientUpdate], weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted mean of the shared tensors (FedAvg: by sample counts), accumulated in float64."""
    total = sum(weights)
    merged: dict[str, Tensor] = {}
    for name, like in updates[0].shared.items():
        weighted = torch.zeros_like(like, dtype=torch.float64)
        for update, weight in zip(updates, weights, strict=True):
            weighted += update.shared[name].to(torch.float64) * (weight / total)
        merged[name] = weighted.to(like.dtype)
    return merged


def step_shared(
    aggregator: Aggregator, objective: Objective, shared: Tensors, state: ServerState
) -> tuple[Tensors, Tensors]:
    """Let an aggregator with a rule for shared tensors go on from their mean; others keep it.

    What is no mean, such as control variates, stays what the objective made of it.

    Returns:
        The shared tensors, and what the aggregator remembers of them.
    """
    if not isinstance(aggregator, SharedRule):
        return shared, {}
    means = {name: value for name, value in shared.items() if objective.is_mean(name)}
    stepped, moments = aggregator.merge_shared(means, state.shared, state.aggregator)
    return {**shared, **stepped}, moments


def teach_generator(
    generator: PromptGenerator,
    updates: Sequence[ClientUpdate],
    weights: Sequence[float],
    jobs: Sequence[ClientJob],
    state: ServerState,
) -> Aggregation:
    """A generator's step from what clients made of their prompts; unused ones are unchanged."""
    returned = {job.client_id: job.broadcast.prompts.clone() for job in jobs}
    for update in updates:
        returned[update.client_id][update.origins] = update.prompts
    memory, figures = generator.learn(
        state.aggregator,
        {update.client_id: returned[update.client_id] for update in updates},
        {update.client_id: weight for update, weight in zip(updates, weights, strict=True)},
    )
    prompts = generator.consensus(memory)
    return Aggregation(
        prompts=prompts,
        keys=None,
        assignment=[update.origins for update in updates],
        state=memory,
        diagnostics={"num_prompts": float(len(prompts)), **figures},
    )


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
    return aggregator.aggregate(
        [update.prompts for update in updates],
        weights=torch.tensor(weights),
        origins=[update.origins for update in updates],
        previous=state.prompts,
        keys=[update.keys for update in updates] if options.sends_keys else None,
        previous_keys=state.keys if options.sends_keys else None,
        state=state.aggregator,
        generator=torch_generator(settings.seed, "aggregate", round_index),
    )


def next_state(
    state: ServerState,
    merged: Aggregation | None,
    shared: Tensors,
    updates: Sequence[ClientUpdate],
    round_index: int,
    moments: Tensors,
    memory: Tensors,
) -> ServerState:
    """The state after the round; every tensor is a fresh copy that no one else holds."""
    keys = state.keys
    if merged is not None:
        absent = state.keys.new_zeros(len(merged.prompts), state.keys.shape[1])
        keys = absent if merged.keys is None else merged.keys
    own = {update.client_id: update.state for update in updates if update.state}
    return ServerState(
        round_index=round_index,
        prompts=(state.prompts if merged is None else merged.prompts).clone(),
        keys=keys.clone(),
        shared=_clone(shared),
        aggregator=_clone({**({} if merged is None else merged.state), **moments}),
        clients={
            client_id: _clone(tensors) for client_id, tensors in {**state.clients, **own}.items()
        },
        fixed=_clone(state.fixed),
        objective=_clone(memory),
    )


def note_starts(
    state: ServerState, objective: Objective, updates: Sequence[ClientUpdate]
) -> ServerState:
    """Add what participants start from the next time to their own states, if an objective asks."""
    starts = objective.remembered({**state.shared, "prompts": state.prompts})
    if not starts:
        return state
    noted = {
        update.client_id: {**state.clients.get(update.client_id, {}), **_clone(starts)}
        for update in updates
    }
    return dataclasses.replace(state, clients={**state.clients, **noted})


def report(
    state: ServerState,
    updates: Sequence[ClientUpdate],
    good: Sequence[ClientUpdate],
    refused: Sequence[dict[str, Any]],
    merged: Aggregation | None,
    traffic: tuple[int, int],
    seconds: dict[str, float],
) -> RoundReport:
    """What is known of the round before its evaluation; see `RoundReport`."""
    total = sum(update.num_examples for update in good)
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
        train_loss=sum(update.metrics["loss"] * update.num_examples for update in good) / total,
        num_prompts=len(state.prompts),
        bytes_up=traffic[0],
        bytes_down=traffic[1],
        seconds=seconds,
        clients=clients,
        quarantined=tuple(refused),
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
    return _bytes(sets + list(update.shared.values()))


def download_bytes(job: ClientJob) -> int:
    """Bytes of the tensors that one client receives."""
    broadcast = job.broadcast
    return _bytes([broadcast.prompts, broadcast.keys, *broadcast.shared.values()])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _clone(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
