"""What the terminal shows of a run, and how the program ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import click
from rich.console import Console
from rich.text import Text

from fedprompt.cli.signals import StopSignals
from fedprompt.core.errors import CallbackError, ClientError, WorkerError
from fedprompt.core.words import counted

if TYPE_CHECKING:  # take seconds to import
    from fedprompt.config import ExperimentConfig
    from fedprompt.report.live import RoundDisplay
    from fedprompt.runs.events import Event, Plan


def sort_arguments(arguments: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The experiment names or files, and the overrides, of a command line."""
    # "=" after a "/" belongs to a path: sweeps make folders such as alpha=0.1.
    overrides = [each for each in arguments if "=" in each.split("/")[0]]
    return [each for each in arguments if each not in overrides], overrides


def check_one_name(names: list[str], example: str) -> None:
    """Refuse a command line that does not name one experiment."""
    if len(names) != 1:
        got = " and ".join(f"'{name}'" for name in names) or "none"
        raise click.UsageError(
            f"expected one experiment name or file, and key=value for what differs, got {got}; "
            f"try '{example}'"
        )


def print_estimate(
    config: ExperimentConfig, as_json: bool = False, gflops: float | None = None
) -> None:
    """Say what a run would send, keep and take.

    Args:
        config: of the experiment.
        as_json: for programs.
        gflops: 10^9 operations a second of one worker; None to measure this machine.
    """
    from fedprompt.cli.estimate import make_estimate, render

    made = make_estimate(config, gflops)
    if as_json:
        click.echo(json.dumps(made.tree(), indent=2))
    else:
        Console().print(render(made))


def run_plan(plan: Plan, display: RoundDisplay) -> None:
    """Run a plan with a live display and print what came of it.

    Args:
        plan: of the run.
        display: that is shown already.
    """
    from fedprompt.experiment import execute, mark_stopped
    from fedprompt.report.table import print_summary
    from fedprompt.runs.directory import RunDirectory
    from fedprompt.runs.events import Prepared

    config = plan.config
    display.expect((1 + len(config.compare)) * config.rounds)
    if plan.resume and RunDirectory(plan.run_dir).is_finished():
        display.message(f"{plan.run_dir} is finished: nothing to resume")
    started = plan.resume

    def show(event: Event) -> None:
        nonlocal started
        started = started or isinstance(event, Prepared)
        display.show(event)

    signals = StopSignals()
    try:
        with signals, display:
            result = execute(plan, show)
    except BaseException as error:
        # While it starts, Ray turns a SIGTERM into SystemExit.
        terminated = isinstance(error, SystemExit) and error.code == signal.SIGTERM
        number = signals.number or (signal.SIGTERM if terminated else None)
        if number is not None:
            stop_quietly(plan, number, mark_stopped(plan) if started else None)
        if isinstance(error, ClientError):
            fail(f"{error}; rerun it alone: {replay_command(plan, error)}", error.exit_code)
        if isinstance(error, CallbackError) and started:
            fail(
                f"{error}; the rounds so far are on disk; continue with: {resume_command(plan)}, "
                "or without callbacks: add 'callbacks=[]'",
                error.exit_code,
            )
        if isinstance(error, WorkerError) and started:
            fail(f"{error}; continue with: {resume_command(plan)}", error.exit_code)
        raise
    if signals.number is not None:  # it came while Python was in a place that swallows exceptions
        stop_quietly(plan, signals.number, mark_stopped(plan))
    print_summary(Console(), result.run_dir)
    if result.summary["state"] == "stopped":
        click.echo(f"stopped by a callback; to go on: {resume_command(plan)} 'callbacks=[]'")
    if config.note:
        click.echo(config.note)
    click.echo(f"state sha256: {result.summary['state_sha256']}")
    click.echo(f"report: {result.run_dir / 'report.html'}")


def replay_command(plan: Plan, error: ClientError) -> str:
    """The command that runs the failed client alone."""
    from fedprompt.experiment import failed_method

    method = failed_method(plan)
    suffix = f" --method {method}" if method else ""
    return f"fedprompt replay {shlex.quote(plan.run_dir)} --client {error.client_id}{suffix}"


def resume_command(plan: Plan) -> str:
    """The command that continues the run."""
    return f"fedprompt run --resume {shlex.quote(plan.run_dir)}"


def stop_quietly(plan: Plan, number: int, finished_rounds: int | None) -> NoReturn:
    """Say how to continue, and end with the signal's exit code.

    Args:
        plan: the run that was stopped.
        number: of the signal.
        finished_rounds: rounds that a resumed run does not repeat; None if nothing was written yet.
    """
    if finished_rounds is None:
        text = "stopped before the first round; nothing was written"
    else:
        text = (
            f"stopped; on disk: {counted(finished_rounds, 'finished round')}; "
            f"continue with: {resume_command(plan)}"
        )
    Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False)
    # The user wanted the stop: nothing is left to clean up, and exit hooks would only add noise.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + number)


def fail(message: str, exit_code: int) -> NoReturn:
    """Print one line on standard error and exit."""
    line = " ".join(message.split())
    Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {line}"), soft_wrap=True)
    raise SystemExit(exit_code)
