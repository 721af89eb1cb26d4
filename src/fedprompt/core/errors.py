"""One family of errors: everything that `fedprompt` raises on purpose.

A message says what is wrong, what was expected, what was received and how to fix it, in one line.
The command line prints that line without a traceback and exits with the error's `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedpromptError(Exception):
    """Base of the family; `exit_code` is what the command line returns for it."""

    exit_code = 1


class ConfigError(FedpromptError, ValueError):
    """The call or the configuration is wrong; nothing was started and nothing was written."""

    exit_code = 2


class InputError(FedpromptError, ValueError):
    """An argument of a library function is wrong (shape, dtype, range, not finite)."""

    exit_code = 2


class CheckpointError(FedpromptError):
    """A saved state is missing or damaged."""

    exit_code = 2


class ClientError(FedpromptError, RuntimeError):
    """A client's local work raised.

    Args:
        client_id: the client that failed.
        round_index: the round it was working for.
        stage: what it was doing (`build`, `fit` or `collect`).
        cause: one line that names the exception.
        node: the machine it was on, if the runtime has several.
    """

    def __init__(
        self, client_id: int, round_index: int, stage: str, cause: str, node: str | None = None
    ) -> None:
        # All fields go to `args`, so that the error survives pickling on its way out of a Ray
        # actor.
        super().__init__(client_id, round_index, stage, cause, node)
        self.client_id = client_id
        self.round_index = round_index
        self.stage = stage
        self.cause = cause
        self.node = node

    def __str__(self) -> str:
        return (
            f"client {self.client_id} failed in round {self.round_index} "
            f"while it was in stage '{self.stage}': {self.cause}"
        )


class WorkerError(FedpromptError, RuntimeError):
    """A process that did the work died; the run can be continued."""


class RoundError(FedpromptError, RuntimeError):
    """A round cannot be finished, for example because every update was quarantined."""


class CallbackError(FedpromptError, RuntimeError):
    """A callback of the run raised; the rounds so far are on disk."""


def suggest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name nearest to `name`, or an empty string.

    >>> suggest("men", ["mean", "pfpt"])
    "; did you mean 'mean'?"
    >>> suggest("zzz", ["mean", "pfpt"])
    ''
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
