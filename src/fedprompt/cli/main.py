"""The command line.

Exit code 0 only if the work was done; 2 for a wrong call or config; 130 / 143 when stopped.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import json
import logging
import signal
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

import fedprompt
from fedprompt.cli import completion
from fedprompt.cli.console import check_one_name, fail, print_estimate, sort_arguments
from fedprompt.cli.fetch import fetch
from fedprompt.cli.pages import report, runs
from fedprompt.cli.pretrain import pretrain_command
from fedprompt.cli.results import evaluate, export, predict
from fedprompt.cli.run import run
from fedprompt.cli.sweep import sweep
from fedprompt.core.errors import ClientError, FedpromptError, suggest
from fedprompt.core.words import counted


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
        asked = not ctx.resilient_parsing  # by a person, not by a shell that completes
        if asked and args[0] not in known and not args[0].startswith("-"):
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
@click.argument(
    "arguments",
    nargs=-1,
    metavar="[NAME|FILE] [KEY=VALUE]...",
    shell_complete=completion.experiment_words,
)
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
    from fedprompt.cli.preview import (
        check_writable,
        draw_picture,
        make_preview,
        render_table,
        save_partition,
    )
    from fedprompt.config import compose

    preview = make_preview(compose(names[0], overrides))
    picture = picture or Path(f"partition-{Path(preview.config.name).name}.png")
    check_writable(picture, "--picture")
    saved = save_partition(preview, save) if save else None
    draw_picture(preview, picture)
    click.echo(preview.title)
    Console().print(render_table(preview))
    for note in preview.notes:
        click.echo(f"note: {note}")
    click.echo(f"picture: {picture}")
    if saved:
        click.echo(f"partition: {saved}")


@main.command("list")
@click.argument("kind", required=False, metavar="[KIND]", shell_complete=completion.kinds)
@click.option("--plugin", multiple=True, metavar="FILE.py|MODULE", help="List what it adds, too.")
def list_names(kind: str | None, plugin: tuple[str, ...]) -> None:
    """List what an experiment can name: `fedprompt list data`, `fedprompt list methods`.

    Without KIND: the kinds, and how many names each has.
    """
    from fedprompt.cli.listing import KINDS, kind_of, named
    from fedprompt.core.plugins import load_plugins

    chosen = None if kind is None else kind_of(kind)
    load_plugins(plugin)
    if chosen is None:
        for one in KINDS:
            click.echo(f"{one:12}{len(named(one)):4}    fedprompt list {one}")
        return
    found = named(chosen)
    width = max(len(each.name) for each in found)
    for each in found:
        source = f"  [{each.plugin}]" if each.plugin else ""
        click.echo(f"{each.name:{width}}  {each.words}{source}".rstrip())


@main.command()
def methods() -> None:
    """List the methods with a line and a citation each."""
    from fedprompt.config import list_methods

    for each in list_methods():
        click.echo(f"{each.name}\n    {each.text}\n    {each.source}")


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path), shell_complete=completion.runs)
@click.option("--client", type=int, required=True, help="Client id.")
@click.option(
    "--method",
    default=None,
    shell_complete=completion.compared,
    help="A comparison run of the experiment.",
)
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
        f"client {update.client_id}: {counted(update.num_examples, 'sample')}, "
        f"{counted(len(update.prompts), 'prompt')}; {figures}"
    )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--ray", "use_ray", is_flag=True, help="Start and stop a local Ray cluster, too.")
def doctor(as_json: bool, use_ray: bool) -> None:
    """Say what this machine has, whether the quickstart can run, and how to fix what is wrong.

    The exit code is 1 if the quickstart cannot run.
    """
    from fedprompt.cli.doctor import as_tree, can_run, examine, render

    findings = examine(use_ray)
    if as_json:
        click.echo(json.dumps(as_tree(findings), indent=2))
    else:
        Console().print(render(findings))
    if not can_run(findings):
        raise SystemExit(1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of torch."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
def bench(as_json: bool, threads: int, device: str) -> None:
    """Say how fast clients train here and how near that is to the machine's ceiling (a minute)."""
    from fedprompt.cli.bench import render, run_bench

    peak, rows = run_bench(threads, device)
    if as_json:
        table = {"ceiling_gflops": peak / 1e9, "rows": [dataclasses.asdict(row) for row in rows]}
        click.echo(json.dumps(table, indent=2))
    else:
        Console().print(render(peak, rows, threads))


@main.command()
@click.argument(
    "arguments",
    nargs=-1,
    metavar="[NAME|FILE] [KEY=VALUE]...",
    shell_complete=completion.experiment_words,
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option(
    "--gflops",
    type=click.FloatRange(0, min_open=True),
    help="10^9 operations a second of one worker, instead of a measurement of this machine.",
)
def estimate(arguments: tuple[str, ...], as_json: bool, gflops: float | None) -> None:
    """Say what a run would send, keep and take: `fedprompt estimate quickstart rounds=100`.

    Nothing is written, and nothing is fetched.
    """
    names, overrides = sort_arguments(arguments)
    check_one_name(names, "fedprompt estimate quickstart")
    from fedprompt.config import compose

    print_estimate(compose(names[0], overrides), as_json, gflops)


main.add_command(run)
main.add_command(completion.completion)
main.add_command(sweep)
main.add_command(fetch)
main.add_command(predict)
main.add_command(evaluate)
main.add_command(export)
main.add_command(report)
main.add_command(runs)
main.add_command(pretrain_command)
