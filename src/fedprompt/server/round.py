"""The rounds of a federation (PFPT, arXiv 2502.19752, Algorithm 1); `run_round` is one of them.

 1. sample the cohort                         `make_jobs`
 2. send each client its job
 3. the clients train                         `runtime.map`
 4. sort by client, so that finishing order does not matter
 5. check every update, quarantine bad ones   `quarantine`
 6. shared tensors: weighted mean             `merge_shared`
    the objective's server half               `objective.combine`
    the aggregator's rule, if it has one      `step_shared`
 7. aggregate the prompt sets                 `aggregate_prompts`, in the metric of `server.spread`
    or let a generator learn from them        `teach_generator`
 8. next state, in fresh memory               `next_state`, `check_finite`, `note_starts`
 9. evaluate                                  goes on while the clients of the next round train
10. report                                    `report`, `Unmeasured.measured`
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from fedprompt.aggregation import Aggregation, AggregationInput, Aggregator
from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.errors import RoundError
from fedprompt.core.seeding import derive_seed, torch_generator
from fedprompt.core.types import (
    Broadcast,
    ClientJob,
    ClientState,
    ClientUpdate,
    RoundReport,
    ServerState,
    Tensors,
)
from fedprompt.prompt_generators import PromptGenerator
from fedprompt.server.figures import Evaluation
from fedprompt.server.merge import (
    merge_shared,
    next_state,
    note_starts,
    step_shared,
    teach_generator,
)
from fedprompt.server.quarantine import Refusal, expected_of, fault_of_types, quarantine
from fedprompt.server.sampling import sample_cohort
from fedprompt.server.spread import (
    added,
    current_metric,
    is_unknown,
    keys_of_others,
    with_discriminants,
)
from fedprompt.server.traffic import count_bytes

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
    bytes_before: int = 0
    """What all clients sent before the first round, in whose traffic it is counted."""


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
            domain_accuracy=test.domain_accuracy,
            alone_accuracy=test.alone_accuracy,
            alone_validation_accuracy=validation.alone_accuracy,
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
        RoundError: no update of a round could be used, or what was made of them is not finite.
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

    expected = [expected_of(job, objective, settings.recipe, state) for job in jobs]
    good, refused = quarantine(updates, expected)  # 5
    check_not_empty(good, refused, round_index)
    weights = objective.weights([update.num_examples for update in good])
    population = settings.recipe.training.population
    mean = merge_shared(good, weights)  # 6
    shared, memory = objective.combine(state.shared, mean, good, population, state.objective)
    shared, moments = step_shared(aggregator, objective, shared, state)
    made: Tensors = {}
    spread = added(state.spread, good)
    metric = current_metric(spread)
    if settings.generator is None:  # 7
        others = keys_of_others(spread, [update.client_id for update in good])
        merged = aggregate_prompts(good, weights, state, settings, aggregator, metric, others)
    else:
        merged, made = teach_generator(settings.generator, good, weights, jobs, state)
    memories = {"aggregator": moments, "generator": made, "objective": memory, "spread": spread}
    state = next_state(state, merged, shared, good, memories)  # 8
    state = with_discriminants(state, metric)
    check_finite(state)
    state = note_starts(state, objective, good)
    aggregated = perf_counter()

    due = round_index % settings.eval_every == 0 or round_index == settings.rounds
    evaluation = evaluate(state) if due else None  # 9
    sound = [update for update in updates if fault_of_types(update) is None]
    up, down = count_bytes(settings.recipe, jobs, sound)
    traffic = (up + settings.bytes_before * (round_index == 1), down)
    seconds = {"train": trained - started, "aggregate": aggregated - trained, "evaluate": 0.0}
    known = report(state, sound, good, refused, merged, traffic, seconds)  # 10
    return Unmeasured(state, known, evaluation, aggregated)


def check_not_empty(
    good: Sequence[ClientUpdate], refused: Sequence[Refusal], round_index: int
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
        who = f"all {len(refused)} updates were" if len(refused) > 1 else "the only update was"
        raise RoundError(
            f"round {round_index}: {who} refused "
            f"(client {refused[0].client}: {refused[0].reason}); "
            "lower the learning rates or check the data"
        )


def check_finite(state: ServerState) -> None:
    """Refuse a round whose result no client could train with, before it is saved.

    Raises:
        RoundError: a broadcast tensor is not finite, though all that was merged into it is.
    """
    sent = {"keys": state.broadcast().keys, **state.received().tensors()}
    for path, tensor in sent.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise RoundError(
                f"round {state.round_index}: the server's {path}: {bad} of {tensor.numel()} values "
                "are not finite, though all updates are; check the aggregator, the objective's "
                "server half and the generator"
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
    """What one client gets for the round after `state`; a generator makes its prompts.

    Args:
        state: before the round.
        settings: seed and recipe, and the generator if there is one.
        client_id: of the client.
        broadcast: what all clients of the round receive.
    """
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
        tells_spread=is_unknown(state.spread, client_id),
    )


def aggregate_prompts(
    updates: Sequence[ClientUpdate],
    weights: Sequence[float],
    state: ServerState,
    settings: RoundSettings,
    aggregator: Aggregator,
    metric: Tensor | None = None,
    others: Tensor | None = None,
) -> Aggregation | None:
    """Merge the prompt sets; None when no prompts travel.

    Args:
        updates: the good ones.
        weights: how much each of them counts.
        state: before the round.
        settings: seed and recipe.
        aggregator: merges the sets.
        metric: (q, q) in which keys are compared; None for the Euclidean one.
        others: (M, q) keys of clients that were met before, if they are kept.
    """
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
            generator=torch_generator(settings.seed, "aggregate", state.round_index + 1),
            previous_keys=state.keys if options.sends_keys else None,
            metric=metric,
            others=others if options.sends_keys else None,
        )
    )


def report(
    state: ServerState,
    updates: Sequence[ClientUpdate],
    good: Sequence[ClientUpdate],
    refused: Sequence[Refusal],
    merged: Aggregation | None,
    traffic: tuple[int, int],
    seconds: dict[str, float],
) -> RoundReport:
    """What is known of the round before its evaluation; see `RoundReport`.

    Args:
        state: after the round.
        updates: all that came back.
        good: those that were used.
        refused: client and reason of the others.
        merged: the aggregator's result; None if no prompts travel.
        traffic: bytes up and down.
        seconds: of each phase.
    """
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
