"""Draw docs/images/terminal.svg, the picture of the README, from the records of a real run.

python docs/terminal.py RUN_DIR
"""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from rich.console import Console

from fedprompt.core.types import RoundReport
from fedprompt.report.live import RoundDisplay
from fedprompt.report.table import render_summary
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.summary import comparison_table


def main(run_dir: Path) -> None:
    """Write the picture."""
    path = Path(__file__).parent / "images" / "terminal.svg"
    path.write_text(draw(run_dir), encoding="utf-8")


def draw(run_dir: Path) -> str:
    """The recorded rounds shown once more: the last picture and the summary, as SVG."""
    run = RunDirectory.open(run_dir)
    # In the order in which they were run.
    comparisons = sorted(run.comparisons(), key=lambda each: each.read_manifest()["date"])
    runs = [(run.read_summary()["method"], run), *((each.path.name, each) for each in comparisons)]
    total = sum(len(each.read_rounds()) for _, each in runs)
    screen = Console(force_terminal=True, width=86, file=io.StringIO())
    display = RoundDisplay(total, "fedprompt quickstart", screen)
    passed = 0.0
    # The display's clock shows the time that the recorded rounds took.
    clock = SimpleNamespace(monotonic=lambda: passed)
    with mock.patch("fedprompt.report.live.time", clock), display:
        for name, each in runs:
            display.start_phase(name, len(each.read_rounds()))
            for record in each.read_rounds():
                report = report_of(record)
                passed += report.wall_seconds
                display.update(report)
        picture = display.picture()
    paper = Console(record=True, width=86, file=io.StringIO())
    paper.print("$ make run", highlight=False)
    paper.print(picture)
    paper.print(render_summary(comparison_table([run_dir])))
    svg = paper.export_svg(title="fedprompt")
    # The fonts would be fetched from the network; the viewer's own will do.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def report_of(record: dict[str, Any]) -> RoundReport:
    """A report from its line in rounds.jsonl."""
    numbers = {key: math.nan if value is None else value for key, value in record.items()}
    return RoundReport(**numbers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
