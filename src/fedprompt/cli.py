"""The command line.

Exit code 0 only if the work was done; 2 for a wrong call or config; 130 / 143 when stopped.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import json
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.text import Text

import fedprompt
from fedprompt.errors import ClientError, FedpromptError, WorkerError, suggest


class Interrupted(BaseException):
    """A signal asked the process to stop; no `Exception`, so that nothing swallows it."""


class Command(click.Group):
    """A group whose commands turn the errors of fedprompt into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except FedpromptError as error:
            if ctx.params.get("verbose"):
                traceback.print_exc()
            fail(str(error), error.exit_code)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; an unknown one is an error that lists those that exist."""
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            raise click.UsageError(
                f"unknown command '{args[0]}': expected one of {', '.join(known)}"
                f"{suggest(args[0], known)}",
                ctx,
            )
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the program: one line for a wrong call, too, and an exit code."""
        # Importing torch makes a million objects; Python would search them for cycles again and
        # again meanwhile, and once more before it ends: together most of a second.
        gc.set_threshold(50_000, 20, 20)
        atexit.register(gc.freeze)
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2 and later
                error.show()
                raise SystemExit(error.exit_code) from None
            path = error.ctx.command_path if error.ctx else "fedprompt"
            text = error.format_message().removesuffix(".")
            fail(f"{text}; see '{path} --help'", error.exit_code)
        except click.ClickException as error:
            fail(error.format_message(), error.exit_code)
        except click.Abort:
            fail("stopped before anything was written", 128 + signal.SIGINT)
        raise SystemExit(code if isinstance(code, int) else 0)


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Show what Ray says, and tracebacks.")
@click.version_option(fedprompt.__version__, prog_name="fedprompt")
@click.pass_context
def main(ctx: click.Context, verbose: bool) -> None:
    """Federated prompt-tuning of a frozen Vision Transformer."""
    ctx.obj = verbose
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR,
        format="%(levelname)s %(name)s: %(message)s",
    )


@main.command()
@click.argument("arguments", nargs=-1, metavar="[NAME|FILE] [KEY=VALUE]...")
@click.option(
    "--resume", type=click.Path(path_type=Path), metavar="RUN_DIR", help="Continue a run."
)
@click.option("--overwrite", is_flag=True, help="Replace the run that run_dir holds.")
@click.option("--print-config", is_flag=True, help="Print the composed config and stop.")
@click.option("-v", "--verbose", is_flag=True, help="Show what Ray says.")
@click.pass_context
def run(
    ctx: click.Context,
    arguments: tuple[str, ...],
    resume: Path | None,
    overwrite: bool,
    print_config: bool,
    verbose: bool,
) -> None:
    """Run an experiment: `fedprompt run quickstart rounds=5`."""
    names, overrides = sort_arguments(arguments)
    if resume is not None and names:
        raise click.UsageError(f"--resume takes no experiment name, got '{names[0]}'")
    if resume is not None and overwrite:
        raise click.UsageError("--resume continues a run and --overwrite replaces it: give one")
    if resume is None:
        check_one_name(names, "fedprompt run quickstart")
    # Imported when the call is known to be right: this takes seconds.
    from fedprompt.config import compose
    from fedprompt.experiment import plan_resume, plan_run

    if resume is not None:
        plan = plan_resume(resume, overrides)
        config = plan.config
    else:
        config = compose(names[0], overrides)
        if not print_config:
            plan = plan_run(config, overwrite)
    if print_config:
        click.echo(config.to_yaml(), nl=False)
    else:
        run_plan(dataclasses.replace(plan, verbose=verbose or ctx.obj))


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


@main.command()
@click.argument("arguments", nargs=-1, metavar="[NAME|FILE] [KEY=VALUE]...")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="SWEEP_DIR",
    help="Where to put the sweep.  [default: runs/sweep-NAME-DATE-TIME]",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="SWEEP_DIR",
    help="Continue a sweep; finished trials are kept.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show what Ray says.")
@click.pass_context
def sweep(
    ctx: click.Context,
    arguments: tuple[str, ...],
    folder: Path | None,
    resume: Path | None,
    verbose: bool,
) -> None:
    """Run experiments over a search space: `fedprompt sweep alpha_prompts sweep.seeds=5`."""
    names, overrides = sort_arguments(arguments)
    if resume is not None and (names or overrides or folder):
        raise click.UsageError("--resume takes the sweep's folder alone: its sweep.yaml says all")
    if resume is None:
        check_one_name(names, "fedprompt sweep alpha_prompts")
    from fedprompt.sweep import SweepDirectory, default_folder, load_sweep

    if resume is not None:
        directory, chosen = SweepDirectory.open(resume)
    else:
        chosen = load_sweep(names[0], overrides)
    trials = chosen.trials()
    from fedprompt.tuning import check_resources, local_nodes

    if not os.environ.get("RAY_ADDRESS"):
        check_resources(trials, local_nodes(trials[0].config.runtime))
    if resume is None:
        directory = SweepDirectory.create(folder or default_folder(chosen), chosen)
    run_trials(chosen, trials, directory, verbose or ctx.obj)


def run_trials(chosen: Any, trials: Any, directory: Any, verbose: bool) -> None:
    """Run the trials of a sweep with a line for each, and print what came of them."""
    from fedprompt.display import clock, percent
    from fedprompt.sweep import describe, render_table
    from fedprompt.sweep_figures import write_figures
    from fedprompt.tuning import run_sweep

    console = Console()
    resume = f"fedprompt sweep --resume {shlex.quote(os.fspath(directory.path))}"
    left = len(directory.unfinished(trials))
    click.echo(f"sweep {chosen.name}: {left} of {len(trials)} trials to do, in {directory.path}")
    width = len(str(len(trials)))

    def show(event: Any) -> None:
        result = percent(event.accuracy) if event.state != "failed" else event.message
        console.print(
            f"{event.done:>{width}}/{event.total}  {describe(event.trial.cell)} "
            f"seed={event.trial.seed}  {event.state} in {clock(event.seconds)}  {result}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    signals = StopSignals()
    try:
        with signals:
            failures = run_sweep(chosen, trials, directory, show, verbose)
    except BaseException:
        if signals.number is None:
            raise
        done = len(trials) - len(directory.unfinished(trials))
        click.echo(f"stopped; {done} trials are done; continue with: {resume}", err=True)
        sys.stdout.flush()
        os._exit(128 + signals.number)
    table = json.loads((directory.path / "table.json").read_text())
    write_figures(table, directory.figures_folder)
    console.print(render_table(table))
    if chosen.note:
        click.echo(chosen.note)
    click.echo(f"table: {directory.path / 'table.csv'}")
    click.echo(f"figures: {directory.figures_folder}")
    if failures:
        fail(
            f"{len(failures)} of {len(trials)} trials failed, the first: {failures[0]}; "
            f"try them again with: {resume}",
            1,
        )


@main.command()
@click.argument("arguments", nargs=-1, metavar="[NAME|FILE] [KEY=VALUE]...")
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.png",
    help="Where to draw who holds what.  [default: partition-NAME.png]",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Write the partition, for partition.file=FILE.npz.",
)
def partition(arguments: tuple[str, ...], picture: Path | None, save: Path | None) -> None:
    """Show who would hold what: `fedprompt partition quickstart partition.alpha=0.1`."""
    names, overrides = sort_arguments(arguments)
    check_one_name(names, "fedprompt partition quickstart")
    from fedprompt.config import compose
    from fedprompt.preview import (
        check_writable,
        draw_picture,
        make_preview,
        render_table,
        save_partition,
    )

    preview = make_preview(compose(names[0], overrides))
    picture = picture or Path(f"partition-{Path(preview.config.name).name}.png")
    check_writable(picture, "--picture")
    saved = save_partition(preview, save) if save else None
    draw_picture(preview, picture)
    click.echo(preview.title)
    Console().print(render_table(preview))
    for note in preview.task.notes:
        click.echo(f"note: {note}")
    click.echo(f"picture: {picture}")
    if saved:
        click.echo(f"partition: {saved}")


@main.command()
def methods() -> None:
    """List the methods with a line and a citation each."""
    from fedprompt.config import list_methods

    for each in list_methods():
        click.echo(f"{each.name}\n    {each.text}\n    {each.source}")


@main.command()
@click.argument("run_dirs", nargs=-1, required=True, type=click.Path(path_type=Path))
def report(run_dirs: tuple[Path, ...]) -> None:
    """Print the summary of runs and draw their figures and report.html again."""
    from fedprompt.report import make_html, make_report, render_summary

    console = Console()
    console.print(render_summary(*run_dirs))
    path = make_html(run_dirs[0]) if len(run_dirs) == 1 else make_report(run_dirs)
    click.echo(f"report: {path}")


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--client", type=int, required=True, help="Client id.")
@click.option("--method", default=None, help="A comparison run of the experiment.")
def replay(run_dir: Path, client: int, method: str | None) -> None:
    """Do one client's next round again, alone, in this process and with the full traceback."""
    from fedprompt.experiment import replay_client

    try:
        update = replay_client(run_dir, client, method)
    except ClientError:
        traceback.print_exc()
        raise
    figures = ", ".join(f"{name} {value:.4g}" for name, value in update.metrics.items())
    click.echo(
        f"client {update.client_id}: {update.num_examples} samples, "
        f"{len(update.prompts)} prompts; {figures}"
    )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--ray", "use_ray", is_flag=True, help="Start and stop a local Ray cluster, too.")
def doctor(as_json: bool, use_ray: bool) -> None:
    """Say what this machine has, whether the quickstart can run, and how to mend what is wrong.

    The exit code is 1 if the quickstart cannot run.
    """
    from fedprompt.doctor import as_tree, can_run, examine, render

    findings = examine(use_ray)
    if as_json:
        click.echo(json.dumps(as_tree(findings), indent=2))
    else:
        Console().print(render(findings))
    if not can_run(findings):
        raise SystemExit(1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
def bench(as_json: bool, threads: int, device: str) -> None:
    """Say how fast clients train here and how near that is to the machine's ceiling (a minute)."""
    from fedprompt.bench import render, run_bench

    peak, rows = run_bench(threads, device)
    if as_json:
        table = {"ceiling_gflops": peak / 1e9, "rows": [dataclasses.asdict(row) for row in rows]}
        click.echo(json.dumps(table, indent=2))
    else:
        Console().print(render(peak, rows, threads))


class PretrainCommand(click.Command):
    """`fedprompt pretrain`, whose module is imported when it is asked for: this takes seconds."""

    def _real(self) -> click.Command:
        from fedprompt.pretrain import pretrain_command

        return pretrain_command

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The options of the real command."""
        return self._real().get_params(ctx)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the real command."""
        return self._real().invoke(ctx)


main.add_command(
    PretrainCommand(
        "pretrain",
        help="Train the embedded backbone on drawn images.",
        short_help="Train the embedded backbone on drawn images.",
    )
)


def run_plan(plan: Any) -> None:
    """Run a plan with a live display and print what came of it."""
    from fedprompt.display import RoundDisplay
    from fedprompt.events import Note, PhaseStarted, Prepared, RoundFinished
    from fedprompt.experiment import execute, mark_interrupted
    from fedprompt.records import RunDirectory
    from fedprompt.report import render_summary

    console = Console()
    config = plan.config
    phases = 1 + len(config.compare)
    if plan.resume and RunDirectory(plan.run_dir).is_finished():
        click.echo(f"{plan.run_dir} is finished: nothing to resume")
    display = RoundDisplay(phases * config.rounds, f"fedprompt {config.name}", console)

    begun = plan.resume

    def show(event: Any) -> None:
        nonlocal begun
        begun = begun or isinstance(event, Prepared)
        if isinstance(event, RoundFinished):
            display.update(event.report, event.seconds)
        elif isinstance(event, PhaseStarted):
            display.start_phase(event.name, event.rounds, event.finished)
        elif isinstance(event, (Prepared, Note)):
            display.message(event.text)

    signals = StopSignals()
    try:
        with signals, display:
            result = execute(plan, show)
    except BaseException as error:
        # While it starts, Ray turns a SIGTERM into SystemExit.
        terminated = isinstance(error, SystemExit) and error.code == signal.SIGTERM
        number = signals.number or (signal.SIGTERM if terminated else None)
        if number is not None:
            stop_quietly(plan, number, mark_interrupted(plan) if begun else None)
        if isinstance(error, ClientError):
            fail(f"{error}; rerun it alone: {replay_command(plan, error)}", error.exit_code)
        if isinstance(error, WorkerError) and begun:
            fail(f"{error}; continue with: {resume_command(plan)}", error.exit_code)
        raise
    if signals.number is not None:  # it came while Python was in a place that swallows exceptions
        stop_quietly(plan, signals.number, mark_interrupted(plan))
    console.print(render_summary(result.run_dir))
    if config.note:
        click.echo(config.note)
    click.echo(f"state sha256: {result.summary['state_sha256']}")
    click.echo(f"report: {result.run_dir / 'report.html'}")


def replay_command(plan: Any, error: ClientError) -> str:
    """The command that runs the failed client alone."""
    from fedprompt.experiment import failed_method

    method = failed_method(plan)
    suffix = f" --method {method}" if method else ""
    return f"fedprompt replay {shlex.quote(plan.run_dir)} --client {error.client_id}{suffix}"


def resume_command(plan: Any) -> str:
    """The command that continues the run."""
    return f"fedprompt run --resume {shlex.quote(plan.run_dir)}"


def stop_quietly(plan: Any, number: int, finished_rounds: int | None) -> NoReturn:
    """Say how to go on and end with the signal's exit code."""
    if finished_rounds is None:
        text = "stopped before the first round; nothing was written"
    else:
        text = (
            f"stopped; {finished_rounds} finished rounds are on disk; "
            f"continue with: {resume_command(plan)}"
        )
    Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False)
    # The stop was asked for: nothing is left to clean up, and atexit hooks would only add noise.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + number)


class StopSignals:
    """While entered, the first SIGINT or SIGTERM raises `Interrupted`; the third ends the process.

    `number` remembers the signal: an exception that is raised inside Ray's compiled code comes out
    as a `SystemError`, so its type does not tell.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGINT, signal.SIGTERM):
                self._before[each] = signal.signal(each, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        # After a signal everything is on its way out, where a second one must not disturb.
        if self.number is None:
            for each, handler in self._before.items():
                signal.signal(each, handler)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._count += 1
        if self._count == 1:
            self.number = number
            raise Interrupted
        if self._count >= 3:  # putting things away hangs
            os._exit(128 + number)


def fail(message: str, exit_code: int) -> NoReturn:
    """One line on standard error, and out."""
    line = " ".join(message.split())
    Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {line}"), soft_wrap=True)
    raise SystemExit(exit_code)
