"""What a driver gets and what it yields: the plan of a run, and its events."""

from __future__ import annotations

import dataclasses

from fedprompt.config import ExperimentConfig
from fedprompt.core.types import RoundReport


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Event: data, partition and backbone are ready; the workers are about to start."""

    text: str
    """One line about the federation."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Event: what the program is at, from its start until the rounds begin."""

    text: str
    """In a few words."""
    done: int = 0
    """Of what it is at, say images."""
    total: int = 0
    """0 where nothing is counted."""


@dataclasses.dataclass(frozen=True)
class PhaseStarted:
    """Event: a method's rounds start."""

    name: str
    """The method, as tables name it; the events of its rounds name it as well."""
    rounds: int
    finished: int
    """Rounds that an earlier process had done."""


@dataclasses.dataclass(frozen=True)
class RoundFinished:
    """Event: a round is done and on disk."""

    report: RoundReport
    method: str
    """Which method of a compared run."""


@dataclasses.dataclass(frozen=True)
class Note:
    """Event: something that the user should read."""

    text: str
    method: str | None = None
    """Which method of a compared run it is about; None for all."""


Event = Stage | Prepared | PhaseStarted | RoundFinished | Note
"""What a driver yields."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `drive` is to do."""

    config: ExperimentConfig
    run_dir: str
    resume: bool = False
    overwrite: bool = False
    verbose: bool = False
    """Let Ray speak."""
