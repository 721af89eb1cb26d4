"""What runs reached, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedprompt.core.files import Json
from fedprompt.report.live import percent
from fedprompt.runs.summary import comparison_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def summary_cells(row: Json) -> tuple[str, ...]:
    """A row of `comparison_table` as the table shows it."""
    best = in_percent(row["best_accuracy"])
    if row["best_round"] is not None:
        best += f" ({row['best_round']})"
    return (
        row["name"],
        in_percent(row["accuracy"]),
        in_percent(row["alone_accuracy"]),
        best,
        "-" if row["prompts"] is None else str(row["prompts"]),
        short_number(row["mb_up"]),
        short_number(row["mb_down"]),
        f"{row['seconds']:.1f}",
        (row["state_sha256"] or "-")[:8],
    )


def in_percent(share: float | None) -> str:
    """`percent` without the sign, for a column that says what its numbers are."""
    return percent(share).removesuffix(" %")


def short_number(value: float) -> str:
    """Two digits after the point below ten, fewer above."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def render_summary(rows: Sequence[Json]) -> Table:
    """The rows of `comparison_table` for the terminal, which fit 80 columns for names of up to 12
    letters.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("method", overflow="fold", min_width=6)
    for head in (
        *("test\n%", "image\nalone", "at best\nvalid. %"),
        *("prompts\nkept", "MB\nup", "MB\ndown"),
        *("seconds", "state\nSHA-256"),
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        style = "bold" if index == 0 else ""
        table.add_row(*(Text(cell) for cell in summary_cells(row)), style=style)
    return table


def render_domains(rows: Sequence[Json]) -> Table | None:
    """Test accuracy of each domain for the terminal, a line for each method; None if there is one.

    Args:
        rows: of `comparison_table`.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [row for row in rows if row["domain_accuracy"]]
    domains = list(dict.fromkeys(name for row in rows for name in row["domain_accuracy"]))
    if not domains:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("test % by domain", overflow="fold", min_width=6)
    for name in domains:
        table.add_column(Text(name), justify="right", overflow="fold")
    for row in rows:
        shares = (in_percent(row["domain_accuracy"].get(name)) for name in domains)
        table.add_row(Text(row["name"]), *shares)
    return table


def print_summary(console: Console, *run_dirs: Path) -> None:
    """Print `render_summary` and, where there are several domains, `render_domains`.

    Raises:
        ConfigError: a folder is no run directory.
    """
    rows = comparison_table(run_dirs)
    console.print(render_summary(rows))
    by_domain = render_domains(rows)
    if by_domain is not None:
        console.print(by_domain)
