"""The rounds of a federation (PFPT, arXiv 2502.19752, Algorithm 1); `run_round` is one of them.

 1. sample the cohort                         `make_jobs`
 2. send each client its job
 3. the clients train                         `runtime.map`
 4. sort by client, so that finishing order does not matter; with virtual time, leave out whoever
    dropped out or is late                    `Cohort`
 5. check every update, quarantine bad ones   `quarantine`
    let a defence see the whole updates       `defend`
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
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
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
from fedprompt.defences import Defence, Updates
from fedprompt.defences.none import NoDefence, NoneOptions
from fedprompt.prompt_generators import PromptGenerator
from fedprompt.server.figures import Evaluation
from fedprompt.server.flight import Flight, arrived, earliest, in_flight, remembered
from fedprompt.server.merge import (
    merge_shared,
    next_state,
    note_starts,
    step_shared,
    teach_generator,
)
from fedprompt.server.privacy import Accountant
from fedprompt.server.quarantine import (
    Refusal,
    client_of,
    expected_of,
    in_order,
    is_readable,
    quarantine,
    sound_metrics,
)
from fedprompt.server.sampling import sample_cohort
from fedprompt.server.spread import (
    added,
    current_metric,
    is_unknown,
    keys_of_others,
    with_discriminants,
)
from fedprompt.server.traffic import count_bytes, download_bytes, upload_bytes
from fedprompt.server.virtual import Timing, VirtualSystem, passed

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
    defence: Defence = dataclasses.field(default_factory=lambda: NoDefence(NoneOptions()))
    """Sees the whole updates before they are merged."""
    sizes: tuple[int, ...] | None = None
    """Images of each client, the most that it can claim; None if the server does not know."""
    system: VirtualSystem | None = None
    """The clients' devices; None without virtual time."""
    privacy: Accountant | None = None
    """What rounds use up of the clients' privacy; None without."""


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
    cohort = cohort_of(state, settings)  # 1, 2
    arriving = runtime.map(settings.recipe, cohort.jobs)  # 3
    if before is not None:
        yield before.measured()
    updates, timing = cohort.settle(in_order(arriving))  # 4
    trained = perf_counter()
    if timing is not None and not timing.merged:
        return skipped(state, settings, cohort, timing, evaluate, trained - started)

    jobs = cohort.merged_jobs(timing)
    expected = [expected_of(job, objective, settings.recipe, state, settings.sizes) for job in jobs]
    good, refused = quarantine(updates, expected)  # 5
    refused = [*cohort.refused, *refused]
    check_not_empty(good, refused, round_index)
    used, actions = defend(good, jobs, settings.defence)
    weights = objective.weights([update.num_examples for update in used])
    population = settings.recipe.training.population
    mean = merge_shared(used, weights)  # 6
    shared, memory = objective.combine(state.shared, mean, used, population, state.objective)
    shared, moments = step_shared(aggregator, objective, shared, state)
    made: Tensors = {}
    spread = added(state.spread, used)
    metric = current_metric(spread)
    if settings.generator is None:  # 7
        others = keys_of_others(spread, [update.client_id for update in used])
        merged = aggregate_prompts(used, weights, state, settings, aggregator, metric, others)
    else:
        merged, made = teach_generator(settings.generator, used, weights, jobs, state)
    memories = {"aggregator": moments, "generator": made, "objective": memory, "spread": spread}
    memories["system"] = cohort.memory(timing)
    state = next_state(state, merged, shared, good, memories)  # 8
    state = with_discriminants(state, metric)
    check_finite(state)
    state = note_starts(state, objective, good)
    aggregated = perf_counter()

    evaluation = evaluate(state) if is_due(round_index, settings) else None  # 9
    sound = [update for update in updates if is_readable(update)]
    traffic = traffic_of(settings, cohort, sound)
    seconds = {"train": trained - started, "aggregate": aggregated - trained, "evaluate": 0.0}
    known = report(state, sound, good, refused, merged, traffic, seconds)  # 10
    known = with_staleness(with_marks(known, actions, settings.recipe.attackers), cohort.staleness)
    if settings.privacy is not None:
        known = dataclasses.replace(known, epsilon=settings.privacy.epsilon(round_index))
    return Unmeasured(state, with_timing(known, state, timing), evaluation, aggregated)


class Cohort:
    """The clients of a round, and with virtual time who of them is in time.

    Args:
        state: before the round.
        settings: seed, schedule, recipe and devices.
    """

    def __init__(self, state: ServerState, settings: RoundSettings) -> None:
        self.settings = settings
        self.state = state
        self.round_index = state.round_index + 1
        self.refused: list[Refusal] = []
        """Updates that were refused before they were to be merged."""
        self.staleness: dict[int, int] = {}
        """Of each merged client in an asynchronous run."""
        self.selected = self._select()
        """The jobs of all."""
        self.jobs = self.selected
        """Those that are worth doing."""
        self._begun: dict[int, float] = {}
        system = settings.system
        if system is not None:
            down = {job.client_id: download_bytes(job) for job in self.selected}
            met = state.system["met"].tolist()
            self._begun = system.before_upload(self.selected, down, met)
            worth = system.worth_training(self.round_index, self._begun)
            self.jobs = [job for job in self.selected if job.client_id in worth]

    def _select(self) -> list[ClientJob]:
        return make_jobs(self.state, self.settings)

    def memory(self, timing: Timing | None) -> Tensors:
        """The virtual clock after the round.

        Args:
            timing: of the round; None without virtual time.
        """
        return passed(self.state.system, timing, self.clients)

    @property
    def clients(self) -> list[int]:
        """All that were selected, ascending."""
        return [job.client_id for job in self.selected]

    def settle(self, updates: list[ClientUpdate]) -> tuple[list[ClientUpdate], Timing | None]:
        """The updates that came in time, and how the round went by the virtual clock.

        What cannot be read, or is of no client of the cohort, is for `quarantine` to refuse.

        Args:
            updates: of the jobs that were done.

        Raises:
            RoundError: nobody came in time, and such a round is not to be skipped.
        """
        system = self.settings.system
        if system is None:
            return updates, None
        selects = self.settings.recipe.prompts.selection != "all"
        sent = {
            client: upload_bytes(update, selects) if is_readable(update) else 0
            for update in updates
            if isinstance(client := client_of(update), int) and client in self._begun
        }
        wanted = self.settings.recipe.training.cohort_size
        timing = system.settle(self.round_index, self._begun, sent, wanted)
        system.check_not_empty(timing, self.round_index)
        missed = self._begun.keys() - timing.merged
        return [update for update in updates if client_of(update) not in missed], timing

    def merged_jobs(self, timing: Timing | None) -> list[ClientJob]:
        """The jobs whose updates came in time."""
        return [job for job in self.jobs if timing is None or job.client_id in timing.merged]


class Arrivals(Cohort):
    """A merge of an asynchronous run: idle places are filled, and whoever arrives first is merged.

    The places of those that were merged are filled after the merge, all at its time.

    Args:
        state: before the merge.
        settings: seed, schedule, recipe and devices.
    """

    def __init__(self, state: ServerState, settings: RoundSettings) -> None:
        self._flights = in_flight(state.system)
        super().__init__(state, settings)

    def _select(self) -> list[ClientJob]:
        training = self.settings.recipe.training
        idle = [k for k in range(training.population) if k not in self._flights]
        places = training.cohort_size - len(self._flights)
        chosen = sample_cohort(self.settings.seed, self.round_index, len(idle), places)
        broadcast = broadcast_of(self.state, self.settings)
        return [make_job(self.state, self.settings, idle[k], broadcast) for k in chosen]

    def settle(self, updates: list[ClientUpdate]) -> tuple[list[ClientUpdate], Timing | None]:
        """The updates that arrive first, moved to the present model, and when the last one came.

        Args:
            updates: of the clients that have just been selected.

        Raises:
            RoundError: all were refused, and nothing else is on its way.
        """
        settings, state = self.settings, self.state
        system, objective = settings.system, settings.recipe.build_objective()
        assert system is not None  # or there is no asynchronous run
        described = [
            expected_of(job, objective, settings.recipe, state, settings.sizes) for job in self.jobs
        ]
        good, self.refused = quarantine(updates, described)
        selects, clock = settings.recipe.prompts.selection != "all", float(state.system["seconds"])
        for update in good:
            client = update.client_id
            sending = system.seconds_of(client, upload_bytes(update, selects))
            # How long the simulator took is no part of the state: it differs from run to run.
            flying = dataclasses.replace(update, metrics={**update.metrics, "seconds": 0.0})
            arrival = clock + (self._begun[client] + sending)
            self._flights[client] = Flight(arrival, state.round_index, flying)
        check_not_empty(list(self._flights), self.refused, self.round_index)
        options = system.options
        schedule, step, staleness = options.build_schedule()
        here = sorted(earliest(self._flights, options.buffer or 1))
        came = {client: self._flights.pop(client) for client in here}
        self.staleness = {k: state.round_index - flight.version for k, flight in came.items()}
        merged = [
            arrived(flight, schedule, step, staleness.weight(self.staleness[client]), state)
            for client, flight in came.items()
        ]
        self._clock = max(flight.arrival for flight in came.values())
        return merged, Timing(self._clock - clock, frozenset(came), ())

    def merged_jobs(self, timing: Timing | None) -> list[ClientJob]:
        """What those that have arrived would be sent now, by which their updates are checked."""
        broadcast = broadcast_of(self.state, self.settings)
        return [make_job(self.state, self.settings, k, broadcast) for k in self.staleness]

    def memory(self, timing: Timing | None) -> Tensors:
        """The virtual clock after the merge, and what is still on its way."""
        before = self.state.system
        return {
            **passed(before, timing, self.clients),
            "seconds": torch.tensor(self._clock, dtype=torch.float64),
            **remembered(self._flights, before, self.state),
        }


def cohort_of(state: ServerState, settings: RoundSettings) -> Cohort:
    """The clients of the next round, or of the next merge of an asynchronous run."""
    system = settings.system
    kind = Arrivals if system is not None and system.options.asynchronous else Cohort
    return kind(state, settings)


def is_due(round_index: int, settings: RoundSettings) -> bool:
    """Whether a round is evaluated."""
    return round_index % settings.eval_every == 0 or round_index == settings.rounds


def traffic_of(
    settings: RoundSettings, cohort: Cohort, updates: Sequence[ClientUpdate]
) -> tuple[int, int]:
    """Bytes up and down of a round: all that were selected received, those in time have sent.

    Args:
        settings: the recipe, and what was sent before the first round.
        cohort: who was selected.
        updates: that came in time and can be read.
    """
    up, down = count_bytes(settings.recipe, cohort.selected, updates)
    return up + settings.bytes_before * (cohort.round_index == 1), down


def skipped(
    state: ServerState,
    settings: RoundSettings,
    cohort: Cohort,
    timing: Timing,
    evaluate: Evaluate,
    seconds: float,
) -> Unmeasured:
    """A round in which nobody reported in time: nothing changes but the clock.

    Args:
        state: before the round.
        settings: seed, schedule and recipe.
        cohort: who was selected.
        timing: when the round ended.
        evaluate: measures a state.
        seconds: that the clients trained in vain.
    """
    system = passed(state.system, timing, cohort.clients)
    state = dataclasses.replace(state, round_index=cohort.round_index, system=system)
    evaluation = evaluate(state) if is_due(cohort.round_index, settings) else None
    up, down = traffic_of(settings, cohort, [])
    known = RoundReport(
        round=state.round_index,
        accuracy=math.nan,
        loss=math.nan,
        validation_accuracy=math.nan,
        train_loss=math.nan,
        num_prompts=len(state.prompts),
        bytes_up=up,
        bytes_down=down,
        seconds={"train": seconds, "aggregate": 0.0, "evaluate": 0.0},
    )
    return Unmeasured(state, with_timing(known, state, timing), evaluation, perf_counter())


def with_timing(report: RoundReport, state: ServerState, timing: Timing | None) -> RoundReport:
    """The report of a round with its virtual time.

    Args:
        report: of the round.
        state: after it.
        timing: of it; None without virtual time.
    """
    if timing is None:
        return report
    return dataclasses.replace(
        report,
        virtual_seconds=timing.seconds,
        virtual_hours=float(state.system["seconds"]) / 3600,
        missed=tuple(map(dataclasses.asdict, timing.missed)),
    )


def defend(
    updates: Sequence[ClientUpdate], jobs: Sequence[ClientJob], defence: Defence
) -> tuple[Sequence[ClientUpdate], Mapping[int, str]]:
    """What is merged of a round's good updates, and what a defence did to whose.

    Args:
        updates: usable ones.
        jobs: what the clients were sent.
        defence: may leave some out, or change their tensors.

    Raises:
        RoundError: a defence of the user's own left nothing.
    """
    if not defence.acts:
        return updates, {}
    prompts = {job.client_id: job.broadcast.prompts for job in jobs}
    made = defence.defend(Updates(updates, jobs[0].broadcast, prompts))
    if not made.updates:
        raise RoundError(
            f"round {jobs[0].round_index}: {type(defence).__name__} left none of "
            f"{len(updates)} updates; expected a defence to leave at least one"
        )
    return made.updates, made.actions


def with_marks(
    report: RoundReport, actions: Mapping[int, str], attackers: Collection[int]
) -> RoundReport:
    """The report with what a defence did to whose update, and with who attacks.

    Args:
        report: of the round.
        actions: of the defence, by client.
        attackers: known to the experiment, and not to the server.
    """
    if not actions and not attackers:
        return report
    clients = tuple(
        {
            **client,
            **({"attacks": client["client"] in attackers} if attackers else {}),
            **({"defence": actions[client["client"]]} if client["client"] in actions else {}),
        }
        for client in report.clients
    )
    return dataclasses.replace(report, clients=clients)


def with_staleness(report: RoundReport, staleness: Mapping[int, int]) -> RoundReport:
    """The report with the staleness of each client's update, if the run is asynchronous; how long
    the simulator took for one is not known any more when it arrives.
    """
    if not staleness:
        return report
    clients = tuple(
        {
            **{name: value for name, value in each.items() if name != "seconds"},
            "staleness": staleness[each["client"]],
        }
        for each in report.clients
    )
    return dataclasses.replace(report, clients=clients)


def check_not_empty(good: Sequence[object], refused: Sequence[Refusal], round_index: int) -> None:
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
    size = training.cohort_size
    if settings.system is not None:
        size = settings.system.cohort_size(size, training.population)
    cohort = sample_cohort(settings.seed, state.round_index + 1, training.population, size)
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
            **sound_metrics(update.metrics),
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
