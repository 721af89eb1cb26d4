"""Virtual time: devices of different speeds and connections, and what a round would take on them.

Nothing is waited for. A round's clock starts when its cohort is selected; a client then

    downloads the broadcast   bytes / bandwidth
    computes                  operations / speed
    uploads its update        bytes / bandwidth

and has dropped out before it uploads with the probability `system.dropout`. Bytes are those of
`server.traffic`, operations those of `client.cost`. The server's own work takes no virtual time.

| the round ends when                                                  | and who is not merged is |
|----------------------------------------------------------------------|--------------------------|
| as many have reported as it wants: `clients.per_round`               | `surplus`                |
| or else `system.deadline` has come                                   | `late`                   |
| or else the last of the cohort has reported, or would have by then   | `dropped`                |

With `system.over_select` a cohort is larger than what the round wants (Bonawitz et al., "Towards
Federated Learning at Scale: System Design", MLSys 2019, Section 2.2).

A device's speed and bandwidth are functions of the run's seed and the client, and whether it drops
out of those and the round: the same on every runtime and after a resume.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from fedprompt.core.checks import check_choice, check_integer, check_number, is_number
from fedprompt.core.errors import ConfigError, RoundError
from fedprompt.core.seeding import numpy_generator
from fedprompt.core.types import ClientJob, Tensors
from fedprompt.server.schedules import SCHEDULES, Schedule, Staleness

GIGA = 1e9
BITS = 1e6 / 8
"""Bytes a second of one Mbit/s."""
DISTRIBUTIONS = {"lognormal": ("median", "sigma"), "uniform": ("low", "high")}
EMPTY = ("stop", "skip")
ROUNDS = "rounds"
"""The synchronous schedule."""


@dataclasses.dataclass(frozen=True)
class SystemOptions:
    """The `system` section: what devices and connections clients have. Without a word in it there
    is no virtual time."""

    speed: float | int | str | None = None
    """10^9 operations a second of a client's device: a number for all, `lognormal:MEDIAN:SIGMA` or
    `uniform:LOW:HIGH` to draw one for each, or a file with a number for each; null: computing takes
    no time."""
    bandwidth: float | int | str | None = None
    """Mbit/s of a client's connection in each direction, written like `speed`; null: sending takes
    no time."""
    dropout: float = 0.0
    """Probability that a client of a round is gone before it uploads."""
    deadline: float | None = None
    """Virtual seconds after which a round ends; updates that come later are not merged."""
    over_select: float = 1.0
    """A round's cohort is so many times `clients.per_round`; the first `per_round` to report are
    merged."""
    empty: str = "stop"
    """What happens when nobody reports in time: `stop` ends the run, `skip` goes on to the next
    round with the model as it is."""
    schedule: str = ROUNDS
    """When the server merges: `rounds`, when the cohort has reported; `fedbuff`, when `buffer`
    updates have arrived; `fedasync`, at each. The last two keep `clients.per_round` clients at
    work, and a round is one merge."""
    buffer: int | None = None
    """Updates that `fedbuff` merges together, at most `clients.per_round`."""
    step: float | None = None
    """The server's learning rate of `fedbuff`, the mixing weight alpha of `fedasync`; null: 1 and
    0.6."""
    staleness: str = "polynomial:0.5"
    """What an update counts after tau merges: `constant` 1, `polynomial:A` (1 + tau)^-A,
    `hinge:A:B` 1 up to tau = B and then 1 / (A (tau - B) + 1)."""

    def __post_init__(self) -> None:
        for field in ("speed", "bandwidth"):
            value = getattr(self, field)
            if isinstance(value, str):
                fixed = _checked_text(f"system.{field}", value)
                object.__setattr__(self, field, fixed)
            elif value is not None:
                check_number(f"system.{field}", value, 0, above=True)
        check_number("system.dropout", self.dropout, 0, below=1)
        if self.deadline is not None:
            check_number("system.deadline", self.deadline, 0, above=True)
        check_number("system.over_select", self.over_select, 1)
        check_choice("system.empty", self.empty, EMPTY)
        for field in ("deadline", "over_select"):
            given = getattr(self, field) != type(self).__dataclass_fields__[field].default
            if given and self.speed is None and self.bandwidth is None:
                raise ConfigError(
                    f"system.{field}: expected system.speed or system.bandwidth as well, by which "
                    f"clients take time, got {getattr(self, field):g} alone; set one of them"
                )
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Refuse an asynchronous schedule without times, and rules of rounds in one."""
        check_choice("system.schedule", self.schedule, (ROUNDS, *SCHEDULES))
        Staleness.of("system.staleness", self.staleness)
        if self.buffer is not None:
            check_integer("system.buffer", self.buffer, 1)
        if self.step is not None:
            check_number("system.step", self.step, 0, above=True)
        fields, schedule = type(self).__dataclass_fields__, f"system.schedule={self.schedule}"

        def refuse(field: str, why: str) -> None:
            default, given = fields[field].default, getattr(self, field)
            if given != default:
                raise ConfigError(f"system.{field}: {why}, got {given}; leave it out")

        if self.schedule == ROUNDS:
            for field in ("buffer", "step", "staleness"):
                refuse(field, f"expected nothing with {schedule}, which waits for its cohort")
            return
        if self.speed is None and self.bandwidth is None:
            raise ConfigError(
                f"{schedule}: expected system.speed or system.bandwidth, without which all updates "
                "arrive at once, got neither; set one of them"
            )
        for field in ("dropout", "deadline", "over_select", "empty"):
            refuse(field, f"expected nothing with {schedule}, which waits for no cohort")
        if not SCHEDULES[self.schedule].takes_buffer:
            refuse("buffer", f"expected nothing with {schedule}, which merges each update alone")
            if self.step is not None and self.step > 1:
                raise ConfigError(
                    f"system.step: expected at most 1 with {schedule}, got {self.step:g}"
                )
        elif self.buffer is None:
            raise ConfigError(
                f"{schedule}: expected system.buffer, the number of updates that are merged "
                "together, got null; set system.buffer=5 or so"
            )

    @property
    def asynchronous(self) -> bool:
        """Whether the server merges without waiting for a cohort."""
        return self.schedule != ROUNDS

    def build_schedule(self) -> tuple[Schedule, float, Staleness]:
        """The asynchronous schedule, its step, and what stale updates count."""
        made = SCHEDULES[self.schedule]()
        step = made.default_step if self.step is None else self.step
        return made, step, Staleness.of("system.staleness", self.staleness)

    @property
    def enabled(self) -> bool:
        """Whether there is virtual time."""
        return self.speed is not None or self.bandwidth is not None or self.dropout > 0


def _checked_text(key: str, text: str) -> str:
    """A distribution as it is, or the absolute path of a file, so that the config holds anywhere.

    Raises:
        ConfigError: neither.
    """
    name, *numbers = text.split(":")
    if name not in DISTRIBUTIONS:
        path = Path(text).expanduser()
        # One that a config holds may be gone, and is missed when it is read.
        if not path.is_absolute() and not path.is_file():
            raise ConfigError(
                f"{key}: expected a number > 0, lognormal:MEDIAN:SIGMA, uniform:LOW:HIGH or a file "
                f"with a number for each client, got '{text}'"
            )
        return str(path.resolve())
    _parameters(key, name, numbers)
    return text


def _parameters(key: str, name: str, numbers: Sequence[str]) -> tuple[float, float]:
    """The two numbers of a distribution.

    Raises:
        ConfigError: there are others, or they do not make one of positive numbers.
    """
    names = DISTRIBUTIONS[name]
    shape = f"{name}:{':'.join(each.upper() for each in names)}"
    try:
        first, second = map(float, numbers)
    except ValueError:
        got = ":".join((name, *numbers))
        raise ConfigError(f"{key}: expected {shape} with two numbers, got '{got}'") from None
    check_number(f"{key}: {names[0]} of {shape}", first, 0, above=True)
    check_number(f"{key}: {names[1]} of {shape}", second, first if name == "uniform" else 0)
    return first, second


def draw(
    key: str, given: float | int | str | None, count: int, seed: int
) -> tuple[float, ...] | None:
    """One positive number for each client; None where none is given.

    Args:
        key: of the option, `system.speed`.
        given: its value.
        count: clients.
        seed: of the run.

    Raises:
        ConfigError: a file that has not one positive number for each client.

    >>> draw("system.speed", 2.0, 3, seed=0)
    (2.0, 2.0, 2.0)
    """
    if given is None:
        return None
    if not isinstance(given, str):
        return (float(given),) * count
    name, *numbers = given.split(":")
    if name not in DISTRIBUTIONS:
        return read_numbers(key, Path(given), count)
    first, second = _parameters(key, name, numbers)
    drawn = []
    for client in range(count):
        generator = numpy_generator(seed, key, client_id=client)
        if name == "lognormal":
            drawn.append(first * math.exp(second * float(generator.standard_normal())))
        else:
            drawn.append(float(generator.uniform(first, second)))
    return tuple(drawn)


def read_numbers(key: str, path: Path, count: int) -> tuple[float, ...]:
    """A positive number for each client from a file: a JSON list, or one number on each line.

    Args:
        key: of the option, for messages.
        path: the file.
        count: clients.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        is_list = text.strip()[:1] == "["
        values = json.loads(text if is_list else f"[{','.join(text.split())}]")
    except OSError as error:
        raise ConfigError(
            f"{key}: cannot read {path} ({error.strerror}); expected a file with a number for each "
            "client"
        ) from error
    except ValueError:
        raise ConfigError(
            f"{key}: {path}: expected a JSON list of numbers or one number on each line, got "
            "something else"
        ) from None
    if len(values) != count:
        raise ConfigError(
            f"{key}: {path}: expected a number for each of {count} clients, got {len(values)}"
        )
    for client, value in enumerate(values):
        if not is_number(value) or value <= 0:
            raise ConfigError(
                f"{key}: {path}: expected a finite number > 0 for client {client}, got {value!r}"
            )
    return tuple(map(float, values))


@dataclasses.dataclass(frozen=True)
class Work:
    """What clients have to compute."""

    examples: tuple[int, ...]
    """Training images of each client."""
    epochs: int
    """Local epochs; 0 where clients take no training step."""
    step: Callable[[ClientJob], float]
    """Operations of a training step for each image of it, given the job."""
    prefix: float
    """Operations for an image below the prompts, once for each client."""

    def operations(self, job: ClientJob, first: bool) -> float:
        """What a client computes in a round.

        Args:
            job: of the client.
            first: whether the frozen prefix of its images is still to be computed.
        """
        each = self.epochs * self.step(job) if self.epochs else 0.0
        return self.examples[job.client_id] * (each + (self.prefix if first else 0.0))


@dataclasses.dataclass(frozen=True)
class Missed:
    """A client of a round's cohort that is not merged."""

    client: int
    why: str
    """`dropped`, `late` or `surplus`."""
    seconds: float
    """When it dropped out, or would have reported; of one that could not even begin to upload
    before the deadline, when it would have begun."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """How a round went by the virtual clock."""

    seconds: float
    merged: frozenset[int]
    """Clients that reported in time."""
    missed: tuple[Missed, ...]
    """The others, in ascending order."""


@dataclasses.dataclass(frozen=True)
class VirtualSystem:
    """The devices of a run's clients, and the rules of its rounds."""

    options: SystemOptions
    seed: int
    work: Work
    speed: tuple[float, ...] | None
    """10^9 operations a second of each client."""
    bandwidth: tuple[float, ...] | None
    """Mbit/s of each client."""

    def cohort_size(self, wanted: int, population: int) -> int:
        """Clients that are selected for a round that wants so many."""
        # A product such as 1.1 * 10 is not to be one client more by its rounding.
        return min(population, math.ceil(round(wanted * self.options.over_select, 9)))

    def drops_out(self, round_index: int, client: int) -> bool:
        """Whether a client is gone before it uploads."""
        generator = numpy_generator(self.seed, "system.dropout", round_index, client)
        return bool(generator.random() < self.options.dropout)

    def seconds_of(self, client: int, num_bytes: int = 0, operations: float = 0.0) -> float:
        """Virtual seconds that a client takes to send or receive, and to compute.

        Args:
            client: which one.
            num_bytes: that it sends or receives.
            operations: that it computes.
        """
        sending = num_bytes / (self.bandwidth[client] * BITS) if self.bandwidth else 0.0
        return sending + (operations / (self.speed[client] * GIGA) if self.speed else 0.0)

    def before_upload(
        self, jobs: Sequence[ClientJob], bytes_down: Mapping[int, int], met: Sequence[int]
    ) -> dict[int, float]:
        """Seconds after which each client of a cohort would begin to upload.

        Args:
            jobs: of the cohort.
            bytes_down: that each of its clients receives.
            met: clients that have computed the frozen prefix of their images.
        """
        known = set(met)
        return {
            job.client_id: self.seconds_of(
                job.client_id,
                bytes_down[job.client_id],
                self.work.operations(job, job.client_id not in known) if self.speed else 0.0,
            )
            for job in jobs
        }

    def worth_training(self, round_index: int, begun: Mapping[int, float]) -> list[int]:
        """The clients whose updates may come in time; the work of others would be thrown away.

        Args:
            round_index: from 1.
            begun: from `before_upload`.
        """
        deadline = self.options.deadline
        return [
            client
            for client, seconds in begun.items()
            if (deadline is None or seconds <= deadline) and not self.drops_out(round_index, client)
        ]

    def settle(
        self, round_index: int, begun: Mapping[int, float], bytes_up: Mapping[int, int], wanted: int
    ) -> Timing:
        """Who reported in time, and when the round ended.

        Args:
            round_index: from 1.
            begun: of the cohort, from `before_upload`.
            bytes_up: of those who are `worth_training`.
            wanted: clients that the round merges at most; of equal times the lower number first.
        """
        deadline = math.inf if self.options.deadline is None else self.options.deadline
        arrivals = {
            client: begun[client] + self.seconds_of(client, num_bytes)
            for client, num_bytes in bytes_up.items()
        }
        in_time = sorted((when, client) for client, when in arrivals.items() if when <= deadline)
        merged = frozenset(client for _, client in in_time[:wanted])
        if len(merged) == wanted:
            ends = in_time[wanted - 1][0]
        else:  # the server waits for whoever may still report
            ends = min(deadline, max({**begun, **arrivals}.values()))
        missed = []
        for client in sorted(begun.keys() - merged):
            seconds = arrivals.get(client, begun[client])
            if self.drops_out(round_index, client):
                why = "dropped"
            else:
                why = "surplus" if seconds <= deadline else "late"
            missed.append(Missed(client, why, seconds))
        return Timing(ends, merged, tuple(missed))

    def check_not_empty(self, timing: Timing, round_index: int) -> None:
        """Refuse a round in which nobody reported in time, unless it may be skipped.

        Raises:
            RoundError: says what the fastest would have needed.
        """
        if timing.merged or self.options.empty == "skip":
            return
        limit = self.options.deadline
        alive = [each.seconds for each in timing.missed if each.why != "dropped"]
        within = "" if limit is None else f" within system.deadline={limit:g} virtual seconds"
        fastest = f"the fastest needs over {min(alive):.4g}" if alive else "all dropped out"
        if alive and limit is not None and min(alive) > limit:
            fastest = f"the fastest needs {min(alive):.4g} or more"
        remedy = "lower system.dropout" if not alive else "raise the deadline"
        raise RoundError(
            f"round {round_index}: expected at least one of {len(timing.missed)} clients to report"
            f"{within}, got none ({fastest}); {remedy}, or set system.empty=skip"
        )


def begin(enabled: bool) -> Tensors:
    """The server's memory before the first round, empty without virtual time.

    Returns:
        `seconds` (float64), that have passed; `met` (m,) int64, ascending: the clients that have
        computed the frozen prefix of their images.
    """
    if not enabled:
        return {}
    return {
        "seconds": torch.zeros((), dtype=torch.float64),
        "met": torch.empty(0, dtype=torch.int64),
    }


def passed(memory: Tensors, timing: Timing | None, cohort: Sequence[int]) -> Tensors:
    """The memory after a round.

    Args:
        memory: before it.
        timing: of the round; None without virtual time.
        cohort: its clients, whoever was merged.
    """
    if timing is None:
        return memory
    met = sorted({*memory["met"].tolist(), *cohort})
    return {
        "seconds": memory["seconds"] + timing.seconds,
        "met": torch.tensor(met, dtype=torch.int64),
    }
