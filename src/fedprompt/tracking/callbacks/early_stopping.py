"""`early_stopping`: end the rounds when a figure has not improved for some time."""

from __future__ import annotations

import dataclasses

from fedprompt.core.checks import check_choice, check_integer, check_number
from fedprompt.core.errors import ConfigError, suggest
from fedprompt.core.files import Json
from fedprompt.core.words import counted
from fedprompt.tracking.callbacks import Callback, FinishedRound, RunView, run_callbacks
from fedprompt.tracking.figures import figures_of

MODES = ("auto", "max", "min")
CLIENTS = {
    "validation_accuracy": "personalised.validation.mean",
    "accuracy": "personalised.test.mean",
}
"""What a figure of the global model is for methods without one: that of the clients' own models."""


@dataclasses.dataclass(frozen=True)
class EarlyStoppingOptions:
    """Options of `early_stopping`."""

    monitor: str = "validation_accuracy"
    """A figure of `rounds.jsonl`; those of nested objects are called as `seconds.train`. Methods
    without a global model have the mean of their clients' own models in place of an accuracy."""
    patience: int = 5
    """Evaluated rounds in a row without an improvement, after which the run stops."""
    min_delta: float = 0.0
    """An improvement is larger than this."""
    mode: str = "auto"
    """Whether more (`max`) or less (`min`) is better; `auto` is `min` for figures that are called
    loss, and `max` for all others."""

    def __post_init__(self) -> None:
        check_integer("early_stopping.patience", self.patience, 1)
        check_number("early_stopping.min_delta", self.min_delta, 0)
        check_choice("early_stopping.mode", self.mode, MODES)
        if not self.monitor.strip():
            raise ConfigError("early_stopping.monitor: expected the name of a figure, got ''")


@run_callbacks.register("early_stopping", EarlyStoppingOptions)
class EarlyStopping(Callback):
    """Stops a run whose figure has not improved for `patience` evaluated rounds.

    Source: Prechelt, "Early stopping - but when?", in Neural Networks: Tricks of the Trade, 1998,
    the criterion UP. What it remembers comes from the records alone, so a resumed run ends after
    the same round as one that was not interrupted.
    """

    def __init__(self, options: EarlyStoppingOptions) -> None:
        self.options = options
        less = "loss" in options.monitor.split(".")[-1].split("_")
        self._less_is_better = options.mode == "min" or (options.mode == "auto" and less)
        self._best: float | None = None
        self._best_round = 0
        self._since = 0
        """Evaluated rounds since the best one."""

    def on_run_start(self, run: RunView) -> str | None:
        """Read the records of earlier processes."""
        self._best, self._best_round, self._since = None, 0, 0
        why = None
        for record in run.records:
            why = why or self._look_at(record)
        return why

    def on_round(self, run: RunView, finished: FinishedRound) -> str | None:
        """See `EarlyStopping`."""
        return self._look_at(finished.record)

    def _look_at(self, record: Json) -> str | None:
        """Why the run stops after this round; None if it goes on.

        Raises:
            ConfigError: the round was evaluated, and the figure is not there.
        """
        evaluated = record.get("accuracy") is not None or record.get("personalised")
        value = self._value(record)
        if value is None and not evaluated:
            return None
        if value is None and self._best is None:
            # Of a typing error, and of a method that has no such figure, the first round tells.
            known = [name for name in figures_of(record) if name != "round"]
            short = ", ".join(name for name in known if "." not in name)
            raise ConfigError(
                f"monitor: '{self.options.monitor}' was not measured in round {record['round']}; "
                f"expected {short} or another number of rounds.jsonl, such as seconds.train"
                f"{suggest(self.options.monitor, known)}"
            )
        self._since += 1
        if value is not None and self._improves(value):
            self._best, self._best_round, self._since = value, record["round"], 0
        if self._best is None or self._since < self.options.patience:
            return None
        return (
            f"{self.options.monitor} has not improved on {self._best:.4g} of round "
            f"{self._best_round} for "
            f"{counted(self._since, 'evaluated round')}"
        )

    def _value(self, record: Json) -> float | None:
        """The figure; None if it is null, as a loss that is no number, or not there."""
        figures = figures_of(record)
        value = figures.get(self.options.monitor)
        other = CLIENTS.get(self.options.monitor)
        return figures.get(other) if value is None and other is not None else value

    def _improves(self, value: float) -> bool:
        if self._best is None:
            return True
        gain = self._best - value if self._less_is_better else value - self._best
        return gain > self.options.min_delta
