"""`fedprompt estimate`: what a run would send, keep and take, before it is started.

Bytes are counted (`runs.sizing`). Seconds are those of a short measurement: some steps of one
client, some test images, one aggregation of a whole cohort, each by the code that a run has.
"""

from __future__ import annotations

import dataclasses
import heapq
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedprompt.cli.bench import Clock, timed_steps
from fedprompt.client.recipe import LocalRecipe, has_global_model
from fedprompt.client.worker import ClientWorker, WorkerSetup
from fedprompt.config import ExperimentConfig
from fedprompt.core.files import Json, json_ready
from fedprompt.core.seeding import derive_seed, torch_generator
from fedprompt.core.types import ClientJob, ClientUpdate, ServerState
from fedprompt.data.prefix.tables import compute_table
from fedprompt.data.task import Split
from fedprompt.models.backbone import Backbone
from fedprompt.runs.devices import work_of
from fedprompt.runs.federation import Federation, describe
from fedprompt.runs.outline import Outline, outline
from fedprompt.runs.sizing import Deployment, Range, Sample, Traffic, count_traffic, sample
from fedprompt.runtime.base import limited_threads
from fedprompt.server.evaluate import Model, Subject, cut, measure_piece
from fedprompt.server.figures import Evaluation
from fedprompt.server.round import is_due, make_jobs, run_rounds

STEPS = 8
"""Training steps that are timed for each of two sizes of batch."""
PATIENCE = 4.0
"""Seconds that they may take; at least `FEWEST` are timed all the same."""
FEWEST = 3
IMAGES = 32
"""Images that are timed elsewhere."""
MEGA, GIGA = 1e6, 1e9


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast this machine is with a method, or what a given speed makes of it."""

    client: Callable[[int], float]
    """Seconds of a client (of a pack, if clients are packed) with so many images."""
    evaluated: float
    """Seconds of an image that is evaluated."""
    aggregated: float
    """Seconds of the server in a round."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a client actor needs beside the features, which are mapped and shared."""

    process: int
    """Python with its packages."""
    model: int
    """The frozen backbone."""
    data: int
    """The images of the largest client, as they enter the network."""
    step: int
    """What a training step keeps for its backward pass."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.process + self.model + self.data + self.step


@dataclasses.dataclass(frozen=True)
class MethodEstimate:
    """Of one method."""

    name: str
    rounds: int
    traffic: Traffic
    memory: Memory
    """Of an actor."""
    round_seconds: float
    """The mean of all rounds, evaluation included."""
    hours: float
    """Of all rounds."""
    deployment: Deployment | None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of an experiment."""

    title: str
    actors: int
    cache_bytes: int
    cached: bool
    """Whether they are kept on disk; in memory otherwise."""
    cache_seconds: float
    """To compute what is cached, the first time."""
    methods: tuple[MethodEstimate, ...]

    def tree(self) -> Json:
        """As plain values, with what the properties say."""
        methods = []
        for each in self.methods:
            row = json_ready(each)
            row["memory"]["total"] = each.memory.total
            if each.deployment is not None:
                row["deployment"]["hours"] = each.deployment.hours
            methods.append(row)
        hours = self.cache_seconds / 3600 + sum(each.hours for each in self.methods)
        return {**json_ready(self), "methods": methods, "hours": hours}


def make_estimate(
    config: ExperimentConfig, gflops: float | None = None, clock: Clock = time.perf_counter
) -> Estimate:
    """Size up an experiment with all its methods.

    Args:
        config: of the leading method, with the names of its rivals.
        gflops: 10^9 operations a second of one worker; None to measure this machine.
        clock: `time.process_time` leaves out the time that other programs had the cores.

    Raises:
        ConfigError: the data cannot be read or partitioned as asked.
        RoundError: with virtual time, nobody reports in time in a round that is not to be skipped.
    """
    process = resident_bytes()
    with limited_threads(config.runtime.threads):
        found = outline(config)
        variants = [config, *map(config.with_method, config.compare)]
        methods = tuple(estimate_method(each, found, process, gflops, clock) for each in variants)
        backbone = found.federation.backbone
        if gflops is None:
            each = prefix_seconds(backbone, found.federation.task.train, clock)
        else:
            federation = found.federation
            each = work_of(config.recipe(federation.task.num_classes), federation).prefix
            each /= gflops * GIGA
    actors = 1 if config.runtime.name == "serial" else config.runtime.num_actors
    return Estimate(
        describe(found.federation, config),
        actors,
        found.cache_bytes,
        config.cache.enabled,
        found.images * each,
        methods,
    )


def estimate_method(
    config: ExperimentConfig, found: Outline, process: int, gflops: float | None, clock: Clock
) -> MethodEstimate:
    """Size up one method.

    Args:
        config: of the method.
        found: what the methods of the experiment have in common.
        process: bytes of a process that has imported everything.
        gflops: 10^9 operations a second of one worker; None to measure.
        clock: gives the seconds.
    """
    federation = found.federation
    worker = ClientWorker(few_images(federation.setup, config.clients.batch_size))
    taken = sample(config, federation, worker)
    traffic, deployment = count_traffic(config, federation, taken)
    if gflops is None:
        rates = measured_rates(config, federation, worker, taken, clock)
    else:
        rates = given_rates(config, federation, worker, taken, gflops)
    seconds = list(round_seconds(config, federation, taken, rates))
    return MethodEstimate(
        config.label,
        config.rounds,
        traffic,
        memory_of(federation, worker, taken, process),
        statistics.fmean(seconds),
        sum(seconds) / 3600,
        deployment,
    )


def few_images(setup: WorkerSetup, most: int) -> WorkerSetup:
    """The setup with at most so many images of each client; pooled, of all of them together."""
    parts = tuple(part[:most] for part in setup.data.parts)
    return dataclasses.replace(setup, data=dataclasses.replace(setup.data, parts=parts))


# ---------------------------------------------------------------- seconds


def measured_rates(
    config: ExperimentConfig,
    federation: Federation,
    worker: ClientWorker,
    taken: Sample,
    clock: Clock,
) -> Rates:
    """Time one client, or one pack, with full and with half batches; then the server.

    Args:
        config: of the method.
        federation: an outline.
        worker: any of its setup.
        taken: the method's sample.
        clock: gives the seconds.
    """
    recipe, batch = taken.settings.recipe, config.clients.batch_size
    pack = config.runtime.pack_size(config.clients.cohort_size, recipe)
    full = time_client(federation, worker, taken, batch, pack, clock)
    half = time_client(federation, worker, taken, max(1, batch // 2), pack, clock)
    slope = (full[1] - half[1]) / (batch - batch // 2) if batch > 1 else 0.0
    epochs = recipe.training.epochs

    def client(images: int) -> float:
        whole, rest = divmod(images, batch)
        last = max(full[1] - slope * (batch - rest), 0.0) if rest else 0.0
        return full[0] + epochs * (whole * full[1] + last)

    return Rates(
        client,
        evaluation_seconds(federation, worker, taken, clock),
        aggregation_seconds(config, taken, clock),
    )


def time_client(
    federation: Federation,
    worker: ClientWorker,
    taken: Sample,
    images: int,
    pack: int,
    clock: Clock,
) -> tuple[float, float]:
    """Seconds of a client's work outside its steps, and the median of its steps.

    Args:
        federation: an outline.
        worker: any of its setup.
        taken: the method's sample.
        images: that each client has; no more than a batch.
        pack: clients that are trained together.
        clock: gives the seconds.
    """
    data = federation.data
    everybody = data.rows(0, pooled=True)
    # As many images as a batch, whoever owns them; some clients may have fewer.
    rows = everybody[: min(images, len(everybody))]
    recipe = taken.settings.recipe
    training = dataclasses.replace(recipe.training, epochs=1, pooled=False)
    recipe = dataclasses.replace(recipe, training=training)
    worker.data = dataclasses.replace(data, parts=(rows,) * pack)
    jobs = [
        dataclasses.replace(taken.job, client_id=k, seed=derive_seed(k, "measured"))
        for k in range(pack)
    ]
    with timed_steps(clock) as steps:  # the first use of anything takes longer
        worker.train(recipe, jobs)
    often = int(max(FEWEST, min(STEPS, PATIENCE / max(sum(steps), 1e-9))))
    training = dataclasses.replace(training, epochs=often)
    recipe = dataclasses.replace(recipe, training=training)
    with timed_steps(clock) as steps:
        started = clock()
        worker.train(recipe, jobs)
        whole = clock() - started
    return max(whole - sum(steps), 0.0), statistics.median(steps) if steps else 0.0


def evaluation_seconds(
    federation: Federation, worker: ClientWorker, taken: Sample, clock: Clock
) -> float:
    """Seconds of an image that is evaluated, by the model of a client, which has all parts.

    Args:
        federation: an outline.
        worker: any of its setup.
        taken: the method's sample.
        clock: gives the seconds.
    """
    recipe = taken.settings.recipe
    model = Model(taken.job.broadcast, taken.job.state.kept.trained(), taken.state.keys)
    images = np.arange(min(IMAGES, len(federation.setup.splits[0])), dtype=np.int64)
    subject = Subject(model, 0, images)
    pieces = cut(subject, recipe, federation.setup.splits[0])
    measure_piece(worker, recipe, pieces[0])
    started = clock()
    for piece in pieces:
        measure_piece(worker, recipe, piece)
    return (clock() - started) / len(subject.images)


class _Ready:
    """A runtime whose clients have done their work already."""

    def __init__(self, update: ClientUpdate, width: int) -> None:
        self.update, self.width = update, width

    def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        """The update of one client, moved a little for each."""
        for job in jobs:
            noise = torch_generator(job.seed, "estimate")
            moved = self.update.prompts + 0.02 * torch.randn(
                self.update.prompts.shape, generator=noise
            )
            key = torch.randn(1, self.width, generator=noise)
            key = torch.nn.functional.normalize(key, dim=1)
            yield dataclasses.replace(
                self.update,
                client_id=job.client_id,
                round_index=job.round_index,
                prompts=moved,
                keys=key.expand(len(moved), -1).clone(),
                spread=self.update.spread if job.tells_spread else None,
            )


def aggregation_seconds(config: ExperimentConfig, taken: Sample, clock: Clock) -> float:
    """Seconds that the server takes to check and merge the updates of a whole cohort.

    Args:
        config: of the method.
        taken: its sample.
        clock: gives the seconds.
    """
    settings = dataclasses.replace(taken.settings, rounds=1, system=None)

    def nothing(state: ServerState) -> Callable[[], tuple[Evaluation, Evaluation]]:
        return lambda: (Evaluation(), Evaluation())

    ready = _Ready(taken.update, taken.update.keys.shape[1])
    aggregator = config.build_aggregator()
    state = dataclasses.replace(taken.state, system={})
    started = clock()
    for _ in run_rounds(state, settings, ready, aggregator, nothing):
        pass
    return clock() - started


def prefix_seconds(backbone: Backbone, split: Split, clock: Clock) -> float:
    """Seconds of an image whose features are computed.

    Args:
        backbone: the frozen network.
        split: holds the images.
        clock: gives the seconds.
    """
    count = min(IMAGES, len(split))
    some = Split(split.images[:count], split.labels[:count], split.groups[:count])
    device = next(backbone.parameters()).device
    started = clock()
    compute_table(backbone, some, device)
    return (clock() - started) / count


def given_rates(
    config: ExperimentConfig,
    federation: Federation,
    worker: ClientWorker,
    taken: Sample,
    gflops: float,
) -> Rates:
    """What a given speed makes of the operations that clients and evaluation take.

    Args:
        config: of the method.
        federation: an outline.
        worker: any of its setup.
        taken: the method's sample.
        gflops: 10^9 operations a second of one worker.
    """
    work = work_of(taken.settings.recipe, federation)
    step = work.step(taken.job) if work.epochs else 0.0
    pack = config.runtime.pack_size(config.clients.cohort_size, taken.settings.recipe)
    speed = gflops * GIGA
    return Rates(
        lambda images: pack * images * work.epochs * step / speed,
        work.prefix / speed,
        aggregation_seconds(config, taken, time.perf_counter),
    )


def round_seconds(
    config: ExperimentConfig, federation: Federation, taken: Sample, rates: Rates
) -> Iterator[float]:
    """Seconds of each round on this machine; the workers evaluate beside the next round's clients.

    Args:
        config: of the method.
        federation: its data.
        taken: its sample.
        rates: how fast.
    """
    settings, runtime = taken.settings, config.runtime
    workers = 1 if runtime.name == "serial" else runtime.num_actors
    # More actors than there are cores for share them.
    busy = max(1, min(workers, runtime.num_cpus // runtime.threads))
    held = sum(map(len, federation.setup.splits))
    recipe, data = settings.recipe, federation.data
    has_global = has_global_model(recipe.prompts, recipe.head)

    for round_index in range(1, config.rounds + 1):
        state = dataclasses.replace(taken.state, round_index=round_index - 1)
        jobs = make_jobs(state, settings)
        sizes = [len(data.rows(job.client_id, recipe.training.pooled)) for job in jobs]
        pack = runtime.pack_size(len(jobs), recipe)
        packs = [max(sizes[start : start + pack]) for start in range(0, len(sizes), pack)]
        models = 0
        if is_due(round_index, settings):
            alone = has_global and config.measures_alone(round_index)
            models = has_global + (alone and recipe.prompts.selects_together)
            models += config.measures_clients(round_index)
        evaluated = models * held * rates.evaluated
        yield makespan(map(rates.client, packs), busy) + evaluated / busy + rates.aggregated


def makespan(seconds: Iterator[float] | map[float], workers: int) -> float:
    """When the last of some pieces of work ends, each taken in turn by who is free first.

    >>> makespan(iter([3.0, 1.0, 1.0, 2.0]), 2)
    4.0
    """
    free = [0.0] * workers
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


# ---------------------------------------------------------------- memory


def resident_bytes() -> int:
    """Bytes of this process in memory, or 500 MB where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 500_000_000
    import resource

    return pages * resource.getpagesize()


def memory_of(federation: Federation, worker: ClientWorker, taken: Sample, process: int) -> Memory:
    """What an actor needs for the largest client.

    Args:
        federation: its data.
        worker: any of its setup.
        taken: the method's sample.
        process: bytes of a process that has imported everything.
    """
    recipe, table = taken.settings.recipe, federation.data.table
    training = recipe.training
    largest = max(len(federation.data.rows(k, training.pooled)) for k in range(training.population))
    row = table.tokens_at(federation.data.parts[0][:1]) if recipe.needs_tokens else None
    inputs = table.features[0].nbytes if row is None else row.nbytes
    queries = table.queries(recipe.prompts.query_kind)[0].nbytes
    model = sum(each.nbytes for each in worker.backbone.state_dict().values())
    return Memory(process, model, largest * (inputs + queries + 16), step_bytes(worker, taken))


def step_bytes(worker: ClientWorker, taken: Sample) -> int:
    """Bytes that a step keeps for its backward pass, beside the backbone's weights."""
    known = {each.untyped_storage().data_ptr() for each in worker.backbone.state_dict().values()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    recipe = taken.settings.recipe
    training = dataclasses.replace(recipe.training, epochs=1)
    once = dataclasses.replace(recipe, training=training)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        worker.train(once, [dataclasses.replace(taken.job, client_id=0)])
    return sum(kept.values())


# ---------------------------------------------------------------- on the screen


def render(estimate: Estimate) -> Group:
    """The estimate for the terminal, in 80 columns.

    Args:
        estimate: of an experiment.
    """
    return Group(*_lines(estimate))


def _lines(estimate: Estimate) -> Iterator[Any]:
    yield Text(estimate.title)
    kept = "on disk" if estimate.cached else "in memory"
    yield Text(
        f"features: {_size(estimate.cache_bytes)} {kept}, "
        f"computed once in {_time(estimate.cache_seconds)}"
    )
    heads = [f"{what}\n{way}" for what in ("client", "round", "run") for way in ("up", "down")]
    yield _table(("sent", *heads), [(each.name, *_sent(each.traffic)) for each in estimate.methods])
    for each in estimate.methods:
        yield from map(Text, _notes(each))
    yield _table(
        ("on this machine", "rounds", "a round", "all rounds", "an actor's memory"),
        [
            (
                each.name,
                str(each.rounds),
                _time(each.round_seconds),
                _time(each.hours * 3600),
                _size(each.memory.total),
            )
            for each in estimate.methods
        ],
    )
    total = estimate.cache_seconds + 3600 * sum(each.hours for each in estimate.methods)
    workers = f"{estimate.actors} worker{'s' if estimate.actors > 1 else ''}"
    yield Text(f"all methods with {workers}: {_time(total)}, less what is cached already")
    deployed = [(each.name, each.deployment) for each in estimate.methods if each.deployment]
    if not deployed:
        yield Text("a deployment's hours: set system.speed and system.bandwidth (docs/sizing.md)")
        return
    rows = []
    for name, found in deployed:
        why = [each.why for each in found.missed]
        counts = (str(why.count(each)) for each in ("late", "dropped", "surplus"))
        middle = statistics.median(found.seconds)
        rows.append((name, _time(middle), _time(found.hours * 3600), str(found.merged), *counts))
    yield _table(
        ("on the clients", "median\nround", "all\nrounds", "merged", "late", "dropped", "surplus"),
        rows,
    )


def _sent(traffic: Traffic) -> Iterator[str]:
    for what in ("client", "round", "run"):
        for way in ("up", "down"):
            yield _range(getattr(traffic, f"{what}_{way}"))


def _notes(method: MethodEstimate) -> Iterator[str]:
    traffic = method.traffic
    if traffic.first_contact:
        yield (
            f"{method.name}: a client sends up to {_size(traffic.first_contact)} more the first "
            "time, about how its queries spread"
        )
    if traffic.before:
        yield f"{method.name}: all clients send {_size(traffic.before)} before the first round"
    if not (traffic.run_up.exact and traffic.run_down.exact):
        bounds = (_bounds(each) for each in (traffic.run_up, traffic.run_down))
        up, down = bounds
        yield (
            f"{method.name}: ~ with the prompts that the server starts with; a run sends "
            f"{up} up and {down} down"
        )


def _bounds(sent: Range) -> str:
    if sent.high is None:
        return f"at least {_size(sent.low)}"
    return _size(sent.low) if sent.exact else f"{_size(sent.low)} to {_size(sent.high)}"


def _range(sent: Range) -> str:
    return f"{'' if sent.exact else '~'}{_size(sent.start)}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    first, *others = heads
    table.add_column(first, overflow="fold", min_width=6)
    for head in others:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _size(number: float) -> str:
    """Bytes for people.

    >>> _size(96636), _size(2.61e6), _size(7.5e9)
    ('96.6 kB', '2.61 MB', '7.5 GB')
    """
    for unit, size in (("TB", 1e12), ("GB", GIGA), ("MB", MEGA), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def _time(seconds: float) -> str:
    """Seconds for people.

    >>> _time(0.24), _time(90), _time(7200)
    ('0.24 s', '1.5 min', '2 h')
    """
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
