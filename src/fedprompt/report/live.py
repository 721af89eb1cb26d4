"""What the terminal shows while rounds are running: a live table, or plain lines in a pipe.

A *phase* is one method's run; the quickstart has several. On a terminal the picture is redrawn in
place; in a pipe, a file or a dumb terminal every round is one aligned line without control codes.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fedprompt.core.types import RoundReport

ROWS = 8
COLUMNS = (("round", 9), ("accuracy", 9), ("loss", 8), ("prompts", 8), ("seconds", 8), ("left", 8))


@dataclasses.dataclass(frozen=True)
class _Row:
    phase: str
    cells: tuple[str, ...]


class RoundDisplay:
    """Context manager that shows the progress of one or several phases.

    Args:
        total_rounds: rounds of all phases together, as far as known; a phase beyond extends it.
        title: what is running, in a few words.
        console: where to write; standard output by default.
        quiet: show nothing.
    """

    def __init__(
        self, total_rounds: int, title: str, console: Console | None = None, quiet: bool = False
    ) -> None:
        self._console = console or Console()
        self._title = title
        self._quiet = quiet
        self._known_total = total_rounds
        self._phase = ""
        self._phase_rounds = 0
        self._phase_done = 0
        self._skipped = 0
        self._finished = 0
        self._started_rounds = 0
        self._seconds: list[float] = []
        self._rows: collections.deque[_Row] = collections.deque(maxlen=ROWS)
        self._started = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> RoundDisplay:
        self._started = time.monotonic()
        if self._quiet:
            return self
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console, get_renderable=self.picture, refresh_per_second=4
            )
            self._live.start()
        else:
            self._line(self._title)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def start_phase(self, name: str, total_rounds: int, finished: int = 0) -> None:
        """Start a phase.

        Args:
            name: what it is called on the screen.
            total_rounds: its number of rounds.
            finished: rounds that were done before, by the run that is being resumed.
        """
        self._phase, self._phase_rounds, self._phase_done = name, total_rounds, finished
        self._skipped += finished
        self._started_rounds += total_rounds
        if self._live is not None:
            self._live.refresh()
        elif not self._quiet:
            self._line(f"{name}: {total_rounds} round{'s' if total_rounds != 1 else ''}")
            self._line("".join(f"{head:>{width}}" for head, width in COLUMNS))

    def update(self, report: RoundReport) -> None:
        """Show a finished round; round 0, the evaluation before training, is not counted."""
        if report.round > 0:
            self._phase_done = report.round
            self._finished += 1
            self._seconds.append(report.wall_seconds)
        cells = (
            f"{report.round}/{self._phase_rounds}",
            percent(report.accuracy),
            number(report.loss),
            str(report.num_prompts),
            f"{report.wall_seconds:.1f}",
            clock(self.seconds_left()),
        )
        self._rows.append(_Row(self._phase, cells))
        if self._live is not None:
            self._live.refresh()
        elif not self._quiet:
            widths = (width for _, width in COLUMNS)
            self._line(
                "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            )

    def message(self, text: str) -> None:
        """Show one line of text, above the table if there is one."""
        if not self._quiet:
            self._line(text)

    def seconds_left(self) -> float:
        """Mean duration of the finished rounds times the remaining rounds; NaN before any."""
        if not self._seconds:
            return math.nan
        remaining = self._total() - self._skipped - self._finished
        return max(remaining, 0) * sum(self._seconds) / len(self._seconds)

    def _total(self) -> int:
        return max(self._known_total, self._started_rounds)

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def picture(self) -> RenderableType:
        """What the terminal shows now: a progress bar above the latest rounds."""
        total = max(self._total(), 1)
        done = min(self._skipped + self._finished, total)
        elapsed = time.monotonic() - self._started
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"{self._phase} {self._phase_done}/{self._phase_rounds}" if self._phase else "…"),
            ProgressBar(total=total, completed=done, width=28),
            Text(f"{100 * done / total:3.0f} %", style="bold"),
            Text(f"elapsed {clock(elapsed)}", style="dim"),
            Text(f"left {clock(self.seconds_left())}", style="dim"),
        )
        return Group(Text(self._title, style="bold"), head, self._table())

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
        table.add_column("method", min_width=6)
        for name, width in COLUMNS[:-1]:
            table.add_column(name, justify="right", min_width=width - 2)
        newest = len(self._rows) - 1
        for index, row in enumerate(self._rows):
            style = "bold" if index == newest else "dim"
            table.add_row(*(Text(cell) for cell in (row.phase, *row.cells[:-1])), style=style)
        return table


def percent(fraction: float | None) -> str:
    """A fraction as text: one digit after the point, `-` for NaN and None.

    >>> percent(0.9432), percent(float("nan"))
    ('94.3 %', '-')
    """
    return "-" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.1f} %"


def number(value: float | None) -> str:
    """Three digits after the point, `-` for NaN and None.

    >>> number(0.12345), number(None)
    ('0.123', '-')
    """
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, or hours when there are some.

    >>> clock(75), clock(3723), clock(float("nan"))
    ('1:15', '1:02:03', '-')
    """
    if math.isnan(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
