"""What a sweep found: one row for each cell, over its seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from fedprompt.core.files import Json
from fedprompt.core.intervals import share_interval, t_interval
from fedprompt.report.live import percent
from fedprompt.sweep.space import plain_text

MEASURES = ("accuracy", "best_accuracy", "prompts")
"""What the table says of a cell; the first is the one that is drawn."""


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and half width of the 95 % t-interval; one value has no width.

    >>> interval([1.0, 2.0, 3.0])
    {'mean': 2.0, 'half_width': 2.484138}
    >>> interval([]), interval([0.5])
    ({'mean': None, 'half_width': None}, {'mean': 0.5, 'half_width': None})
    """
    if not values:
        return {"mean": None, "half_width": None}
    mean, half = t_interval(values)
    return {"mean": round(mean, 6), "half_width": None if half is None else round(half, 6)}


def table_csv(table: Json) -> str:
    """One row a cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measures = [f"{name}_{part}" for name in MEASURES for part in ("mean", "half_width")]
    writer.writerow([*table["keys"], "seeds", "stopped", "missing", *measures, "run_dirs"])
    for cell in table["cells"]:
        numbers = [cell[name][part] for name in MEASURES for part in ("mean", "half_width")]
        writer.writerow(
            [
                *(cell["values"][key] for key in table["keys"]),
                len(cell["seeds"]),
                cell["stopped"],
                cell["missing"],
                *("" if number is None else number for number in numbers),
                " ".join(cell["run_dirs"]),
            ]
        )
    return text.getvalue()


def render_table(table: Json) -> Table:
    """The cells as a table for the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for key in table["keys"]:
        shown.add_column(key.replace(".", ".\n", 1), overflow="fold")
    for name in ("seeds", "accuracy", "at best val.", "prompts"):
        shown.add_column(name, justify="right", no_wrap=True)
    for cell in table["cells"]:
        prompts = cell["prompts"]["mean"]
        shown.add_row(
            *(plain_text(cell["values"][key]) for key in table["keys"]),
            str(len(cell["seeds"])) + (f" + {cell['stopped']} stopped" if cell["stopped"] else ""),
            _with_interval(cell["accuracy"]),
            _with_interval(cell["best_accuracy"]),
            "-" if prompts is None else f"{prompts:.1f}",
        )
    return shown


def _with_interval(measure: Mapping[str, float | None]) -> str:
    """Mean and interval, which stays within 0 and 100 %.

    >>> _with_interval({"mean": 0.9, "half_width": 0.3}), _with_interval({"mean": None})
    ('90.0 [24.3, 99.6] %', '-')
    """
    if measure["mean"] is None:
        return "-"
    ends = share_interval(measure["mean"], measure["half_width"])
    suffix = "" if ends is None else f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
    return percent(measure["mean"]).removesuffix(" %") + suffix + " %"
