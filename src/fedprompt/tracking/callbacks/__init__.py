"""Callbacks of a run: `callbacks` of an experiment names them.

A callback is a registered class, in a file here or in a plug-in, which is built from one instance
of its options. Every method of a run gets one of its own. It runs in the driver, where the rounds
are, sees what is known of each round, and may stop the rounds of its method.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from fedprompt.core.files import Json
from fedprompt.core.registry import Registry
from fedprompt.core.types import ServerState


@dataclasses.dataclass(frozen=True)
class RunView:
    """What a callback may know of the run of one method. Written by `tracking.watch`."""

    experiment: str
    method: str
    """As tables name it."""
    rounds: int
    """That the method is to have."""
    config: Json
    """The whole config, as `config.yaml` has it."""
    run_dir: Path
    read_records: Callable[[], Sequence[Json]] = dataclasses.field(repr=False)

    @cached_property
    def records(self) -> list[Json]:
        """A copy of the lines of `rounds.jsonl` so far, those of earlier processes included."""
        return copy.deepcopy(list(self.read_records()))


@dataclasses.dataclass(frozen=True)
class FinishedRound:
    """A round that is on disk. All of it is the callback's own: no change reaches the run."""

    record: Json
    """Its line of `rounds.jsonl`; null is None."""
    read_state: Callable[[], ServerState] = dataclasses.field(repr=False)

    @cached_property
    def state(self) -> ServerState:
        """A copy of the server's state after the round, made when it is asked for."""
        return self.read_state()


class Callback:
    """Base class: every method may be left out.

    A text that `on_run_start` or `on_round` returns stops the rounds; it says why. The run then
    has the status `stopped` and can be resumed. As the decision may not depend on where the run was
    resumed, a callback that remembers something reads it from the records in `on_run_start`.

    What a callback raises ends the run as `failed`, with the callback's name; the rounds so far are
    on disk.
    """

    def on_run_start(self, run: RunView) -> str | None:
        """Before the first round of this process; `run.records` has those that were done before."""
        return None

    def on_round(self, run: RunView, finished: FinishedRound) -> str | None:
        """After each round, when it is on disk.

        Args:
            run: with this round's record as the last one.
            finished: the round.
        """
        return None

    def on_run_end(self, run: RunView, state: str) -> None:
        """After the last round of a method, not when the run fails or is killed.

        Args:
            run: with all records.
            state: `finished`, or `stopped` by a callback.
        """


run_callbacks: Registry[Callback] = Registry("callback of the run", "fedprompt.tracking.callbacks")
