"""`fedprompt report` and `fedprompt runs`: pages about runs and sweeps, and the list of runs."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedprompt.cli import completion
from fedprompt.core.errors import ConfigError

if TYPE_CHECKING:
    from fedprompt.runs.catalogue import Entry

OUTPUT = click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the page.  [default: the run's own, or runs/report-DATE-TIME for several]",
)
OPEN = click.option("--open", "shown", is_flag=True, help="Show the page in the browser.")


@click.command()
@click.argument(
    "run_dirs",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    shell_complete=completion.runs,
)
@OUTPUT
@OPEN
def report(run_dirs: tuple[Path, ...], output: Path | None, shown: bool) -> None:
    """Print the summary of runs, or of a sweep, and write their page.

    The page of one run is its report.html, and its figures are drawn again; several runs get a page
    of their own. Runs that differ in the seed alone are one line with its interval.
    """
    if len(run_dirs) == 1 and (run_dirs[0] / "sweep.yaml").is_file():
        show(_sweep_page(run_dirs[0], output), shown)
        return
    from fedprompt.report.table import print_summary

    print_summary(Console(), *run_dirs)
    show(write_page(run_dirs, output), shown)


@click.command()
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
@click.option("--method", help="Only runs of this method, be it as a comparison.")
@click.option("--data", help="Only runs on this data set.")
@click.option("--status", help="Only runs that are finished, stopped, failed or running.")
@click.option(
    "--sort",
    default="-date",
    show_default=True,
    metavar="KEY",
    help="date, accuracy, data, done, method, partition, path, seed, status; -KEY: from the end.",
)
@click.option("--report", "page", is_flag=True, help="Write a page about these runs.")
@OUTPUT
@OPEN
def runs(
    folder: Path,
    method: str | None,
    data: str | None,
    status: str | None,
    sort: str,
    page: bool,
    output: Path | None,
    shown: bool,
) -> None:
    """List the runs below FOLDER (default: runs), those of sweeps among them.

    `fedprompt runs --method pfpt --sort -accuracy --report` writes the page of a selection.
    """
    if (output is not None or shown) and not page:
        raise click.UsageError("--output and --open are for --report: add it")
    from fedprompt.runs.catalogue import find_runs, select
    from fedprompt.runs.directory import STATES

    if status is not None and status not in STATES:
        raise ConfigError(f"--status: expected one of {', '.join(STATES)}, got '{status}'")
    found = find_runs(folder)
    chosen = select(found, method, data, status, sort)
    if not chosen:
        text = f"{folder}: no run" + (f" of {len(found)} is of that kind" if found else "")
        for what in ("methods", "data", "status") if found else ():
            words = {str(each) for run in found for each in _words(getattr(run, what))}
            text += f"; {what}: {', '.join(sorted(words))}"
        if page:
            raise ConfigError(f"{text}; there is no page to write")
        click.echo(text)
        return
    console = Console()
    if not console.is_terminal:
        console.width = 240
    console.print(runs_table(chosen, folder))
    if page:
        show(write_page([each.path for each in chosen], output), shown)


def _words(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def runs_table(entries: Sequence[Entry], folder: Path) -> Table:
    """A line for each run.

    Args:
        entries: in order.
        folder: paths are shown from there.
    """
    from fedprompt.report.live import percent

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("run", "status", "method", "data", "partition"):
        table.add_column(head, overflow="fold")
    for head in ("seed", "rounds", "test", "date"):
        table.add_column(head, justify="right", no_wrap=True)
    for each in entries:
        own = os.path.relpath(each.path, folder)
        others = f" +{len(each.methods) - 1}" if len(each.methods) > 1 else ""
        cells = (
            *(own, each.status, each.method + others, each.data, each.partition),
            "-" if each.seed is None else str(each.seed),
            f"{each.done}/{'-' if each.rounds is None else each.rounds}",
            percent(each.accuracy),
            each.date[:16].replace("T", " "),
        )
        table.add_row(*map(Text, cells))
    return table


def write_page(run_dirs: Sequence[Path], output: Path | None) -> Path:
    """The page of some runs: a single one's own, or one in a folder that belongs to no run.

    Args:
        run_dirs: of the runs.
        output: the folder, if one was named.

    Raises:
        ConfigError: the folder is that of a run or a sweep.
    """
    from fedprompt.report.page import make_html, make_report

    if output is None and len(run_dirs) == 1:
        return make_html(run_dirs[0])
    return make_report(run_dirs, new_page(output))


def new_page(output: Path | None) -> Path:
    """Where a page goes that is none of a run's own.

    Raises:
        ConfigError: the folder is that of a run or a sweep, or a file.
    """
    from fedprompt.runs.directory import RunDirectory

    if output is None:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        output = Path("runs") / f"report-{now}"
    if RunDirectory(output).is_run() or (output / "sweep.yaml").is_file():
        raise ConfigError(
            f"--output {output}: expected a folder of its own for the page, got that of a run or a "
            "sweep, which has a page already; choose another"
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output}: expected a folder, got a file; choose another")
    return output / "report.html"


def _sweep_page(folder: Path, output: Path | None) -> Path:
    """Print the table of a sweep and write its page."""
    from fedprompt.sweep.directory import SweepDirectory
    from fedprompt.sweep.page import make_sweep_page
    from fedprompt.sweep.table import render_table

    directory, sweep = SweepDirectory.open(folder)
    table = directory.write_table(sweep, sweep.trials())
    Console().print(render_table(table))
    return make_sweep_page(directory, sweep, table, None if output is None else new_page(output))


def show(page: Path, shown: bool) -> None:
    """Say where a page is, and show it if that was asked for."""
    click.echo(f"report: {page}")
    if shown and click.launch(page.resolve().as_uri()) != 0:
        click.echo("no browser was found; open the file by hand", err=True)
