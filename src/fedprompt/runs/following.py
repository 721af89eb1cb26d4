"""Who follows the rounds of a method: loggers, which get the figures, and callbacks, which may stop
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from fedprompt.config import LISTS, Choice, ExperimentConfig
from fedprompt.core.files import Json
from fedprompt.core.types import ServerState
from fedprompt.data.task import Task
from fedprompt.runs.directory import RunDirectory
from fedprompt.tracking.callbacks import RunView
from fedprompt.tracking.feed import Feed
from fedprompt.tracking.loggers import LoggedRun
from fedprompt.tracking.watch import Watch


class Follower:
    """Loggers and callbacks of one method; leaving it with an error ends the loggers' runs as
    failed.

    Args:
        feed: of the loggers.
        watch: of the callbacks.
        records: of the rounds that were done before.
        rounds: that the method is to have.
    """

    def __init__(self, feed: Feed, watch: Watch, records: Sequence[Json], rounds: int) -> None:
        self._feed = feed
        self._watch = watch
        self._records = records
        self._rounds = rounds
        self._ended = False
        self.why: str | None = None
        """Why a callback stops the rounds; None if they go on, or are all done."""

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._ended:
            self._feed.end("failed")

    def start(self) -> list[str]:
        """Before the first round of this process; returns what the user should read."""
        notes = self._feed.start(self._records)
        why = self._watch.start()
        done = self._records[-1]["round"] if self._records else 0
        self.why = why if done < self._rounds else None
        return notes

    def round(self, record: Json, state: ServerState) -> list[str]:
        """After a round that is on disk.

        Args:
            record: of the round.
            state: after it.

        Returns:
            What the user should read.
        """
        notes = self._feed.add(record)
        why = self._watch.round(record, state)
        self.why = why if record["round"] < self._rounds else None
        return notes

    def end(self) -> list[str]:
        """After the last round of this process; returns what the user should read."""
        state = "finished" if self.why is None else "stopped"
        self._watch.end(state)
        self._ended = True
        return self._feed.end(state)


def follow(
    config: ExperimentConfig, task: Task, directory: RunDirectory, leading: RunDirectory
) -> Follower:
    """Who follows the rounds of a method.

    Args:
        config: of the method.
        task: names the domains.
        directory: of the method's run, with the records of the rounds that were done before.
        leading: of the experiment, which is the same for the leading method.
    """
    tree = config.tree()
    tree.pop("sources")
    records = directory.read_rounds()
    name = config.name.removesuffix(f"/{config.method}") if directory != leading else config.name
    logged = LoggedRun(
        experiment=name,
        method=config.label,
        name=leading.path.name,
        folder=directory.loggers_folder,
        shared=leading.loggers_folder,
    )
    view = RunView(name, config.label, config.rounds, tree, directory.path, lambda: records)
    return Follower(
        Feed(_built("loggers", config.loggers), logged, tree, task.group_names),
        Watch(_built("callbacks", config.callbacks), view),
        records,
        config.rounds,
    )


def _built(key: str, choices: Sequence[Choice]) -> list[tuple[str, Any]]:
    """New entries of a registry, with their names."""
    return [
        (choice.name, LISTS[key].create(choice.name, **dataclasses.asdict(choice.options)))
        for choice in choices
    ]
