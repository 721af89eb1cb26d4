"""What is shown while a run is going: a live table, or plain lines in a pipe.

A *phase* is one method's run; the quickstart has several. On a terminal the picture is redrawn in
place, and so is it in a notebook; in a pipe, a file or a dumb terminal every round is one aligned
line without control codes. Before the first phase a *stage* says in words what is done.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import io
import math
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedprompt.core.words import counted

if TYPE_CHECKING:
    from fedprompt.core.types import RoundReport
    from fedprompt.runs.events import Event

ROWS = 8
OTHER_LINES = 8
"""Of the picture and below it: its head and the frame of its table, and some that are kept free."""
PLAIN_SECONDS = 30.0
"""Between two lines about one stage where nothing is redrawn."""
PAGE_WIDTH = 100
"""Characters of the picture in a notebook."""
PAGE = "<pre style='line-height: normal; white-space: pre; overflow-x: auto'>{code}</pre>"
COLUMNS = (("round", 9), ("accuracy", 9), ("loss", 8), ("prompts", 8), ("seconds", 8), ("left", 8))


@dataclasses.dataclass(frozen=True)
class _Row:
    phase: str
    cells: tuple[str, ...]


class RoundDisplay:
    """Context manager that shows the progress of one or several phases; it may be entered again.

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
        self._page: Any = None
        """In a notebook, what can be updated."""
        self._texts: list[str] = []
        """Messages; a notebook shows them above the table."""
        self._is_open = False
        self._stage = "reading the experiment"
        self._stage_count = (0, 0)
        self._stage_started = self._said = self._started

    def __enter__(self) -> RoundDisplay:
        if self._is_open or self._quiet:
            return self
        self._is_open = True
        self._started = time.monotonic()
        if self._console.is_jupyter:
            notebook: Any = importlib.import_module("IPython.display")
            self._page = notebook.display(notebook.HTML(self.page()), display_id=True)
            return self
        self._line(self._title)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console, get_renderable=self.picture, refresh_per_second=4
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._is_open:
            return
        if self._live is not None:
            self._live.transient = not self._phase  # nothing that is worth to be kept
            self._live.stop()
            self._live = None
        self._refresh()
        self._is_open = False

    def expect(self, total_rounds: int) -> None:
        """Say how many rounds all phases have together, once that is known."""
        self._known_total = total_rounds

    def show(self, event: Event) -> None:
        """Show an event of a run."""
        from fedprompt.runs.events import Note, PhaseStarted, Prepared, RoundFinished, Stage

        if isinstance(event, RoundFinished):
            self.update(event.report)
        elif isinstance(event, PhaseStarted):
            self.start_phase(event.name, event.rounds, event.finished)
        elif isinstance(event, Stage):
            self.stage(event.text, event.done, event.total)
        elif isinstance(event, (Prepared, Note)):
            self.message(event.text)

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """Say what is done before the rounds begin.

        Args:
            text: in a few words.
            done: images that are done.
            total: of so many; 0 where nothing is counted.
        """
        now = time.monotonic()
        is_new = text != self._stage
        if is_new:
            self._stage, self._stage_started = text, now
        self._stage_count = (done, total)
        if self._live is None and not self._console.is_jupyter and not self._quiet:
            if is_new or now - self._said >= PLAIN_SECONDS:
                self._said = now
                self._line(self.stage_text())
        elif is_new or now - self._said >= 0.25:
            self._said = now
            self._refresh()

    def stage_text(self) -> str:
        """The stage in words, with images a second and the time left where images are counted."""
        done, total = self._stage_count
        if not total:
            return self._stage
        seconds = time.monotonic() - self._stage_started
        text = f"{self._stage}: {done} of {total}"
        if not done or seconds <= 0:
            return text
        left = (total - done) * seconds / done
        return f"{text}, {done / seconds:.0f} images/s, {clock(left)} left"

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()
        elif self._page is not None:
            notebook: Any = importlib.import_module("IPython.display")
            self._page.update(notebook.HTML(self.page()))

    def page(self) -> str:
        """The picture and the messages as HTML."""
        console = Console(record=True, file=io.StringIO(), width=PAGE_WIDTH, force_jupyter=False)
        console.print(Text(self._title, style="bold"))
        for text in self._texts:
            console.print(Text(text))
        console.print(self.picture())
        return console.export_html(inline_styles=True, code_format=PAGE)

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
        if self._live is not None or self._page is not None:
            self._refresh()
        elif not self._quiet:
            self._line(f"{name}: {counted(total_rounds, 'round')}")
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
        if self._live is not None or self._page is not None:
            self._refresh()
        elif not self._quiet:
            widths = (width for _, width in COLUMNS)
            self._line(
                "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            )

    def message(self, text: str) -> None:
        """Show one line of text, above the table if there is one."""
        if self._page is not None:
            self._texts.append(text)
            self._refresh()
        elif not self._quiet:
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
        if not self._phase:
            return self._picture_of_stage()
        total = max(self._total(), 1)
        done = min(self._skipped + self._finished, total)
        elapsed = time.monotonic() - self._started
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"{self._phase} {self._phase_done}/{self._phase_rounds}"),
            ProgressBar(total=total, completed=done, width=28),
            Text(f"{100 * done / total:3.0f} %", style="bold"),
            Text(f"elapsed {clock(elapsed)}", style="dim"),
            Text(f"left {clock(self.seconds_left())}", style="dim"),
        )
        return Group(head, self._table())

    def _picture_of_stage(self) -> RenderableType:
        """What is done before the rounds begin, with a bar where images are counted."""
        done, total = self._stage_count
        head = Table.grid(padding=(0, 2))
        bar = [ProgressBar(total=total, completed=done, width=28)] if total else []
        elapsed = Text(f"elapsed {clock(time.monotonic() - self._started)}", style="dim")
        head.add_row(*bar, Text(self.stage_text()), elapsed)
        return head

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
        table.add_column("method", min_width=6)
        for name, width in COLUMNS[:-1]:
            table.add_column(name, justify="right", min_width=width - 2)
        # The bar is above the table: what does not fit on a low screen would push it out.
        room = ROWS if self._page is not None else self._console.height - OTHER_LINES
        rows = list(self._rows)[-max(1, min(ROWS, room)) :]
        newest = len(rows) - 1
        for index, row in enumerate(rows):
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
