"""Have Ray Tune run the trials of a sweep: each in its placement group, as many as fit.

A trial's process is the driver of its experiment, and its client actors take the other bundles of
the group. What trials leave behind are run directories; Tune's own files are temporary.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedprompt.config import ExperimentConfig
from fedprompt.core.errors import ConfigError, FedpromptError
from fedprompt.core.files import json_ready
from fedprompt.core.machine import available_cpus
from fedprompt.core.plugins import Parcel
from fedprompt.core.quiet import quiet_libraries
from fedprompt.experiment import execute, mark_stopped, plan_resume, plan_run
from fedprompt.runs.events import Event, Plan, RoundFinished
from fedprompt.runs.locks import sole_writer
from fedprompt.runs.plugins import check_same
from fedprompt.runtime.base import RuntimeOptions
from fedprompt.runtime.placement import Node, plan_actors
from fedprompt.runtime.ray.local import FOLDER, import_ray, short_folder, start_ray, stop_ray
from fedprompt.runtime.ray.nodes import available_nodes
from fedprompt.sweep.directory import SweepDirectory
from fedprompt.sweep.space import Sweep, Trial, describe
from fedprompt.tracking.figures import figures_of

logger = logging.getLogger(__name__)

Bundle = dict[str, float]
TUNE = ("ray.tune", "ray.air", "ray.train")
"""Libraries that speak beside their results."""
ENVIRONMENT = {
    # The command line handles signals.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A run directory holds what its loggers would write.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Its own display of progress, which prints boxes even when it should be silent.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Relative paths of a config mean what they mean without a sweep.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclasses.dataclass(frozen=True)
class TrialEnded:
    """Event: a trial is finished, was stopped by the rule, or failed."""

    trial: Trial
    state: str
    """finished, stopped or failed"""
    accuracy: float | None
    """Of the last round that was evaluated."""
    message: str | None
    seconds: float
    done: int
    """Trials of the sweep that are over, earlier ones included."""
    total: int


def local_nodes(options: RuntimeOptions) -> list[Node]:
    """What a local Ray would offer, without starting one."""
    import torch

    return [Node(options.cpus or available_cpus(), torch.cuda.device_count())]


def bundles(options: RuntimeOptions, nodes: Sequence[Node]) -> list[Bundle]:
    """The placement group of a trial: its driver, then each client actor.

    Raises:
        ConfigError: the nodes cannot hold them.
    """
    if options.name == "serial":
        return [{"CPU": float(options.threads)}]
    plan = plan_actors(options, nodes)
    actor = {"CPU": plan.cpus, "GPU": plan.gpus}
    driver = {"GPU": min(1.0, plan.gpus)} if options.torch_device == "cuda" else {}
    kept = {name: amount for name, amount in actor.items() if amount}
    return [driver, *(dict(kept) for _ in range(plan.count))]


def check_resources(trials: Sequence[Trial], nodes: Sequence[Node]) -> None:
    """Refuse a sweep of which a trial could never be placed.

    Raises:
        ConfigError: names the trial and the numbers.
    """
    seen: set[RuntimeOptions] = set()
    for trial in trials:
        options = trial.config.runtime
        if options in seen:
            continue
        seen.add(options)
        cell = f"sweep cell {describe(trial.cell)}"
        try:
            wanted = bundles(options, nodes)
        except ConfigError as error:
            raise ConfigError(f"{cell}: {error}") from error
        for name, offered in (
            ("CPU", sum(node.cpus for node in nodes)),
            ("GPU", sum(node.gpus for node in nodes)),
        ):
            total = sum(bundle.get(name, 0.0) for bundle in wanted)
            if total > offered + 1e-6:
                raise ConfigError(
                    f"{cell}: a trial needs {total:g} {name}s, but there are {offered:g}; lower "
                    "runtime.actors, runtime.threads or runtime.gpus_per_actor"
                )


def run_sweep(
    sweep: Sweep,
    trials: Sequence[Trial],
    directory: SweepDirectory,
    on_event: Callable[[TrialEnded], None] | None = None,
    verbose: bool = False,
) -> list[str]:
    """Do the trials that are not done yet, and write the table.

    Args:
        sweep: the sweep.
        trials: all its trials, from `Sweep.trials`.
        directory: where they are.
        on_event: called as trials end.
        verbose: whether Ray's own messages are shown.

    Returns:
        One line for each trial that failed.

    Raises:
        ConfigError: the cluster cannot hold a trial.
        WorkerError: the cluster cannot be reached.
    """
    with sole_writer(directory.path, "--dir"):
        return _run_sweep(sweep, trials, directory, on_event, verbose)


def _run_sweep(
    sweep: Sweep,
    trials: Sequence[Trial],
    directory: SweepDirectory,
    on_event: Callable[[TrialEnded], None] | None,
    verbose: bool,
) -> list[str]:
    """`run_sweep`, with the folder to itself."""
    todo = directory.unfinished(trials)
    progress = Progress(todo, len(trials), directory, on_event)
    if todo:
        for trial in trials:
            check_same(directory.run(trial), trial.config.plugins)
        plans = [trial_plan(trial, directory) for trial in todo]
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        own = not import_ray().is_initialized()
        started = False
        try:
            if own:
                start_ray(max(trial.config.runtime.num_cpus for trial in todo), verbose)
            check_resources(todo, available_nodes())
            started = True
            prefix = f"{FOLDER}{os.getpid()}-tune-"
            with tempfile.TemporaryDirectory(prefix=prefix, dir=short_folder()) as folder:
                own_folder = Path(folder)
                if sweep.tune_loggers:
                    own_folder = directory.path.resolve() / "tune"
                tune_trials(sweep, todo, plans, progress, own_folder)
                for pickled in own_folder.rglob("*.pkl"):  # what Tune itself would go on from
                    pickled.unlink()
        except BaseException:
            for plan in plans if started else ():
                if Path(plan.run_dir).is_dir():
                    mark_stopped(plan)
            raise
        finally:
            if own:
                stop_ray()
    directory.write_table(sweep, trials)
    return progress.failures


class Progress:
    """Notes how trials end; the methods are those of Tune's `Callback`."""

    def __init__(
        self,
        todo: Sequence[Trial],
        total: int,
        directory: SweepDirectory,
        on_event: Callable[[TrialEnded], None] | None,
    ) -> None:
        self.todo = todo
        self.total = total
        self.done = total - len(todo)
        self.directory = directory
        self.on_event = on_event
        self.started: dict[str, float] = {}
        self.failures: list[str] = []
        """One line for each trial that failed."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its callbacks, which it can continue from; a sweep continues from its folders.
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """A trial has its resources.

        Args:
            iteration: of Tune's loop.
            trials: all of Tune's trials.
            trial: the one that starts.
        """
        self.started.setdefault(trial.trial_id, time.monotonic())

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """A trial came to its end, or the rule stopped it.

        Args:
            iteration: of Tune's loop.
            trials: all of Tune's trials.
            trial: the one that ended.
        """
        ours, last = self.todo[trial.config["index"]], trial.last_result or {}
        state = "finished"
        if not self.directory.run(ours).is_finished():
            state = "stopped"
            self.directory.add_stopped(ours, int(last.get("round", 0)))
        self.announce(trial, ours, state, last.get("accuracy"), None)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """A trial raised, or its process died.

        Args:
            iteration: of Tune's loop.
            trials: all of Tune's trials.
            trial: the one that failed.
        """
        ours = self.todo[trial.config["index"]]
        status = self.directory.run(ours).read_status()
        sent = (trial.last_result or {}).get("message")
        message = status.get("message") if status.get("state") == "failed" else sent
        message = str(message or "its process died (killed, or out of memory?)")
        self.failures.append(f"{describe(ours.cell)} seed={ours.seed}: {message}")
        self.announce(trial, ours, "failed", None, message)

    def announce(
        self, trial: Any, ours: Trial, state: str, accuracy: float | None, message: str | None
    ) -> None:
        """Report the end of a trial to `on_event`.

        Args:
            trial: Tune's trial.
            ours: the same trial in our list.
            state: finished, stopped or failed.
            accuracy: on the validation split, if it is known.
            message: of a failure.
        """
        self.done += 1
        seconds = time.monotonic() - self.started.get(trial.trial_id, time.monotonic())
        if self.on_event is not None:
            self.on_event(
                TrialEnded(ours, state, accuracy, message, seconds, self.done, self.total)
            )


def tune_trials(
    sweep: Sweep, todo: Sequence[Trial], plans: Sequence[Plan], progress: Progress, folder: Path
) -> None:
    """Give the trials to Tune and wait for them; its own files go into `folder`.

    Args:
        sweep: space, seeds and stopping rule.
        todo: trials that are not finished.
        plans: for each of these, what its process needs.
        progress: receives what trials report.
        folder: of Tune's own files.
    """
    from ray import tune

    nodes = available_nodes()
    scheduler = None
    if sweep.stop is not None:
        from ray.tune.schedulers import AsyncHyperBandScheduler

        scheduler = AsyncHyperBandScheduler(
            time_attr="round",
            metric="validation_accuracy",
            mode="max",
            grace_period=sweep.stop.grace,
            reduction_factor=sweep.stop.reduction,
            max_t=max(trial.config.rounds for trial in todo),
        )

    # Plain numbers: this travels before the plug-ins whose classes a config may be made of.
    wanted = [bundles(trial.config.runtime, nodes) for trial in todo]

    def resources(config: dict[str, Any]) -> Any:
        return tune.PlacementGroupFactory(wanted[config["index"]])

    callback = type("TuneProgress", (Progress, tune.Callback), {})(
        todo, progress.total, progress.directory, progress.on_event
    )
    callback.failures = progress.failures
    parcel = Parcel.pack(list(plans))
    # A sweep that is continued is another experiment of Tune.
    name = f"{sweep.name}-{len(list(folder.glob('*'))) + 1}"
    with quiet_libraries(TUNE):
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, parcel=parcel), resources),
            param_space={"index": tune.grid_search(list(range(len(todo))))},
            tune_config=tune.TuneConfig(
                scheduler=scheduler,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: todo[trial.config["index"]].folder,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=os.fspath(folder),
                verbose=0,
                callbacks=[callback, *tune_loggers(sweep.tune_loggers)],
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()


def tune_loggers(names: Sequence[str]) -> list[Any]:
    """Loggers of Tune by their names."""
    logger_classes: Any = importlib.import_module("ray.tune.logger")
    classes = {
        "csv": logger_classes.CSVLoggerCallback,
        "json": logger_classes.JsonLoggerCallback,
        "tensorboard": logger_classes.TBXLoggerCallback,
    }
    return [classes[name]() for name in names]


def trial_plan(trial: Trial, directory: SweepDirectory) -> Plan:
    """Start a trial, or continue it from its last checkpoint."""
    run = directory.run(trial)
    if run.is_run() and run.has_header() and run.last_round() is not None:
        return plan_resume(run.path)
    config: ExperimentConfig = dataclasses.replace(trial.config, run_dir=os.fspath(run.path))
    return plan_run(config, overwrite=True)


def run_trial(config: dict[str, Any], parcel: Parcel[list[Plan]]) -> None:
    """What Tune calls in the process of a trial."""
    from ray import tune

    plan = parcel.open()[config["index"]]
    last: dict[str, float] = {}

    def listen(event: Event) -> None:
        figures = figures_for_tune(event, plan.config.label)
        if figures is None:
            return
        last.clear()
        last.update(figures)
        # Without a validation split no rule can judge a trial before its end.
        judged = not math.isnan(figures["validation_accuracy"])
        if judged and figures["round"] < plan.config.rounds:
            tune.report(figures)

    try:
        execute(plan, listen)
    except FedpromptError as error:
        # Round 0 is before any rung of a stopping rule: it only carries the message.
        tune.report(
            {"round": 0, "accuracy": 0.0, "validation_accuracy": 0.0, "message": str(error)}
        )
        raise
    if last:
        # The rule may stop a trial at any report; after its last round that must not cost its end.
        tune.report(last)


def figures_for_tune(event: Event, method: str) -> dict[str, float] | None:
    """The figures of a round that was evaluated, as all loggers get them; None for other events.

    Args:
        event: of the trial's run.
        method: of the trial; those that it is compared with are not its figures.
    """
    if not isinstance(event, RoundFinished) or event.method != method:
        return None
    if math.isnan(event.report.accuracy):  # not evaluated in this round
        return None
    return {"validation_accuracy": math.nan, **figures_of(json_ready(event.report))}
