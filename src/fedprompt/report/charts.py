"""The figures of a page: what is drawn where, in per cent of a figure's width and height.

The templates draw it as SVG that stretches with the page, below text that does not. Three kinds:
`XY` (lines, dots and stacked bars over a number), `Rows` (a line for each name) and `Matrix`.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Curve = tuple[Sequence[float], Sequence[float]]
"""Places and values."""
SHADES = (31, 132, 196)
"""The colour of cells; how opaque it is says their value, on light and dark pages alike."""
FEW = 60
"""Points of a line that has dots."""
MOST_BANDS = 4
"""In a figure; of more, the intervals are said under the pointer alone."""
MOST_LABELS = 12
"""Along an axis of names on a phone."""


@dataclasses.dataclass(frozen=True)
class Series:
    """What one entry of the legend switches on and off, or a part of it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    """Where the interval around each value begins, or a bar; empty without."""
    high: Sequence[float] = ()
    kind: str = "line"
    """line, dashed, dots, rings or bars"""
    colour: int = 0
    group: int | None = None
    """Of the legend; by default the place in the list. A group's first series names it."""
    whiskers: bool = False
    """Whether intervals are strokes at the values, side by side, instead of a band."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A series in per cent of the plot."""

    name: str
    group: int
    colour: int
    kind: str
    path: str
    spots: str
    """A dot at each point of a line that has few."""
    band: str
    whiskers: str
    points: str
    """JSON: `[x %, y %, place, value]` of each point, the latter two as text."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of a legend."""

    name: str
    group: int
    colour: int
    value: str = ""


@dataclasses.dataclass(frozen=True)
class XY:
    """Values over a number."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    shapes: list[Shape]
    legend: list[Entry]
    reading: str = ""
    shade: tuple[float, float, str] | None = None
    """Start and end of a shaded part in per cent of the width, and what it is."""
    template: str = "xy"
    wide: bool = False
    """Whether the figure has a row of the page to itself."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """A dot at `left`, or a bar from there, in per cent of a row."""

    group: int
    colour: int
    left: float
    width: float | None
    tip: str


@dataclasses.dataclass(frozen=True)
class Rows:
    """A row for each name, with a dot or a part of a bar for each entry of the legend."""

    title: str
    rows: list[tuple[str, list[Mark], str]]
    """Name, marks, and the value that is written at the end."""
    legend: list[Entry]
    ticks: list[tuple[float, str]]
    reading: str = ""
    template: str = "rows"
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Cells in rows and columns."""

    title: str
    row_label: str
    column_label: str
    rows: list[tuple[float, str]]
    """Place of the middle in per cent, and name; not every row has one."""
    columns: list[tuple[float, str, bool]]
    """The same, and whether a narrow page has room for it."""
    picture: str
    """PNG as base64, a pixel for each cell."""
    texts: list[tuple[float, float, str, bool]]
    """Place, text, and whether the cell is dark."""
    room: str
    """How wide the page must be for the texts: few, some, many."""
    height: float
    """In lines of text."""
    names: float
    """Width of the names of the rows, if there is room for them."""
    tips: str
    """JSON: the names of `rows` and `columns`, and what is said of each cell."""
    reading: str = ""
    template: str = "matrix"
    wide: bool = False
    short: bool = False
    """Whether the names of the columns are short enough to stand side by side."""


Chart = XY | Rows | Matrix


def share_text(value: float) -> str:
    """A share as the page shows it."""
    return f"{100 * value:.1f} %"


def plain_number(value: float) -> str:
    """Four digits.

    >>> plain_number(12345.6), plain_number(0.5), plain_number(3.0)
    ('12,346', '0.5', '3')
    """
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def xy(
    title: str,
    labels: tuple[str, str],
    series: Sequence[Series],
    *,
    text: Callable[[float], str] = plain_number,
    log: bool = False,
    names: Sequence[str] = (),
    whole: bool = True,
    ticks: Sequence[float] = (),
    bottom: float | None = None,
    reading: str = "",
    shade: tuple[float, float, str] | None = None,
) -> XY | None:
    """A figure of lines, dots and bars; None if there is no value.

    Args:
        title: of the figure.
        labels: of the axes.
        series: in the order of the legend; values that are not finite are left out.
        text: how a value is written.
        log: whether places are on a logarithmic scale; they are positive then.
        names: of the places 0, 1, ..., where these are no numbers.
        whole: whether places are whole numbers.
        ticks: places that are labelled, if they are not to be chosen here.
        bottom: the least value of the axis, if it is to be shown.
        reading: how to read the figure.
        shade: start and end of a part that is marked, and what it is.
    """
    known = [_finite(each, place) for place, each in enumerate(series)]
    known = [each for each in known if len(each.y)]
    xs = [x for each in known for x in each.x]
    ys = [y for each in known for y in (*each.y, *each.low, *each.high)]
    if not xs:
        return None
    low, high = min(ys), max(ys)
    low = low if bottom is None else min(bottom, low)
    if text is share_text:
        low, high = max(low, 0.0), min(high, 1.0)
    y_ticks = _ticks(low, high, 5)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    scale = math.log10 if log else float
    left, right = scale(min(xs)), scale(max(xs))
    bars = any(each.kind == "bars" for each in known)
    margin = 0.6 if bars else 0.3 if names else 0.02 * (right - left) or 0.5
    left, right = left - margin, right + margin

    def across(x: float) -> float:
        return 100 * (scale(x) - left) / (right - left)

    def down(y: float) -> float:
        return 100 - 100 * (y - low) / (high - low)

    shapes = [_shape(each, across, down, text, names) for each in known]
    if sum(bool(shape.band) for shape in shapes) > MOST_BANDS:
        shapes = [dataclasses.replace(shape, band="") for shape in shapes]
    legend: dict[int, Entry] = {}
    for shape, each in zip(shapes, known, strict=True):
        last = text(each.y[-1]) if each.kind == "line" and not each.whiskers else ""
        legend.setdefault(shape.group, Entry(each.name, shape.group, shape.colour, last))
    return XY(
        title,
        *labels,
        [
            (across(x), label)
            for x, label in (
                [(x, plain_number(x)) for x in ticks] or _places(xs, log, names, whole)
            )
        ],
        [(down(y), f"{100 * y:g}" if text is share_text else text(y)) for y in y_ticks],
        shapes,
        list(legend.values()),
        reading,
        None if shade is None else (max(across(shade[0]), 0.0), across(shade[1]), shade[2]),
    )


def _finite(series: Series, place: int) -> Series:
    """The series without values that are not finite, and with its group."""
    good = [i for i, y in enumerate(series.y) if math.isfinite(y) and math.isfinite(series.x[i])]

    def kept(values: Sequence[float]) -> list[float]:
        return [float(values[i]) for i in good] if len(values) else []

    return dataclasses.replace(
        series,
        x=kept(series.x),
        y=kept(series.y),
        low=kept(series.low),
        high=kept(series.high),
        group=place if series.group is None else series.group,
    )


def _shape(
    series: Series,
    across: Callable[[float], float],
    down: Callable[[float], float],
    text: Callable[[float], str],
    names: Sequence[str],
) -> Shape:
    places = [(across(x), down(y)) for x, y in zip(series.x, series.y, strict=True)]
    band = spots = whiskers = ""
    if series.kind == "bars":
        half = 0.4 * abs(across(1.0) - across(0.0))
        feet = [down(each) for each in series.low]
        path = "".join(
            f"M{x - half:.2f} {foot:.2f}V{y:.2f}H{x + half:.2f}V{foot:.2f}Z"
            for (x, y), foot in zip(places, feet, strict=True)
        )
        values = [top - foot for top, foot in zip(series.y, series.low, strict=True)]
    else:
        start = "M" if series.kind in ("line", "dashed") else ""
        path = start + "L".join(f"{x:.2f} {y:.2f}" for x, y in places) if start else ""
        spots = "".join(f"M{x:.2f} {y:.2f}h0" for x, y in places)
        if not start:
            path, spots = spots, ""
        elif len(places) > FEW or series.kind == "dashed":
            spots = ""
        values = list(series.y)
        if len(series.low) and series.whiskers:
            aside = 0.7 * (series.colour % 7 - 3)
            ends = zip(places, series.low, series.high, strict=True)
            strokes = [f"M{x + aside:.2f} {down(a):.2f}V{down(b):.2f}" for (x, _), a, b in ends]
            whiskers = "".join(strokes)
        elif len(series.low) and start:
            there = [
                f"{x:.2f} {down(y):.2f}" for (x, _), y in zip(places, series.high, strict=True)
            ]
            back = [f"{x:.2f} {down(y):.2f}" for (x, _), y in zip(places, series.low, strict=True)]
            band = f"M{'L'.join(there + back[::-1])}Z"
    shown = [
        (f"{text(low)} to {text(high)}" if series.kind != "bars" else "")
        for low, high in zip(series.low, series.high, strict=False)
    ]
    points = [
        [
            *(round(x, 2), round(y, 2), names[round(place)] if names else plain_number(place)),
            text(value) + (f" ({shown[i]})" if i < len(shown) and shown[i] else ""),
        ]
        for i, ((x, y), place, value) in enumerate(zip(places, series.x, values, strict=True))
    ]
    return Shape(
        series.name,
        series.group or 0,
        series.colour,
        series.kind,
        path,
        spots,
        band,
        whiskers,
        json.dumps(points),
    )


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    from matplotlib.ticker import MaxNLocator

    if high - low < 1e-9:
        low, high = low - max(abs(low) / 10, 1e-3), high + max(abs(high) / 10, 1e-3)
    values = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(round(value, 12)) for value in values]


def _places(
    xs: Sequence[float], log: bool, names: Sequence[str], whole: bool
) -> list[tuple[float, str]]:
    """Ticks of the horizontal axis."""
    if names:
        step = math.ceil(len(names) / MOST_LABELS)
        return [(float(i), name) for i, name in enumerate(names) if i % step == 0]
    low, high = min(xs), max(xs)
    if log:
        from matplotlib.ticker import LogLocator

        decades = math.log10(high / low) if high > low else 0.0
        subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0)
        found = [float(x) for x in LogLocator(subs=subs).tick_values(low, high)]
    elif low == high:
        found = [low]
    else:
        from matplotlib.ticker import MaxNLocator

        found = list(MaxNLocator(nbins=6, integer=whole).tick_values(low, high))
    slack = 1e-9 * max(abs(low), abs(high))
    inside = [x for x in found if low - slack <= x <= high + slack]
    return [(x, plain_number(x)) for x in inside or sorted({low, high})]


def dots(
    title: str,
    names: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    *,
    reading: str = "",
) -> Rows | None:
    """Shares by name, a dot for each series; None if there are no values.

    Args:
        title: of the figure.
        names: of the rows.
        series: name, and a share for each row, NaN where it is unknown.
        reading: how to read the figure.
    """
    if not any(math.isfinite(value) for _, values in series for value in values):
        return None
    rows = []
    for place, name in enumerate(names):
        known = [
            (group, who, values[place])
            for group, (who, values) in enumerate(series)
            if place < len(values) and math.isfinite(values[place])
        ]
        marks = [
            Mark(group, group, 100 * value, None, f"{name}: {who} {share_text(value)}")
            for group, who, value in known[::-1]  # the first on top
        ]
        rows.append((name, marks, share_text(known[0][2]) if known else "-"))
    legend = [Entry(name, group, group) for group, (name, _) in enumerate(series)]
    return Rows(title, rows, legend, [(x, f"{x}") for x in (0, 25, 50, 75, 100)], reading)


def stacked(
    title: str,
    names: Sequence[str],
    parts: Sequence[tuple[str, Sequence[float]]],
    *,
    text: Callable[[float], str],
    reading: str = "",
) -> Rows | None:
    """Bars that are made of parts; None if all are empty.

    Args:
        title: of the figure.
        names: of the bars.
        parts: name, and an amount for each bar.
        text: how an amount is written.
        reading: how to read the figure.
    """
    totals = [sum(amounts[i] for _, amounts in parts) for i in range(len(names))]
    largest = max(totals, default=0.0)
    if not largest:
        return None
    top = _ticks(0.0, largest, 5)[-1]
    rows = []
    for i, name in enumerate(names):
        marks, start = [], 0.0
        for group, (part, amounts) in enumerate(parts):
            width = 100 * amounts[i] / top
            tip = f"{name}: {part} {text(amounts[i])}"
            if width:
                marks.append(Mark(group, group, start, width, tip))
            start += width
        rows.append((name, marks, text(totals[i])))
    legend = [Entry(part, group, group) for group, (part, _) in enumerate(parts)]
    ticks = [(100 * x / top, plain_number(x)) for x in _ticks(0.0, largest, 5)]
    return Rows(title, rows, legend, ticks, reading)


def matrix(
    title: str,
    labels: tuple[str, str],
    names: tuple[Sequence[str], Sequence[str]],
    values: NDArray[np.float64],
    tip: Callable[[int, int], str],
    *,
    texts: bool = True,
    gamma: float = 1.0,
    floor: float = 0.0,
    reading: str = "",
) -> Matrix:
    """Cells by value.

    Args:
        title: of the figure.
        labels: of rows and columns.
        names: of rows and columns.
        values: (rows, columns); NaN is an empty cell.
        tip: what is said of a cell, by row and column.
        texts: whether that is also written into the cells, if there is room.
        gamma: below 1, small values are easier to see.
        floor: the value of an empty cell.
        reading: how to read the figure.
    """
    rows, columns = values.shape
    largest = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    span = max(largest - floor, 1e-12)
    opaque = np.clip(np.nan_to_num((values - floor) / span, nan=0.0), 0.0, 1.0) ** gamma
    said = [[tip(r, c) for c in range(columns)] for r in range(rows)]
    written = [
        (100 * (c + 0.5) / columns, 100 * (r + 0.5) / rows, said[r][c], bool(opaque[r, c] > 0.55))
        for r in range(rows)
        for c in range(columns)
        if texts and columns <= 25 and opaque[r, c] > 0
    ]
    step = math.ceil(rows / 45)
    narrow, wide = math.ceil(columns / MOST_LABELS), math.ceil(columns / 45)
    return Matrix(
        title,
        *labels,
        [(100 * (r + 0.5) / rows, name) for r, name in enumerate(names[0]) if r % step == 0],
        [
            (100 * (c + 0.5) / columns, name, c % narrow == 0)
            for c, name in enumerate(names[1])
            if c % narrow == 0 or c % wide == 0
        ],
        _pixels(opaque),
        written,
        "few" if columns <= 6 else "some" if columns <= 12 else "many",
        min(rows * (1.2 if rows > 12 else 1.9), 45 * 1.2),
        0.5 * max(len(name) for name in names[0]) + 0.5,
        json.dumps({"rows": list(names[0]), "columns": list(names[1]), "cells": said}),
        reading,
        wide=columns > 12,
        short=max((len(name) for name in names[1]), default=0) <= (5 if columns <= 12 else 3),
    )


def _pixels(opaque: NDArray[np.float64]) -> str:
    """A PNG with a pixel for each cell, as base64."""
    from PIL import Image

    cells = np.empty((*opaque.shape, 4), np.uint8)
    cells[..., :3] = SHADES
    cells[..., 3] = np.round(255 * opaque)
    buffer = io.BytesIO()
    Image.fromarray(cells).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
