"""The pictures of a sweep: a heat map over two keys, and lines with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprompt.core.checks import is_number
from fedprompt.core.files import Json, atomic_write
from fedprompt.core.intervals import share_interval
from fedprompt.report.style import COLOURS, INK, MUTED
from fedprompt.report.style import canvas as _canvas
from fedprompt.report.style import png_bytes as _png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figures(table: Json, folder: Path) -> list[Path]:
    """Draw what the table allows: lines for one or two keys, a heat map for a grid of two.

    Args:
        table: from `sweep.make_table`.
        folder: where `heatmap.png` and `lines.png` go; a picture that does not apply is removed.
    """
    pictures: dict[str, Figure | None] = {
        "heatmap.png": heat_map(table),
        "lines.png": line_plot(table),
    }
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)
        else:
            atomic_write(folder / name, _png(figure))
            written.append(folder / name)
    return written


def measured(table: Json) -> dict[tuple[Any, ...], Json]:
    """The accuracy of each cell that has one, by its values in the order of the keys."""
    found = {}
    for cell in table["cells"]:
        if cell["accuracy"]["mean"] is not None:
            found[tuple(hashable(cell["values"][key]) for key in table["keys"])] = cell["accuracy"]
    return found


def heat_map(table: Json) -> Figure | None:
    """Mean accuracy over two keys, the interval below it; None if there are not two."""
    keys, cells = table["keys"], measured(table)
    if len(keys) != 2 or not cells:
        return None
    rows, columns = (ordered([values[axis] for values in cells]) for axis in (0, 1))
    if len(rows) * len(columns) > 4 * len(cells):  # random draws: hardly any cell is filled
        return None
    import numpy as np

    figure, axes = _canvas("Test accuracy at the last round", f"{table['name']}: {_about(table)}")
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, column), accuracy in cells.items():
        values[rows.index(row), columns.index(column)] = 100 * accuracy["mean"]
    axes.imshow(values, aspect="auto", cmap="Blues", origin="lower")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), accuracy in cells.items():
        place = (columns.index(column), rows.index(row))
        half = accuracy["half_width"]
        text = f"{100 * accuracy['mean']:.1f} %" + ("" if half is None else f"\n± {100 * half:.1f}")
        dark = 100 * accuracy["mean"] > middle
        axes.annotate(text, place, ha="center", va="center", color="white" if dark else INK)
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), [str(each) for each in columns])
    axes.set_yticks(range(len(rows)), [str(each) for each in rows])
    axes.set_xlabel(keys[1], color=INK)
    axes.set_ylabel(keys[0], color=INK)
    return figure


def line_plot(table: Json) -> Figure | None:
    """Mean accuracy over the last key, a line for each value of the one before; None if others."""
    keys, cells = table["keys"], measured(table)
    if len(keys) not in (1, 2) or not cells:
        return None
    figure, axes = _canvas("Test accuracy at the last round", f"{table['name']}: {_about(table)}")
    places = ordered([values[-1] for values in cells])
    numeric = all(is_number(each) for each in places)
    lines = ordered([values[:-1] for values in cells])
    for index, line in enumerate(lines):
        points = [
            (place if numeric else places.index(place), cells[key])
            for key, place in (((*line, place), place) for place in places)
            if key in cells
        ]
        # Side by side, so that their intervals can be distinguished.
        shift = 0.0 if numeric else 0.05 * (index - (len(lines) - 1) / 2)
        axes.errorbar(
            [place + shift for place, _ in points],
            [100 * accuracy["mean"] for _, accuracy in points],
            yerr=list(zip(*(arms(accuracy) for _, accuracy in points), strict=True)),
            color=COLOURS[index % len(COLOURS)],
            marker="os^D"[index // len(COLOURS) % 4],
            markersize=5,
            capsize=3,
            linewidth=1.6,
            label=f"{keys[0]}={line[0]}" if line else None,
        )
    if not numeric:
        axes.set_xticks(range(len(places)), [str(each) for each in places])
    if numeric and is_logarithmic(table, keys[-1], places):
        axes.set_xscale("log")
    axes.set_xlabel(keys[-1], color=INK)
    axes.set_ylabel("test accuracy (%)", color=INK)
    if len(keys) == 2:
        axes.legend(frameon=False, labelcolor=MUTED, fontsize=9)
    return figure


def arms(accuracy: Json) -> tuple[float, float]:
    """How far the interval of a mean reaches down and up in per cent, within 0 and 100 %."""
    ends = share_interval(accuracy["mean"], accuracy["half_width"])
    low, high = ends or (accuracy["mean"], accuracy["mean"])
    return 100 * (accuracy["mean"] - low), 100 * (high - accuracy["mean"])


def is_logarithmic(table: Json, key: str, places: Sequence[Any]) -> bool:
    """Whether the axis of a key is logarithmic: where it was drawn so, or values are far apart.

    Args:
        table: from `sweep.make_table`.
        key: of the space.
        places: the values that it takes.
    """
    if not all(is_number(each) and each > 0 for each in places):
        return False
    drawn = (table.get("kinds") or {}).get(key) == "loguniform"
    return drawn or (len(places) > 2 and max(places) >= 20 * min(places))


def _about(table: Json) -> str:
    counts = sorted({len(cell["seeds"]) for cell in table["cells"]})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean and 95 % interval over {seeds} seed{'s' if counts[-1] != 1 else ''}"


def hashable(value: Any) -> Any:
    """The value, or its text."""
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def ordered(values: Sequence[Any]) -> list[Any]:
    """Each value once, numbers by size, others in the order in which they appear."""
    unique = list(dict.fromkeys(values))
    flat = [part for each in unique for part in (each if isinstance(each, tuple) else (each,))]
    return sorted(unique) if all(map(is_number, flat)) else unique
