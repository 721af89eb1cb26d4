"""What a method would send, and how long its deployment would take, counted before it is run.

One client really trains on a few images. What it receives and returns has the types and shapes of
the run, and its bytes are those of `server.traffic`. Then the cohorts of all rounds are drawn as in
the run, and with virtual time its clients report, drop out or come late as they would.

Two things only a run can know: how many prompts the server will keep where the aggregator decides,
and how many of them clients use where each batch selects anew. They have bounds here, and the
figures in between are those of a pool that stays as it begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from fedprompt.client.worker import ClientWorker
from fedprompt.config import ExperimentConfig
from fedprompt.core.errors import ConfigError
from fedprompt.core.types import ClientJob, ClientUpdate, ServerState
from fedprompt.data.prefix.spread import factor_size
from fedprompt.runs.driver import settings_of
from fedprompt.runs.federation import Federation, initial_state
from fedprompt.server.round import RoundSettings, make_jobs
from fedprompt.server.traffic import download_bytes, upload_bytes
from fedprompt.server.virtual import Missed


@dataclasses.dataclass(frozen=True)
class Range:
    """A number of bytes: the least, with the pool as it begins, the most."""

    low: int
    start: int
    high: int | None
    """None where there is no bound."""

    def per(self, number: int) -> Range:
        """The same divided and rounded."""
        high = None if self.high is None else round(self.high / number)
        return Range(round(self.low / number), round(self.start / number), high)

    @property
    def exact(self) -> bool:
        """Whether it cannot be another."""
        return self.low == self.high


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of a method."""

    client_up: Range
    """Of one client in a round in which it tells nothing about its queries."""
    client_down: Range
    first_contact: int
    """What the largest client sends once in addition, about how its queries spread."""
    before: int
    """What all clients send before the first round."""
    round_up: Range
    """Of a round: the mean of all rounds."""
    round_down: Range
    run_up: Range
    run_down: Range


@dataclasses.dataclass(frozen=True)
class Deployment:
    """How all rounds go by the virtual clock."""

    seconds: tuple[float, ...]
    """Of each round."""
    merged: int
    """Updates of all rounds."""
    missed: tuple[Missed, ...]
    """Of all rounds."""

    @property
    def hours(self) -> float:
        """Of all rounds."""
        return sum(self.seconds) / 3600


@dataclasses.dataclass(frozen=True)
class Sample:
    """One client's work, done for real on a few images."""

    state: ServerState
    """Before the first round."""
    settings: RoundSettings
    job: ClientJob
    update: ClientUpdate


def sample(config: ExperimentConfig, federation: Federation, worker: ClientWorker) -> Sample:
    """Let one client of the first round train on a few images.

    Args:
        config: of the method.
        federation: an outline of it.
        worker: of its setup, with clients that have few images each.
    """
    state = initial_state(config, federation)
    settings = settings_of(config, federation)
    job = make_jobs(state, settings)[0]
    return Sample(state, settings, job, worker.train(settings.recipe, [job])[0])


@dataclasses.dataclass(frozen=True)
class Rows:
    """How many prompts travel."""

    start: int
    """Prompts that the server begins with."""
    least: int
    """Fewest that it ever holds."""
    growth: int | None
    """Most that a round adds; None where they may multiply."""
    bound: int
    """Most that it ever holds; 0 for no bound."""
    used: tuple[int, int]
    """Prompts that a client returns: at least, and of a pool as it begins."""
    all_used: bool
    """Whether a client may return any number of the pool's."""

    def most(self, round_index: int) -> int | None:
        """Most prompts that a round may broadcast; None if there is no bound."""
        if self.growth is None:
            return self.bound or None
        grown = self.start + self.growth * (round_index - 1)
        return max(self.start, min(grown, self.bound)) if self.bound else grown

    def most_used(self, round_index: int) -> int | None:
        """Most prompts that a client may return in a round."""
        return self.most(round_index) if self.all_used else self.used[1]


def rows_of(config: ExperimentConfig, taken: Sample) -> Rows:
    """The bounds of a method's prompts.

    Args:
        config: of the method.
        taken: its sample.
    """
    start, options = len(taken.job.broadcast.prompts), config.prompts
    sent = len(taken.update.prompts)
    if not start or not sent:
        return Rows(start, start, 0, start, (sent, sent), all_used=False)
    fixed = config.keeps_rows or config.generator.name != "none"
    adds = not fixed and getattr(config.build_aggregator(), "adds_prompts", True)
    by_batch = options.sends_keys and options.choose_by == "batch"
    takes_all = options.selection == "all"
    all_used = takes_all or options.selection == "l2p" or by_batch
    least = start if fixed else 1
    # A prompt that a client sends becomes at most one new prompt of the server.
    growth = config.clients.cohort_size * sent if adds else 0
    return Rows(
        start,
        least,
        None if adds and all_used else growth,
        getattr(config.aggregator.options, "max_prompts", 0) if adds else start,
        (least if takes_all else min(options.count, least), sent),
        all_used,
    )


def count_traffic(
    config: ExperimentConfig, federation: Federation, taken: Sample
) -> tuple[Traffic, Deployment | None]:
    """Bytes of all rounds, and with virtual time the seconds of each.

    Args:
        config: of the method.
        federation: an outline of it.
        taken: its sample.

    Raises:
        RoundError: nobody reports in time in a round, and such a round is not to be skipped.
    """
    rows, settings = rows_of(config, taken), taken.settings
    up, down = _up(taken), _down(taken)
    rounds = range(1, config.rounds + 1)
    went = list(play(federation, taken, rows))
    told = sum(each.told for each in went) + settings.bytes_before
    reports = [(each.round_index, each.reported) for each in went]
    cohorts = [(each.round_index, each.selected) for each in went]
    run_up = Range(
        told + sum(clients * up(rows.used[0]) for _, clients in reports),
        told + sum(clients * up(rows.used[1]) for _, clients in reports),
        _total([(clients, rows.most_used(index)) for index, clients in reports], up, told),
    )
    run_down = Range(
        sum(clients * down(rows.least) for _, clients in cohorts),
        sum(clients * down(rows.start) for _, clients in cohorts),
        _total([(clients, rows.most(index)) for index, clients in cohorts], down, 0),
    )
    last = rounds[-1]
    sizes = _sizes(federation, settings)
    traffic = Traffic(
        Range(up(rows.used[0]), up(rows.used[1]), _total([(1, rows.most_used(last))], up, 0)),
        Range(down(rows.least), down(rows.start), _total([(1, rows.most(last))], down, 0)),
        _told(taken, max(sizes)) if taken.state.spread else 0,
        settings.bytes_before,
        run_up.per(len(rounds)),
        run_down.per(len(rounds)),
        run_up,
        run_down,
    )
    if settings.system is None:
        return traffic, None
    missed = tuple(client for each in went for client in each.missed)
    merged = sum(each.reported for each in went)
    return traffic, Deployment(tuple(each.seconds for each in went), merged, missed)


@dataclasses.dataclass(frozen=True)
class Played:
    """How a round would go."""

    round_index: int
    selected: int
    """Clients of its cohort."""
    reported: int
    """Clients that are merged."""
    told: int
    """Bytes of those that tell for the first time how their queries spread."""
    seconds: float = 0.0
    """Virtual ones."""
    missed: tuple[Missed, ...] = ()


def play(federation: Federation, taken: Sample, rows: Rows) -> Iterator[Played]:
    """Go through all rounds without training, with the pool as it begins.

    Args:
        federation: an outline.
        taken: the method's sample.
        rows: what clients return.

    Raises:
        RoundError: nobody reports in time in a round, and such a round is not to be skipped.
    """
    settings = taken.settings
    system, wanted = settings.system, settings.recipe.training.cohort_size
    if system is not None and system.options.asynchronous:
        raise ConfigError(
            f"estimate: expected system.schedule=rounds, got {system.options.schedule}; run it, "
            "and read virtual_hours of summary.json"
        )
    sizes, usual = _sizes(federation, settings), _up(taken)(rows.used[1])
    received, asks = _down(taken)(rows.start), bool(taken.state.spread)
    told: set[int] = set()
    met: set[int] = set()
    for round_index in range(1, settings.rounds + 1):
        state = dataclasses.replace(taken.state, round_index=round_index - 1)
        jobs = make_jobs(state, settings)
        cohort = [job.client_id for job in jobs]
        extra = {k: _told(taken, sizes[k]) if asks and k not in told else 0 for k in cohort}
        if system is None:
            yield Played(round_index, len(cohort), len(cohort), sum(extra.values()))
            told |= set(cohort)
            continue
        begun = system.before_upload(jobs, dict.fromkeys(cohort, received), sorted(met))
        worth = system.worth_training(round_index, begun)
        sent = {k: usual + extra[k] for k in worth}
        timing = system.settle(round_index, begun, sent, wanted)
        system.check_not_empty(timing, round_index)
        new = sum(extra[k] for k in timing.merged)
        counts = (len(cohort), len(timing.merged), new)
        yield Played(round_index, *counts, timing.seconds, timing.missed)
        told |= timing.merged
        met |= set(cohort)


def _sizes(federation: Federation, settings: RoundSettings) -> list[int]:
    """Images of each client."""
    training = settings.recipe.training
    clients = range(training.population)
    return [len(federation.data.rows(client, training.pooled)) for client in clients]


def _told(taken: Sample, images: int) -> int:
    """Bytes that a client with so many images sends once about how its queries spread."""
    spread = factor_size(images, taken.state.keys.shape[1])
    return upload_of(taken, 0, spread) - upload_of(taken, 0, None)


def _up(taken: Sample) -> Callable[[int], int]:
    """Bytes of an update by the number of its prompts."""
    empty, one = (upload_of(taken, used, None) for used in (0, 1))
    return lambda used: empty + used * (one - empty)


def _down(taken: Sample) -> Callable[[int], int]:
    """Bytes of a broadcast by the number of its prompts."""
    empty, one = (download_bytes(with_rows(taken.job, number)) for number in (0, 1))
    return lambda number: empty + number * (one - empty)


def _total(
    counts: Sequence[tuple[int, int | None]], size: Callable[[int], int], more: int
) -> int | None:
    """Bytes of so many clients with so many prompts each; None if one number has no bound."""
    total = more
    for clients, prompts in counts:
        if prompts is None:
            return None
        total += clients * size(prompts)
    return total


def with_rows(job: ClientJob, prompts: int) -> ClientJob:
    """The job with another number of prompts in its broadcast, as shapes without values."""
    broadcast = job.broadcast
    return dataclasses.replace(
        job,
        broadcast=dataclasses.replace(
            broadcast,
            prompts=_rows(broadcast.prompts, prompts),
            keys=_rows(broadcast.keys, prompts),
        ),
    )


def upload_of(taken: Sample, used: int, spread: int | None) -> int:
    """Bytes of a client's update.

    Args:
        taken: says what it holds.
        used: prompts in it.
        spread: numbers that tell how the client's queries spread; None if it tells nothing.
    """
    update = taken.update
    shaped = dataclasses.replace(
        update,
        prompts=_rows(update.prompts, used),
        keys=_rows(update.keys, used),
        origins=_rows(update.origins, used),
        use_counts=_rows(update.use_counts, used),
        spread=None if spread is None else torch.empty(spread, device="meta"),
    )
    return upload_bytes(shaped, taken.settings.recipe.prompts.selection != "all")


def _rows(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return tensor.new_empty((count, *tensor.shape[1:]), device="meta")
