"""What happens on the driver: prepare the federation, run the rounds, write the files.

`drive` is the whole of it, a generator of events. It runs where the runtime puts it: in the calling
process (`serial`) or inside a `DriverActor` (`ray`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from fedprompt.client.recipe import has_global_model
from fedprompt.client.worker import ClientWorker
from fedprompt.config import ExperimentConfig
from fedprompt.core.errors import CheckpointError
from fedprompt.core.files import Json, json_ready
from fedprompt.core.plugins import find
from fedprompt.core.types import Broadcast, ClientUpdate, RoundReport, ServerState
from fedprompt.data.partition.base import class_counts
from fedprompt.data.partition.file import make_recipe
from fedprompt.data.task import Task
from fedprompt.models.frozen_head import FrozenHead
from fedprompt.runs.checkpoint import load_latest, save_state
from fedprompt.runs.devices import devices_of, record_of
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.events import (
    Event,
    Note,
    PhaseStarted,
    Plan,
    Prepared,
    RoundFinished,
    Stage,
)
from fedprompt.runs.federation import Federation, describe, initial_state, prepare, preparing
from fedprompt.runs.following import follow
from fedprompt.runs.locks import sole_writer
from fedprompt.runs.manifest import manifest
from fedprompt.runs.plugins import copy_of, keep, records
from fedprompt.runs.predictions import with_predictions
from fedprompt.runs.starting_head import starting_head
from fedprompt.runs.summary import whole_summary
from fedprompt.runs.task_card import task_card, whitening_arrays
from fedprompt.runtime import Runtime
from fedprompt.server.evaluate import Model, PieceMap, Subject, evaluate, global_subjects
from fedprompt.server.figures import Evaluation
from fedprompt.server.round import Evaluate, RoundSettings, broadcast_of, make_job, run_rounds
from fedprompt.tracking.figures import figures_of

Draw = Callable[[Path], object]
"""Draws the figures and the report of a finished run, given its directory."""


def drive(runtime: Runtime, plan: Plan, draw: Draw) -> Iterator[Event]:
    """Do the whole experiment and yield events.

    Nothing is written before the data have been read and partitioned, so that a wrong request
    leaves no trace.

    Args:
        runtime: not yet started; it is closed at the end, whatever happens.
        plan: what to do.
        draw: called with the directory of each run that is finished.
    """
    with contextlib.ExitStack() as held:
        yield from _drive(runtime, plan, draw, held)


def _drive(runtime: Runtime, plan: Plan, draw: Draw, held: contextlib.ExitStack) -> Iterator[Event]:
    """`drive`, whose `held` keeps the run directory until all files are written."""
    config = plan.config
    try:
        runtime.warm_up()
        devices = record_of(config)
        federation = yield from preparing(config)
        if plan.resume:
            directory = RunDirectory.open(plan.run_dir)
            held.enter_context(sole_writer(directory.path))
            check_unchanged(directory, federation)
            check_devices(directory, devices)
        else:
            held.enter_context(sole_writer(RunDirectory.made(plan.run_dir)))
            directory = RunDirectory.create(plan.run_dir, plan.overwrite)
            write_header(directory, config, federation)
        yield Prepared(describe(federation, config))
        for note in federation.notes:
            yield Note(note)
        yield Stage("giving the workers backbone and data")
        for note in runtime.open(federation.setup):
            yield Note(note)
        stopped = yield from run_methods(runtime, config, federation, directory, draw)
    finally:
        runtime.close()
    if stopped:
        stop(directory, config, "; ".join(stopped), draw)
    else:
        finish(directory, config, draw)


def run_methods(
    runtime: Runtime,
    config: ExperimentConfig,
    federation: Federation,
    directory: RunDirectory,
    draw: Draw,
) -> Generator[Event, None, list[str]]:
    """The experiment's own method, then those it is compared with; finished ones are skipped.

    Args:
        runtime: open, with the federation's data.
        config: of the experiment's own method.
        federation: what all methods have in common.
        directory: of the experiment; comparisons have folders within.
        draw: called with the directory of each comparison that is finished.

    Returns:
        A line for each method whose rounds a callback stopped.
    """
    why = yield from run_method(runtime, config, federation, directory, directory)
    stopped = [] if why is None else [why]
    for method in config.compare:
        variant = config.with_method(method)
        comparison = directory.comparison(method)
        if comparison.is_finished():
            yield PhaseStarted(variant.label, variant.rounds, variant.rounds)
            continue
        with sole_writer(RunDirectory.made(comparison.path)):
            if not comparison.has_header():
                RunDirectory.create(comparison.path, overwrite=True)
                write_header(comparison, variant, federation)
            why = yield from run_method(runtime, variant, federation, comparison, directory)
            if why is None:
                finish(comparison, variant, draw)
            else:
                stop(comparison, variant, why, draw)
                stopped.append(f"{variant.label}: {why}")
    return stopped


def settings_of(config: ExperimentConfig, federation: Federation) -> RoundSettings:
    """What stays the same in all rounds of a method."""
    recipe = config.recipe(federation.task.num_classes)
    generator = config.build_generator()
    sent = 0
    if config.solves_first:
        sent = starting_head(config.head.start, federation.data, recipe.num_classes).bytes_up
    data, training = federation.data, config.clients
    return RoundSettings(
        config.seed,
        config.rounds,
        config.eval_every,
        recipe,
        generator,
        sent,
        config.build_defence(),
        tuple(len(data.rows(client, training.pooled)) for client in range(training.population)),
        devices_of(config, federation),
        config.accountant,
    )


def latest_state(
    config: ExperimentConfig, federation: Federation, directory: RunDirectory
) -> tuple[ServerState, list[str]]:
    """The state of the last good checkpoint, or the initial one; and what was wrong with others.

    Args:
        config: of the method.
        federation: for the initial state.
        directory: of the method's run.
    """
    if directory.last_round() is None:
        return initial_state(config, federation), []
    loaded = load_latest(directory.state_folder)
    return loaded.state, loaded.warnings


def run_method(
    runtime: Runtime,
    config: ExperimentConfig,
    federation: Federation,
    directory: RunDirectory,
    leading: RunDirectory,
) -> Generator[Event, None, str | None]:
    """All rounds of one method, from the start or from its last checkpoint.

    Args:
        runtime: open, with the federation's data.
        config: of the method.
        federation: what all methods have in common.
        directory: of the method's run; it has its header.
        leading: of the experiment, which is the same for the leading method.

    Returns:
        Why a callback stopped the rounds; None if all are done.
    """
    settings = settings_of(config, federation)
    evaluate_state = evaluator(
        runtime, federation, settings, config.measures_clients, config.measures_alone
    )
    evaluate_state = with_predictions(evaluate_state, directory, federation.setup.splits[0])
    aggregator = config.build_aggregator()
    state, warnings = latest_state(config, federation, directory)
    method = config.label
    for warning in warnings:
        yield Note(warning, method)
    if config.selects_in_vain:
        yield Note(
            f"{method}: nothing to select, as prompts.pool is no larger than prompts.count "
            f"({config.prompts.count}); set prompts.pool=20 or so",
            method,
        )
    directory.truncate_rounds(state.round_index)
    yield PhaseStarted(method, config.rounds, state.round_index)
    cohort = config.clients.cohort_size
    largest_pack = min(cohort, config.runtime.pack_size(cohort, settings.recipe))
    with follow(config, federation.task, directory, leading) as follower:
        yield from notes(follower.start())
        rounds = run_rounds(state, settings, runtime, aggregator, evaluate_state)
        for after, report in rounds if follower.why is None else ():
            write_round(directory, after, report, config.rounds)
            yield from notes(notes_on(report, largest_pack), method)
            if not report.missed:
                largest_pack = min(largest_pack, packed_in(report) or 1)
            yield RoundFinished(report, method)
            record = json_ready(report)
            runtime.publish(leading.path.name, method, figures_of(record))
            yield from notes(follower.round(record, after))
            if follower.why is not None:
                break
        yield from notes(follower.end())
    if follower.why is not None:
        yield Note(f"{method}: stopped by a callback: {follower.why}", method)
        runtime.abandon()
    return follower.why


def notes(texts: Iterable[str], method: str | None = None) -> Iterator[Event]:
    """An event for each text about a method, or about all of them."""
    return (Note(text, method) for text in texts)


def write_round(
    directory: RunDirectory, state: ServerState, report: RoundReport, rounds: int
) -> None:
    """Put a round on disk; the record first: a resume drops records newer than its checkpoint.

    Args:
        directory: of the method's run.
        state: after the round.
        report: of the round.
        rounds: of the whole run.
    """
    directory.append_round(report)
    save_state(directory.state_folder, state)
    directory.write_status({"state": "running", "round": state.round_index, "rounds": rounds})


def packed_in(report: RoundReport) -> int | None:
    """Clients of the largest pack of a round, as those say whose updates were used; None where
    there are none.
    """
    refused = {each["client"] for each in report.quarantined}
    good = [client for client in report.clients if client["client"] not in refused]
    return max((int(client["pack"]) for client in good), default=None)


def _flew(report: RoundReport) -> bool:
    """Whether updates came one by one, so that clients were trained in packs of any size."""
    return any("staleness" in client for client in report.clients)


def notes_on(report: RoundReport, largest_pack: int) -> Iterator[str]:
    """What the user should read about a round."""
    for refused in report.quarantined:
        yield (
            f"round {report.round}: the update of client {refused['client']} was left out: "
            f"{refused['reason']}"
        )
    packed = packed_in(report)
    if packed is None:
        yield f"round {report.round}: nobody reported in time; the model stays as it is"
    elif packed < largest_pack and not report.missed and not _flew(report):
        yield (
            f"round {report.round}: {largest_pack} clients did not fit in memory together; "
            f"going on with packs of {packed}"
        )


def evaluator(
    runtime: PieceMap,
    federation: Federation,
    settings: RoundSettings,
    measures_clients: Callable[[int], bool] = lambda round_index: False,
    measures_alone: Callable[[int], bool] = lambda round_index: False,
) -> Evaluate:
    """A function that starts to measure a state on the test and the validation split.

    Args:
        runtime: its workers measure.
        federation: splits and partition.
        settings: how clients select and classify, and what they receive.
        measures_clients: says for a round whether each client's own model is measured as well.
        measures_alone: says for a round whether the global model is measured as well with prompts
            that each image selects by itself.
    """
    recipe, splits = settings.recipe, federation.setup.splits
    has_global = has_global_model(recipe.prompts, recipe.head)

    def start(state: ServerState) -> Callable[[], tuple[Evaluation, Evaluation]]:
        subjects: list[Subject] = []
        broadcast = state.broadcast()
        alone = has_global and measures_alone(state.round_index)
        if has_global:
            subjects += global_subjects(broadcast, splits, state.keys)
        if alone and recipe.prompts.selects_together:
            subjects += global_subjects(broadcast, splits, state.keys, alone=True)
        if measures_clients(state.round_index):
            subjects += client_subjects(state, broadcast, federation, settings)
        waiting = evaluate(runtime, recipe, splits, subjects)

        def wait() -> tuple[Evaluation, Evaluation]:
            test, *others = waiting()
            validation = others[0] if others else Evaluation()  # no such split: no figures
            if alone and not recipe.prompts.selects_together:
                test, validation = map(as_if_alone, (test, validation))
            return test, validation

        return wait

    return start


def as_if_alone(evaluation: Evaluation) -> Evaluation:
    """The same figures for images that are alone, where none selects prompts with others."""
    return dataclasses.replace(evaluation, alone_accuracy=evaluation.accuracy)


def client_subjects(
    state: ServerState, broadcast: Broadcast, federation: Federation, settings: RoundSettings
) -> list[Subject]:
    """Every client's own model on its own share of each held-out split, if it has one.

    Args:
        state: the server's.
        broadcast: of the state; a generator gives each client prompts of its own in it.
        federation: splits and partition.
        settings: how clients select, and what they receive.
    """
    data, options = federation.data, settings.recipe.prompts
    table = data.table
    queries = table.queries(options.query_kind)
    by_client = options.sends_keys and options.choose_by == "client"
    subjects = []
    for split in range(len(federation.setup.splits)):
        for client, share in enumerate(federation.own_images(split)):
            if not len(share):
                continue
            job = make_job(state, settings, client, broadcast)
            own = torch.from_numpy(queries[data.parts[client]]).mean(dim=0) if by_client else None
            model = Model(job.broadcast, job.state.kept.trained(), state.keys)
            subjects.append(Subject(model, split, share, client, own))
    return subjects


def write_header(directory: RunDirectory, config: ExperimentConfig, federation: Federation) -> None:
    """What a run directory holds before the first round.

    Args:
        directory: of the method's run, new.
        config: of the method.
        federation: its partition is written down.
    """
    task, parts = federation.task, list(federation.data.parts)
    used = find(config.plugins)
    keep(directory.path, used)
    directory.write_config(f"# fedprompt run config.yaml\n{config.to_yaml(map(copy_of, used))}")
    about = {**manifest(), **records(used), "backbone_sha256": federation.backbone.checksum()}
    if federation.frozen_head is not None:
        about["frozen_head"] = frozen_head_conditions(federation.frozen_head, task)
    directory.write_manifest(about)
    directory.write_task(task_card(task))
    if config.system.enabled:
        directory.write_system(record_of(config))
    if federation.whitening:
        directory.write_whitening(whitening_arrays(federation.whitening))
    options = dataclasses.asdict(config.partition.options)
    directory.write_partition(
        parts,
        class_counts(parts, task.train.labels, task.num_classes),
        task.class_names,
        make_recipe(config.partition.name, options, config.seed, parts, task.train.labels),
    )


def frozen_head_conditions(head: FrozenHead, task: Task) -> dict[str, str]:
    """How the rows of each domain's classes were fitted; those of one public domain that stands for
    all are called `public`.
    """
    several = len(head.conditions) == len(task.group_names)
    names = task.group_names if several else ("public",)
    return dict(zip(names, head.conditions, strict=True))


def check_unchanged(directory: RunDirectory, federation: Federation) -> None:
    """Refuse to continue a run on other weights or another partition than it started with.

    Raises:
        CheckpointError: names what differs.
    """
    directory.check_backbone(federation.backbone.checksum())
    before, now = directory.read_indices(), federation.data.parts
    if len(before) != len(now) or not all(map(np.array_equal, before, now)):
        raise CheckpointError(
            f"{directory.path}: data or partition differ from those the run started with; "
            "use the version of manifest.json or start a new run"
        )


def check_devices(directory: RunDirectory, devices: Json) -> None:
    """Refuse to continue a run on other devices than it started with.

    Raises:
        CheckpointError: names the file that has changed.
    """
    started = directory.read_system()
    for field, values in json_ready(devices).items():
        if started and started.get(field) != values:
            raise CheckpointError(
                f"{directory.path}: system.{field} of the clients differs from that of the run's "
                "system.json; put the old file back or start a new run"
            )


def finish(directory: RunDirectory, config: ExperimentConfig, draw: Draw) -> None:
    """Write the summary of a run whose rounds are all done, and have it drawn.

    Args:
        directory: of the run.
        config: of its method.
        draw: called with the directory.
    """
    state = load_latest(directory.state_folder).state
    directory.write_summary(whole_summary(directory, config, state, "finished"))
    directory.write_status(
        {"state": "finished", "round": state.round_index, "rounds": config.rounds}
    )
    draw(directory.path)


def stop(directory: RunDirectory, config: ExperimentConfig, why: str, draw: Draw) -> None:
    """Note that callbacks stopped a run, or a method that it is compared with; it can be resumed.

    Args:
        directory: of the run.
        config: of its method.
        why: what the callbacks say.
        draw: called with the directory, if there is a round.
    """
    done = directory.last_round() or 0
    directory.write_status(
        {"state": "stopped", "round": done, "rounds": config.rounds, "message": why}
    )
    if done:
        draw(directory.path)


def replay(config: ExperimentConfig, directory: RunDirectory, client_id: int) -> ClientUpdate:
    """One client's work of the round after the last checkpoint, in this process.

    Args:
        config: of the method.
        directory: of the method's run.
        client_id: which client, from 0; it need not be in the cohort.
    """
    federation = prepare(config)
    state, _ = latest_state(config, federation, directory)
    settings = settings_of(config, federation)
    job = make_job(state, settings, client_id, broadcast_of(state, settings))
    return ClientWorker(federation.setup).train(settings.recipe, [job])[0]
