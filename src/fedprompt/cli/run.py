"""`fedprompt run`: one experiment."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
from rich.console import Console

from fedprompt.cli import completion
from fedprompt.cli.console import check_one_name, print_estimate, run_plan, sort_arguments
from fedprompt.report.live import RoundDisplay


@click.command()
@click.argument(
    "arguments",
    nargs=-1,
    metavar="[NAME|FILE] [KEY=VALUE]...",
    shell_complete=completion.experiment_words,
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN_DIR",
    shell_complete=completion.unfinished_runs,
    help="Continue a run.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run that run_dir holds.")
@click.option("--print-config", is_flag=True, help="Print the composed config and stop.")
@click.option("--dry-run", is_flag=True, help="Say what the run would send and take, and stop.")
@click.option("-v", "--verbose", is_flag=True, help="Show what Ray says.")
@click.pass_context
def run(
    ctx: click.Context,
    arguments: tuple[str, ...],
    resume: Path | None,
    overwrite: bool,
    print_config: bool,
    dry_run: bool,
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
    # First of all something on the screen: what comes next takes seconds to import.
    title = f"fedprompt {names[0]}" if names else f"fedprompt run --resume {resume}"
    with RoundDisplay(0, title, Console(), quiet=print_config or dry_run) as display:
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
        elif dry_run:
            print_estimate(plan.config)
        else:
            run_plan(dataclasses.replace(plan, verbose=verbose or ctx.obj), display)
