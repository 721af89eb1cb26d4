"""The display tells the numbers of each round, in place on a terminal, line by line elsewhere."""

from __future__ import annotations

import io
import math
import sys
import types

import pytest
from rich.console import Console

from fedprompt.core.types import RoundReport
from fedprompt.report import live
from fedprompt.report.live import RoundDisplay
from fedprompt.runs.events import Note, PhaseStarted, RoundFinished, Stage


def make_report(
    round_index: int, wall_seconds: float, accuracy: float = 0.9432, loss: float = 0.1234
) -> RoundReport:
    phases = {"train": 1.0, "aggregate": 0.1, "evaluate": 0.2}
    figures = (accuracy, loss, accuracy, 0.3, 27, 100, 200)
    return RoundReport(round_index, *figures, phases, wall_seconds)


def make_console(terminal: bool, kind: str = "xterm-256color") -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    environment = {"TERM": kind}
    console = Console(file=file, force_terminal=terminal, width=100, _environ=environment)
    return console, file


def test_plain_lines_are_aligned_and_tell_the_numbers() -> None:
    console, file = make_console(terminal=False)
    with RoundDisplay(10, "quickstart [20 clients]", console) as display:
        display.start_phase("pfpt", 10)
        display.update(make_report(0, 0.5, math.nan, math.nan))
        display.update(make_report(1, 2.04))
        display.message("checkpoint [1] saved")
    title, phase, head, before, first, message = file.getvalue().splitlines()
    assert title == "quickstart [20 clients]"
    assert phase == "pfpt: 10 rounds"
    assert head.split() == ["round", "accuracy", "loss", "prompts", "seconds", "left"]
    assert before.split() == ["0/10", "-", "-", "27", "0.5", "-"]
    assert first.split() == ["1/10", "94.3", "%", "0.123", "27", "2.0", "0:18"]
    assert len(head) == len(before) == len(first)
    assert message == "checkpoint [1] saved"
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_shows_nothing(terminal: bool) -> None:
    console, file = make_console(terminal)
    with RoundDisplay(1, "run", console, quiet=True) as display:
        display.start_phase("pfpt", 1)
        display.update(make_report(1, 1.0))
        display.message("hello")
    assert file.getvalue() == ""


def test_dumb_terminal_gets_plain_lines() -> None:
    console, file = make_console(terminal=True, kind="dumb")
    with RoundDisplay(1, "run", console) as display:
        display.start_phase("pfpt", 1)
        display.update(make_report(1, 1.0))
    assert "94.3 %" in file.getvalue()
    assert "\x1b[?25l" not in file.getvalue()


def test_time_left_is_mean_times_remaining_over_all_phases() -> None:
    display = RoundDisplay(10, "run", quiet=True)
    display.start_phase("pfpt", 6)
    assert math.isnan(display.seconds_left())
    display.update(make_report(0, 100.0))  # the evaluation before training is no round
    assert math.isnan(display.seconds_left())
    for round_index, seconds in ((1, 1.0), (2, 3.0)):
        display.update(make_report(round_index, seconds))
    assert display.seconds_left() == 2.0 * 8
    display.start_phase("mean", 4)
    assert display.seconds_left() == 2.0 * 8
    display.start_phase("head", 5)  # was not announced: 15 rounds in all
    assert display.seconds_left() == 2.0 * 13


def test_resumed_phase_counts_its_finished_rounds() -> None:
    display = RoundDisplay(10, "run", quiet=True)
    display.start_phase("pfpt", 10, finished=6)
    display.update(make_report(7, 2.0))
    assert display.seconds_left() == 2.0 * 3
    for round_index in (8, 9, 10):
        display.update(make_report(round_index, 2.0))
    assert display.seconds_left() == 0.0


def test_terminal_shows_bar_percent_and_the_latest_rounds() -> None:
    console, file = make_console(terminal=True)
    with RoundDisplay(24, "digits", console) as display:
        display.start_phase("pfpt", 12)
        for round_index in range(1, 13):
            display.update(make_report(round_index, 1.0, accuracy=round_index / 100))
        display.message("half time")
        picture, _ = make_console(terminal=False)
        with picture.capture() as capture:
            picture.print(display.picture())
    text = capture.get()
    assert "pfpt 12/12" in text
    assert "50 %" in text
    assert "left 0:12" in text
    assert "elapsed 0:0" in text
    assert "4.0 %" not in text  # only the latest eight rounds
    for shown in ("5.0 %", "12.0 %", "12/12", "0.123"):
        assert shown in text
    assert "half time" in file.getvalue()
    assert "\x1b" in file.getvalue()


def test_terminal_is_restored_after_an_error() -> None:
    console, file = make_console(terminal=True)
    display = RoundDisplay(1, "run", console)

    def interrupted() -> None:
        with display:
            display.start_phase("pfpt", 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert file.getvalue().count(hide) == file.getvalue().count(show) == 1
    display.message("after")
    assert file.getvalue().endswith("after\n")


def test_markup_in_names_is_shown_as_it_is() -> None:
    console, file = make_console(terminal=False)
    with RoundDisplay(1, "[bold]run[/bold]", console) as display:
        display.start_phase("[red]x", 1)
        display.message("[/nonsense]")
    assert file.getvalue().splitlines()[0] == "[bold]run[/bold]"
    assert "[red]x: 1 round\n" in file.getvalue()
    assert "[/nonsense]" in file.getvalue()


def test_a_stage_says_how_fast_it_is_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 of 1024 images in 4 s: 64 a second, and 12 s for the rest."""
    console, file = make_console(terminal=False)
    now = 1000.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    with RoundDisplay(1, "run", console) as display:
        display.show(Stage("reading the data"))
        display.show(Stage("computing the prefix", 0, 1024))
        now += 4.0
        display.show(Stage("computing the prefix", 256, 1024))  # not a line for each chunk
        assert display.stage_text() == ("computing the prefix: 256 of 1024, 64 images/s, 0:12 left")
        now += 28.0
        display.show(Stage("computing the prefix", 512, 1024))
        display.show(RoundFinished(make_report(1, 1.0), "pfpt"))
    lines = file.getvalue().splitlines()
    assert lines[:4] == [
        *("run", "reading the data", "computing the prefix: 0 of 1024"),
        "computing the prefix: 512 of 1024, 16 images/s, 0:32 left",
    ]


def test_a_terminal_shows_the_stage_until_the_rounds_begin() -> None:
    console, file = make_console(terminal=True)
    with RoundDisplay(2, "fedprompt quickstart", console) as display:
        assert file.getvalue().startswith("fedprompt quickstart")  # before anything else
        with display:  # entered again by whoever goes on with it
            display.expect(4)
            display.stage("computing", 3, 4)
            picture, _ = make_console(terminal=False)
            with picture.capture() as capture:
                picture.print(display.picture())
            assert "computing: 3 of 4" in capture.get()
            display.start_phase("pfpt", 4)
            display.update(make_report(1, 2.0))
            assert display.seconds_left() == 2.0 * 3
    display.message("after")
    assert file.getvalue().endswith("after\n")


@pytest.mark.parametrize(("height", "rows"), [(24, 8), (12, 4), (6, 1)])
def test_the_bar_and_the_newest_row_fit_on_a_low_screen(height: int, rows: int) -> None:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=True, width=80, height=height, _environ={"TERM": "xterm"}
    )
    with RoundDisplay(20, "quickstart", console) as display:
        display.start_phase("pfpt", 20)
        for round_index in range(1, 13):
            display.update(make_report(round_index, 1.0))
        picture, _ = make_console(terminal=False)
        with picture.capture() as capture:
            picture.print(display.picture())
    lines = [line for line in capture.get().splitlines() if line.strip()]
    assert "pfpt 12/20" in lines[0]
    assert "12/20" in lines[-1]
    shown = [line for line in lines if "94.3" in line]
    assert len(shown) == rows
    if height > 6:
        assert len(capture.get().splitlines()) < height


def test_a_notebook_shows_one_picture_that_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[str] = []

    class Handle:
        def update(self, page: str) -> None:
            pages.append(page)

    def display(page: str, display_id: bool) -> Handle:
        assert display_id
        pages.append(page)
        return Handle()

    notebook = types.ModuleType("IPython.display")
    monkeypatch.setattr(notebook, "display", display, raising=False)
    monkeypatch.setattr(notebook, "HTML", str, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    with RoundDisplay(2, "fedprompt <quickstart>", Console(force_jupyter=True)) as shown:
        shown.show(Stage("reading the data"))
        shown.show(Note("a <note>", "pfpt"))
        shown.show(PhaseStarted("pfpt", 2, 0))
        shown.show(RoundFinished(make_report(1, 2.0), "pfpt"))
    assert "reading the experiment" in pages[0]
    assert "reading the data" in pages[1]
    for part in ("fedprompt &lt;quickstart&gt;", "a &lt;note&gt;", "pfpt 1/2", "94.3 %", "50 %"):
        assert part in pages[-1]
    assert len(pages) == 6  # the last one when it is left
