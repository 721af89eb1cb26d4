"""Call the callbacks of one method's run, and turn what they raise into one line."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

from fedprompt.core.errors import CallbackError
from fedprompt.core.files import Json
from fedprompt.core.types import ServerState
from fedprompt.tracking.callbacks import Callback, FinishedRound, RunView


class Watch:
    """The callbacks of one method's run.

    Args:
        callbacks: with their names.
        run: what they may know.
    """

    def __init__(self, callbacks: Sequence[tuple[str, Callback]], run: RunView) -> None:
        self._callbacks = callbacks
        self._run = run
        self._records = list(run.read_records())

    def start(self) -> str | None:
        """Why the rounds stop before they begin; None if they do not.

        Raises:
            CallbackError: a callback raised.
        """
        return self._ask("on_run_start", lambda callback, run: callback.on_run_start(run))

    def round(self, record: Json, state: ServerState) -> str | None:
        """Why the rounds stop after this one; None if they go on.

        Args:
            record: of the round.
            state: after it.

        Raises:
            CallbackError: a callback raised.
        """

        def call(callback: Callback, run: RunView) -> str | None:
            own = FinishedRound(copy.deepcopy(record), lambda: copy_of_state(state))
            return callback.on_round(run, own)

        self._records.append(record)
        return self._ask("on_round", call)

    def end(self, state: str) -> None:
        """Tell the callbacks that the rounds are over.

        Args:
            state: `finished` or `stopped`.

        Raises:
            CallbackError: a callback raised.
        """

        def call(callback: Callback, run: RunView) -> None:
            callback.on_run_end(run, state)

        self._ask("on_run_end", call)

    def _ask(self, hook: str, call: Callable[[Callback, RunView], str | None]) -> str | None:
        """What the callbacks say that have a reason; all of them are called."""
        reasons = []
        for name, callback in self._callbacks:
            own = dataclasses.replace(
                self._run,
                config=copy.deepcopy(self._run.config),
                read_records=lambda: self._records,
            )
            try:
                why = call(callback, own)
            except Exception as error:
                last = self._records[-1]["round"] if self._records else 0
                raise CallbackError(
                    f"callback '{name}' of {self._run.method}: {hook} after round {last} raised "
                    f"{type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
            if why is not None:
                reasons.append(f"{name}: {why}")
        return "; ".join(reasons) or None


def copy_of_state(state: ServerState) -> ServerState:
    """The same state in memory of its own."""
    tensors = {path: tensor.detach().clone() for path, tensor in state.tensors().items()}
    return ServerState.from_tensors(state.round_index, tensors)
