"""`fedprompt sweep`: experiments over a search space."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from fedprompt.cli import completion
from fedprompt.cli.console import check_one_name, fail, sort_arguments
from fedprompt.cli.signals import StopSignals
from fedprompt.core.words import counted

if TYPE_CHECKING:  # take seconds to import
    from fedprompt.sweep.directory import SweepDirectory
    from fedprompt.sweep.ray_tune import TrialEnded
    from fedprompt.sweep.space import Sweep, Trial


@click.command()
@click.argument(
    "arguments",
    nargs=-1,
    metavar="[NAME|FILE] [KEY=VALUE]...",
    shell_complete=completion.sweep_words,
)
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
    shell_complete=completion.sweeps,
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
    """Run experiments over a search space: `fedprompt sweep alpha_prompts sweep.seeds=5`.

    An experiment needs no file: `fedprompt sweep quickstart seed=0..4 partition.alpha=0.1,0.5`.
    """
    names, overrides = sort_arguments(arguments)
    if resume is not None and (names or overrides or folder):
        raise click.UsageError("--resume takes the sweep's folder alone: its sweep.yaml says all")
    if resume is None:
        check_one_name(names, "fedprompt sweep alpha_prompts")
    from fedprompt.core.plugins import find
    from fedprompt.sweep.directory import SweepDirectory, default_folder
    from fedprompt.sweep.space import load_sweep

    if resume is not None:
        directory, chosen = SweepDirectory.open(resume)
    else:
        chosen = load_sweep(names[0], overrides)
    trials = chosen.trials()
    from fedprompt.sweep.ray_tune import check_resources, local_nodes

    if not os.environ.get("RAY_ADDRESS"):
        check_resources(trials, local_nodes(trials[0].config.runtime))
    if resume is None:
        directory = SweepDirectory.create(
            folder or default_folder(chosen), chosen.settled(trials), find(trials[0].config.plugins)
        )
    run_trials(chosen, trials, directory, verbose or ctx.obj)


def run_trials(
    chosen: Sweep, trials: Sequence[Trial], directory: SweepDirectory, verbose: bool
) -> None:
    """Run the trials of a sweep with a line for each, and print what came of them.

    Args:
        chosen: the sweep.
        trials: all of its trials, finished ones too.
        directory: the sweep's folder.
        verbose: whether Ray's own messages are shown.
    """
    from fedprompt.report.live import clock, percent
    from fedprompt.sweep.figures import write_figures
    from fedprompt.sweep.page import best_command, best_text, best_trial, make_sweep_page
    from fedprompt.sweep.ray_tune import run_sweep
    from fedprompt.sweep.space import describe
    from fedprompt.sweep.table import render_table

    console = Console()
    resume = f"fedprompt sweep --resume {shlex.quote(os.fspath(directory.path))}"
    left = len(directory.unfinished(trials))
    click.echo(f"sweep {chosen.name}: {left} of {len(trials)} trials to do, in {directory.path}")
    width = len(str(len(trials)))

    def show(event: TrialEnded) -> None:
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
        click.echo(f"stopped; done: {counted(done, 'trial')}; continue with: {resume}", err=True)
        sys.stdout.flush()
        os._exit(128 + signals.number)
    table = json.loads((directory.path / "table.json").read_text())
    write_figures(table, directory.figures_folder)
    console.print(render_table(table))
    best = best_trial(table)
    if best is not None:
        click.echo(f"best: {best_text(best)}\nrepeat it: {best_command(directory, best)}")
    if chosen.note:
        click.echo(chosen.note)
    click.echo(f"table: {directory.path / 'table.csv'}")
    click.echo(f"report: {make_sweep_page(directory, chosen, table)}")
    if failures:
        fail(
            f"{len(failures)} of {len(trials)} trials failed, the first: {failures[0]}; "
            f"try them again with: {resume}",
            1,
        )
