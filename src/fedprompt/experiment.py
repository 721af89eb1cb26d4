"""Run an experiment, continue one, or do one client's work again.

The rounds themselves are in `runs/driver.py`, which runs where the runtime puts it. Nothing here
imports Lightning or timm before the runtime does: a wrong call is refused within three seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.errors import (
    CallbackError,
    CheckpointError,
    ClientError,
    ConfigError,
    WorkerError,
)
from fedprompt.core.files import Json, new_name
from fedprompt.core.types import ClientUpdate, ServerState
from fedprompt.core.words import counted
from fedprompt.report.live import RoundDisplay
from fedprompt.report.page import make_html
from fedprompt.runs.checkpoint import load_latest
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.events import Event, Note, PhaseStarted, Plan, Prepared, Stage
from fedprompt.runs.locks import check_free, sole_writer
from fedprompt.runs.plugins import check_kept
from fedprompt.runs.summary import whole_summary
from fedprompt.runtime import Runtime, runtimes
from fedprompt.runtime.base import limited_threads

if TYPE_CHECKING:
    import pandas

    from fedprompt.results import PromptedModel

RESUMABLE = (
    *("runtime", "runtime.name", "runtime.actors", "runtime.cpus"),
    *("runtime.driver_node", "loggers", "callbacks"),
)
"""What may differ when a run is continued: nothing of this changes a bit of a round."""


WAIT_SECONDS = 5.0
"""How long a driver that was told to end has for it before its run is noted as stopped."""


@dataclasses.dataclass(frozen=True, repr=False)
class RunResult:
    """What a run leaves behind."""

    state: ServerState
    reports: list[Json]
    """The lines of `rounds.jsonl`."""
    summary: Json
    run_dir: Path

    @functools.cached_property
    def comparisons(self) -> dict[str, RunResult]:
        """The same of each method that the run is compared with, by name."""
        runs = RunDirectory(self.run_dir).comparisons()
        return {run.path.name: result_of(run) for run in runs if run.has_result()}

    def load(self, *, client: int | None = None, method: str | None = None) -> PromptedModel:
        """The run's model; see `fedprompt.load`.

        Args:
            client: whose model; None for the global one.
            method: a method that the run is compared with.
        """
        from fedprompt.results import load

        return load(self.run_dir, client=client, method=method)

    def rounds(self) -> pandas.DataFrame:
        """A row for each method and round: what `rounds.jsonl` has, one column for each number.

        Numbers of nested objects have names such as `seconds.train`.
        """
        nested = ("clients", "quarantined", "missed", "class_accuracy", "domain_accuracy")
        return self._frame(
            lambda report: [{key: each for key, each in report.items() if key not in nested}]
        )

    def clients(self) -> pandas.DataFrame:
        """A row for each method, round and client that took part: images, prompts, loss, steps."""
        return self._frame(
            lambda report: [{"round": report["round"], **each} for each in report["clients"]]
        )

    def _frame(self, rows_of: Callable[[Json], list[Json]]) -> pandas.DataFrame:
        import pandas

        runs = {str(self.summary["method"]): self, **self.comparisons}
        rows = [
            {"method": name, **row}
            for name, run in runs.items()
            for report in run.reports
            for row in rows_of(report)
        ]
        return pandas.json_normalize(rows)

    def __repr__(self) -> str:
        accuracy = self.summary.get("accuracy")
        shown = "no accuracy" if accuracy is None else f"accuracy {accuracy:.4f}"
        others = ", ".join(run.path.name for run in RunDirectory(self.run_dir).comparisons())
        compared = f", compared with {others}" if others else ""
        return (
            f"RunResult({self.summary['method']}: {shown} after "
            f"{counted(len(self.reports), 'round')}"
            f"{compared}; {self.run_dir})"
        )


def run(
    config: str | os.PathLike[str] | Mapping[str, object],
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    on_event: Callable[[Event], None] | None = None,
    verbose: bool = False,
) -> RunResult:
    """Run an experiment.

    Args:
        config: name of a file in `conf/experiment/`, path of a YAML file, or a mapping.
        overrides: `key=value` strings.
        overwrite: replace the run that `run_dir` holds.
        on_event: called with each event as it happens; None shows the progress in a notebook, and
            nothing elsewhere.
        verbose: let Ray speak.

    Raises:
        ConfigError: the config is wrong; nothing was written.
        FedpromptError: the run failed; its last finished round is on disk.
    """
    plan = plan_run(compose(config, overrides), overwrite)
    return shown(dataclasses.replace(plan, verbose=verbose), on_event)


def resume(
    run_dir: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    on_event: Callable[[Event], None] | None = None,
    verbose: bool = False,
) -> RunResult:
    """Continue a run where its last finished round ended; a finished run is returned as it is.

    Args:
        run_dir: directory of the run.
        overrides: runtime and its number of actors and CPUs, loggers and callbacks only; nothing
            else leaves the bits.
        on_event: called with each event as it happens.
        verbose: let Ray speak.
    """
    return shown(dataclasses.replace(plan_resume(run_dir, overrides), verbose=verbose), on_event)


def shown(plan: Plan, on_event: Callable[[Event], None] | None) -> RunResult:
    """Run a plan; in a notebook with its progress below the cell, unless the caller wants the
    events.
    """
    console = Console()
    if on_event is not None or not console.is_jupyter:
        return execute(plan, on_event)
    rounds = (1 + len(plan.config.compare)) * plan.config.rounds
    with RoundDisplay(rounds, f"fedprompt {plan.config.name}", console) as display:
        return execute(plan, display.show)


def plan_run(config: ExperimentConfig, overwrite: bool) -> Plan:
    """Settle the run directory; nothing is written yet.

    Raises:
        ConfigError: the directory cannot take the run.
    """
    run_dir = Path(config.run_dir or Path("runs") / new_name(Path(config.name).name)).expanduser()
    check_free(run_dir)
    RunDirectory.check_new(run_dir, overwrite)
    # Settled now, so that the run can be continued from another folder and on another machine.
    model = config.model.with_absolute_paths()
    settled = dataclasses.replace(config, model=model, runtime=config.runtime.settled())
    return Plan(settled, str(run_dir.resolve()), overwrite=overwrite)


def plan_resume(run_dir: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Plan:
    """The plan that continues a run.

    Raises:
        ConfigError: the folder is no run, or an override would change the experiment.
    """
    directory = RunDirectory.open(run_dir)
    check_free(directory.path)
    for override in overrides:
        if override.partition("=")[0] not in RESUMABLE:
            raise ConfigError(
                f"--resume: only {', '.join(RESUMABLE)} can be changed, got '{override}'; "
                "start a new run to change it"
            )
    if not directory.read_config():
        raise ConfigError(
            f"{directory.path}: the run was stopped before it began, so there is nothing to "
            "resume; start it again with --overwrite"
        )
    return Plan(kept_config(directory, overrides), str(directory.path.resolve()), resume=True)


def kept_config(directory: RunDirectory, overrides: Sequence[str]) -> ExperimentConfig:
    """The config of a run, with the plug-ins that the run started with."""
    check_kept(directory)
    return compose(directory.path / "config.yaml", overrides)


def execute(plan: Plan, on_event: Callable[[Event], None] | None = None) -> RunResult:
    """Run a plan to its end and read the result from its directory.

    Raises:
        FedpromptError: the run failed; `status.json` says why.
    """
    directory = RunDirectory(plan.run_dir)
    if not (plan.resume and directory.is_finished()):
        runtime: Runtime = runtimes.create(
            plan.config.runtime.name, **dataclasses.asdict(plan.config.runtime)
        )
        # A resume that is refused, say for damaged checkpoints, leaves the run as it is.
        first = PhaseStarted if plan.resume else Prepared
        started = False
        if on_event is not None:
            ours = "starting Ray" if plan.config.runtime.name == "ray" else "starting"
            on_event(Stage(ours))
        try:
            for event in runtime.launch(drive, plan, verbose=plan.verbose):
                started = started or isinstance(event, first)
                if on_event is not None:
                    on_event(event)
        except KeyboardInterrupt:
            if started:
                mark_stopped(plan, "stopped by KeyboardInterrupt")
            raise
        except Exception as error:
            if started:
                mark_failed(directory, error)
            if isinstance(error, OSError):
                raise WorkerError(
                    f"{error.strerror or error} ({error.filename or plan.run_dir})"
                ) from error
            raise
    if not directory.report_path.is_file():  # the run was killed while its figures were drawn
        make_html(directory.path)
    return result_of(directory)


def result_of(directory: RunDirectory) -> RunResult:
    """The result of a run that is finished, or that a callback stopped.

    Raises:
        CallbackError: it was stopped before its first round.
        CheckpointError: its last checkpoint is not that of its summary.
    """
    if not directory.is_finished() and directory.last_round() is None:
        raise CallbackError(
            f"{directory.path}: stopped before the first round: "
            f"{directory.read_status().get('message')}"
        )
    state = load_latest(directory.state_folder).state
    summary = directory.read_summary()
    if not directory.is_finished():
        summary = whole_summary(directory, kept_config(directory, []), state, "stopped")
    result = RunResult(state, directory.read_rounds(), summary, directory.path)
    if result.state.sha256() != result.summary["state_sha256"]:
        raise CheckpointError(
            f"{directory.state_folder}: expected the state of summary.json "
            f"({result.summary['state_sha256'][:12]}), got {result.state.sha256()[:12]}; "
            "the last checkpoint is damaged"
        )
    return result


def drive(runtime: Runtime, plan: Plan) -> Iterator[Event]:
    """The driver's generator, imported where it runs."""
    from fedprompt.runs import driver

    said: set[tuple[str, str | None]] = set()
    for event in driver.drive(runtime, plan, make_html):
        if isinstance(event, Note):  # one about all methods may come from each of them
            if (event.text, event.method) in said:
                continue
            said.add((event.text, event.method))
        yield event


def mark_failed(directory: RunDirectory, error: Exception) -> None:
    """Say in `status.json` of the run, and of the comparison it was at, what ended it."""
    details: Json = {"message": " ".join(str(error).split()) or type(error).__name__}
    if isinstance(error, ClientError):
        details.update(client=error.client_id, stage=error.stage, failed_round=error.round_index)
        details.update(cause=error.cause, node=error.node)
    with contextlib.suppress(OSError):  # the disk may be what failed
        for run in unfinished(directory):
            run.write_status({**run.read_status(), "state": "failed", **details})


def unfinished(directory: RunDirectory) -> list[RunDirectory]:
    """The run and its comparisons, as far as they are started and not finished."""
    runs = [directory, *directory.comparisons()]
    return [run for run in runs if run.is_run() and not run.is_finished()]


def mark_stopped(plan: Plan, why: str = "stopped by a signal") -> int:
    """Note in `status.json` that the run was stopped.

    Args:
        plan: of the run.
        why: for the report.

    Returns:
        Finished rounds over all methods.
    """
    directory = RunDirectory(plan.run_dir)
    # The driver may be about to end. A folder that stays locked is that of another process.
    with (
        contextlib.suppress(ConfigError, OSError),
        sole_writer(directory.path, seconds=WAIT_SECONDS),
    ):
        for run in unfinished(directory):
            status = {**run.read_status(), "state": "stopped", "message": why}
            run.write_status(status)
    return sum(run.last_round() or 0 for run in (directory, *directory.comparisons()))


def failed_method(plan: Plan) -> str | None:
    """The comparison run that failed; None if it was the main run."""
    for run in RunDirectory(plan.run_dir).comparisons():
        if run.read_status().get("state") == "failed":
            return run.path.name
    return None


def replay_client(
    run_dir: str | os.PathLike[str], client_id: int, method: str | None = None
) -> ClientUpdate:
    """Do one client's work of the round after the last checkpoint again, alone and in this process.

    Args:
        run_dir: directory of a run.
        client_id: which client; it need not have been sampled.
        method: a comparison run of the experiment; the main run if None.

    Raises:
        ClientError: the client fails again; the original exception is its `__cause__`.
    """
    directory = RunDirectory.open(run_dir)
    if method is not None:
        directory = RunDirectory.open(directory.comparison(method).path)
    config = kept_config(directory, ["runtime=serial"])
    if not 0 <= client_id < config.clients.count:
        raise ConfigError(
            f"--client: expected a client from 0 to {config.clients.count - 1}, got {client_id}"
        )
    with limited_threads(config.runtime.threads):
        from fedprompt.runs.driver import replay

        return replay(config, directory, client_id)
