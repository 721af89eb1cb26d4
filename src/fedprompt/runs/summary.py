"""What runs reached: the series of a run, and one row of figures for each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedprompt.core.errors import ConfigError
from fedprompt.core.files import Json
from fedprompt.runs.directory import RunDirectory

if TYPE_CHECKING:
    from fedprompt.config import ExperimentConfig
    from fedprompt.core.types import ServerState

MEGABYTE = 1e6
PERSONALISED = ("mean", "deviation", "worst_tenth", "jain")
PHASES = ("train", "aggregate", "evaluate")
FATES = ("kept", "born", "pruned", "merged")
"""What became of summarizing prompts in a round, as the matching aggregators report it."""
MATCH_FIGURES = {
    "matched_distance": "matched distance (noise)",
    "inclusion_entropy": "inclusion entropy (nats)",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a report needs of one run directory."""

    directory: RunDirectory
    name: str
    records: tuple[Json, ...]
    summary: Json
    status: Json

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Rounds and values of the records that have a number under `key`."""
        pairs = [(r["round"], float(r[key])) for r in self.records if r.get(key) is not None]
        return [index for index, _ in pairs], [value for _, value in pairs]

    def over_hours(self, key: str) -> tuple[list[float], list[float]]:
        """Virtual hours since the start, and values, of the records that have both."""
        pairs = [
            (float(r["virtual_hours"]), float(r[key]))
            for r in self.records
            if r.get("virtual_hours") is not None and r.get(key) is not None
        ]
        return [hours for hours, _ in pairs], [value for _, value in pairs]

    def personalised(self, split: str) -> list[tuple[int, dict[str, float]]]:
        """Rounds in which the clients' own models were measured, and the figures over clients."""
        known = [(r["round"], (r.get("personalised") or {}).get(split)) for r in self.records]
        return [
            (index, {name: figures[name] for name in PERSONALISED})
            for index, figures in known
            if figures and figures.get("mean") is not None
        ]

    def seconds(self, phase: str) -> list[float]:
        """Seconds that each round spent in `phase`."""
        return [float((r.get("seconds") or {}).get(phase) or 0.0) for r in self.records]

    def wall_seconds(self) -> list[float]:
        """Seconds that passed from round to round; see `wall_seconds`."""
        return [wall_seconds(record) for record in self.records]

    def diagnostics(self) -> tuple[list[int], dict[str, list[float]]]:
        """Rounds in which the aggregator said how it matched, and each figure; NaN where null."""
        names = (*FATES, *MATCH_FIGURES)
        known = [(r["round"], r.get("diagnostics") or {}) for r in self.records]
        known = [(index, figures) for index, figures in known if set(names) <= set(figures)]
        values = {
            name: [float("nan" if figures[name] is None else figures[name]) for _, figures in known]
            for name in names
        }
        return [index for index, _ in known], values


def whole_summary(
    directory: RunDirectory, config: ExperimentConfig, state: ServerState, word: str
) -> Json:
    """What `summary.json` says of a run.

    Args:
        directory: of the run.
        config: of its method.
        state: of its last round.
        word: `finished`, or `stopped`.
    """
    own, *others = comparison_table([directory.path])
    return {
        **own,
        "state": word,
        "name": config.name,
        "method": config.label,
        "seed": config.seed,
        "rounds": state.round_index,
        "state_sha256": state.sha256(),
        "comparison": others,
    }


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """The runs in `run_dirs`, each followed by its comparison runs, under distinct names.

    Raises:
        ConfigError: `run_dirs` is empty or a folder is no run directory.
    """
    if not run_dirs:
        raise ConfigError("report: expected at least one run directory, got none")
    runs: list[Run] = []
    for path in run_dirs:
        main = RunDirectory.open(path)
        prefix = f"{main.path.resolve().name}/" if len(run_dirs) > 1 else ""
        for directory in (main, *main.comparisons()):
            name = _method(directory) if directory is main else directory.path.name
            runs.append(_read_run(directory, _unused(prefix + name, runs)))
    return runs


def wall_seconds(record: Json) -> float:
    """Seconds that passed from the report of the round before to the report of this one.

    Runs of earlier versions wrote no such figure; their phases are added up.

    >>> phases = {"train": 2.0, "aggregate": 0.5, "evaluate": 1.0}
    >>> wall_seconds({"wall_seconds": 3.0, "seconds": phases}), wall_seconds({"seconds": phases})
    (3.0, 3.5)
    """
    wall = record.get("wall_seconds")
    return float(sum((record.get("seconds") or {}).values()) if wall is None else wall)


def comparison_table(run_dirs: Sequence[Path]) -> list[Json]:
    """One row for each run and comparison run.

    Returns:
        Rows with `name`, `state`, `rounds`, `accuracy` (last evaluated round, test split),
        `best_round` (highest validation accuracy, the earliest of equals), `best_accuracy` (test
        split, in that round), `balanced_accuracy` (mean over classes, last evaluated round),
        `domain_accuracy` (by name of the domain, where there are several, last evaluated round),
        `alone_accuracy` (test split, each image selecting prompts by itself, the last time that
        was measured), `personalised` (`mean`, `deviation`, `worst_tenth` and `jain` over the
        clients' own models on their own shares of the test split, the last time they were
        measured), `prompts`,
        `mb_up`, `mb_down` (10^6 bytes over all rounds), `seconds` (that passed in its rounds),
        `virtual_hours` (of virtual time, over all rounds), `epsilon` (of differential privacy, that
        all rounds used up), `state_sha256`. What a run does not say
        is None. A method without a global model has its best round by the clients' validation
        accuracy, and `best_accuracy` is theirs on test.

    Raises:
        ConfigError: a folder is no run directory.
    """
    return [summary_row(run) for run in read_runs(run_dirs)]


def _read_run(directory: RunDirectory, name: str) -> Run:
    return Run(
        directory,
        name,
        tuple(directory.read_rounds()),
        directory.read_summary(),
        directory.read_status(),
    )


def _method(directory: RunDirectory) -> str:
    """The method by name: as the summary says, else the configuration, else the folder."""
    named = directory.read_summary().get("method")
    if isinstance(named, str) and named:
        return named
    match = re.search(r"^method:[ \t]*['\"]?([\w.+-]+)", directory.read_config(), re.MULTILINE)
    return match[1] if match else directory.path.resolve().name


def _unused(name: str, runs: Sequence[Run]) -> str:
    taken = {run.name for run in runs}
    candidates = (name, *(f"{name} ({count})" for count in range(2, len(runs) + 3)))
    return next(candidate for candidate in candidates if candidate not in taken)


def domain_accuracy(run: Run) -> dict[str, float | None] | None:
    """Test accuracy of the last evaluated round by name of the domain; None where there is one."""
    names = list(run.directory.read_task().get("domains") or ())
    known = [record["domain_accuracy"] for record in run.records if record.get("domain_accuracy")]
    if len(names) < 2 or not known:
        return None
    return dict(zip(names, known[-1], strict=False))


def summary_row(run: Run) -> Json:
    """One row of `comparison_table`."""
    accuracies = dict(zip(*run.series("accuracy"), strict=True))
    validation = dict(zip(*run.series("validation_accuracy"), strict=True))
    balanced, alone = (run.series(key)[1] for key in ("balanced_accuracy", "alone_accuracy"))
    last = accuracies[max(accuracies)] if accuracies else None
    personalised = run.personalised("test")
    if not accuracies and personalised:
        validation = {index: figures["mean"] for index, figures in run.personalised("validation")}
        accuracies = {index: figures["mean"] for index, figures in personalised}
    prompts = run.series("num_prompts")[1]
    best = max(validation, key=lambda index: (validation[index], -index)) if validation else None
    digest = run.summary.get("state_sha256")
    hours = run.series("virtual_hours")[1]
    epsilon = run.series("epsilon")[1]
    return {
        "name": run.name,
        "state": run.status.get("state"),
        "rounds": max((record["round"] for record in run.records), default=0),
        "accuracy": last,
        "best_round": best,
        "best_accuracy": accuracies.get(best) if best is not None else None,
        "balanced_accuracy": balanced[-1] if balanced else None,
        "domain_accuracy": domain_accuracy(run),
        "alone_accuracy": alone[-1] if alone else None,
        "personalised": personalised[-1][1] if personalised else None,
        "prompts": int(prompts[-1]) if prompts else None,
        "mb_up": sum(run.series("bytes_up")[1]) / MEGABYTE,
        "mb_down": sum(run.series("bytes_down")[1]) / MEGABYTE,
        "seconds": sum(run.wall_seconds()),
        "virtual_hours": hours[-1] if hours else None,
        "epsilon": epsilon[-1] if epsilon else None,
        "state_sha256": digest if isinstance(digest, str) else None,
    }
