"""How the figures look: colours, axes and lines that all of them share."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fedprompt.runs.summary import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DPI = 140
MOST_DASHED = 4  # runs in one plot before their validation lines are left out
INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e7eb"
# Okabe and Ito, "Color Universal Design" (2008), without yellow, too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
PHASE_COLOURS = {"train": "#0072B2", "aggregate": "#D55E00", "evaluate": "#8CC5E3"}
FATE_COLOURS = {"kept": "#0072B2", "born": "#009E73", "pruned": "#D55E00", "merged": "#000000"}


def style_rounds(axes: Axes, rounds: Sequence[int]) -> None:
    """A panel over rounds, wide enough for bars at both ends."""
    from matplotlib.ticker import MaxNLocator

    style_axes(axes)
    axes.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)
    axes.set_xlabel("round", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def canvas(title: str, subtitle: str) -> tuple[Figure, Axes]:
    """An empty figure with its headings, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.4), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=24)
    axes.annotate(
        subtitle,
        (0, 1),
        (0, 9),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=9,
        color=MUTED,
    )
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Thin grey axes without a frame."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, length=0, labelsize=8.5)
    axes.tick_params(axis="x", length=3)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.label.set_color(INK)


def back_to_front(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    """The runs with their indices, the first one last so that it is drawn on top."""
    return list(enumerate(runs))[::-1]


def plot_line(axes: Axes, rounds: Sequence[float], values: Sequence[float], index: int) -> None:
    """The line of run `index`; the first is the thickest, markers distinguish repeated colours.

    Args:
        axes: to draw into.
        rounds: (R,) round numbers, or hours.
        values: (R,) one value for each.
        index: which run it is, from 0; decides colour, width and marker.
    """
    cycle, place = divmod(index, len(COLOURS))
    axes.plot(
        rounds,
        values,
        "-" + "os^D"[cycle % 4],
        color=COLOURS[place],
        linewidth=2.4 if index == 0 else 1.5,
        markersize=4.0 if len(rounds) <= 40 else 0.0,
        markeredgecolor="white",
        markeredgewidth=0.6,
        clip_on=False,
        zorder=3,
    )


def finish_rounds(
    axes: Axes, runs: Sequence[Run], labels: Sequence[tuple[float, str, str]]
) -> None:
    """The axis of rounds, and each line's name at its end instead of a legend far away.

    Args:
        axes: with all lines drawn.
        runs: whose rounds they are.
        labels: of each line: its last value, its name, its colour.
    """
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    rounds = [record["round"] for run in runs for record in run.records]
    axes.set_xlim(min(rounds), max(max(rounds), min(rounds) + 1))
    axes.margins(x=0)
    low, high = axes.get_ylim()
    ordered = sorted(labels)
    heights = spread([(value - low) / (high - low) for value, _, _ in ordered], gap=0.062)
    for (_, text, colour), y in zip(ordered, heights, strict=True):
        axes.annotate(
            shorten(text, 42),
            (1.0, y),
            (8, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            fontsize=9,
            fontweight="bold",
            va="center",
        )


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Ascending positions moved apart to a distance of at least `gap`, groups about their means.

    >>> spread([0.5, 0.5, 0.9], gap=0.25)
    [0.375, 0.625, 0.9]
    """
    groups: list[tuple[float, list[float]]] = []  # (lowest position, members)
    for position in positions:
        members = [position]
        start = position
        while groups and groups[-1][0] + len(groups[-1][1]) * gap > start:
            members = groups.pop()[1] + members
            start = sum(members) / len(members) - gap * (len(members) - 1) / 2
        groups.append((start, members))
    return [start + gap * index for start, members in groups for index in range(len(members))]


def index_ticks(axes: Axes, axis: str, names: Sequence[str], limit: int) -> None:
    """Names in the middle of the cells; at most about `limit` of them.

    Args:
        axes: with cells of width 1.
        axis: `x` or `y`.
        names: one for each cell.
        limit: about how many names there is room for.
    """
    step = math.ceil(len(names) / limit)
    step = next(nice for nice in (1, 2, 5, 10, 20, 50, 100, 200, 500, step) if nice >= step)
    positions = range(0, len(names), step)
    set_ticks = axes.set_xticks if axis == "x" else axes.set_yticks
    set_ticks([index + 0.5 for index in positions], [names[index] for index in positions])


def in_percent(values: Iterable[float]) -> list[float]:
    """Fractions as percentages."""
    return [100 * value for value in values]


def shorten(text: str, length: int) -> str:
    """At most `length` characters, with dollar signs that start no formula."""
    # A dollar sign would start a formula.
    text = text.replace("$", r"\$")
    return text if len(text) <= length else text[: length - 1] + "…"


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)  # becomes the figure's canvas
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
