"""Figures of a page by hand: where things are drawn, in per cent of the plot."""

from __future__ import annotations

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from fedprompt.report.charts import Series, dots, matrix, share_text, stacked, xy


def test_a_line_is_where_its_numbers_are() -> None:
    """Ticks at 0, 25, 50, 75, 100 %; a margin of 2 % of the rounds on both sides."""
    series = Series("pfpt", [1, 2, 3], [0.0, 0.5, 1.0], [0.0, 0.4, 0.9], [0.1, 0.6, 1.0])
    chart = xy("t", ("round", "accuracy"), [series], text=share_text)
    assert chart is not None
    assert [text for _, text in chart.y_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert [place for place, _ in chart.y_ticks] == pytest.approx([100, 80, 60, 40, 20, 0])
    (shape,) = chart.shapes
    points = json.loads(shape.points)
    # 1 lies 0.04 above a left end of 0.96, of 2.08 in all.
    assert [point[0] for point in points] == pytest.approx(
        [100 * 0.04 / 2.08, 50, 100 - 100 * 0.04 / 2.08], abs=0.01
    )
    assert [point[1] for point in points] == [100, 50, 0]
    assert points[1][2:] == ["2", "50.0 % (40.0 % to 60.0 %)"]
    assert shape.path == "M1.92 100.00L50.00 50.00L98.08 0.00"
    # The band goes along the upper ends, and back along the lower ones.
    assert shape.band.startswith("M1.92 90.00L50.00 40.00L98.08 0.00L98.08 10.00L50.00 60.00")
    assert [(entry.name, entry.value) for entry in chart.legend] == [("pfpt", "100.0 %")]


def test_a_logarithmic_axis_has_decades_at_equal_distances() -> None:
    chart = xy("t", ("lr", "y"), [Series("a", [1e-4, 1e-2, 1.0], [1, 2, 3])], log=True)
    assert chart is not None
    places = {text: place for place, text in chart.x_ticks}
    assert {"0.0001", "0.01", "1"} <= places.keys()
    assert places["0.01"] - places["0.0001"] == pytest.approx(places["1"] - places["0.01"])


def test_values_that_are_not_finite_are_left_out() -> None:
    none = Series("none", [1, 2], [math.nan, math.inf])
    assert xy("t", ("x", "y"), [none]) is None
    chart = xy("t", ("x", "y"), [none, Series("some", [1, 2], [math.nan, 3.0])])
    assert chart is not None
    (shape,) = chart.shapes
    assert (shape.name, shape.group, len(json.loads(shape.points))) == ("some", 1, 1)
    for text in (repr(chart), repr(xy("t", ("x", "y"), [Series("a", [1], [5.0])]))):
        assert "nan" not in text
        assert "inf" not in text


def test_bars_stand_on_each_other_and_names_are_places() -> None:
    bars = [
        Series("train", [1, 2], [3, 4], [0, 0], [3, 4], kind="bars"),
        Series("evaluate", [1, 2], [4, 4], [3, 4], [4, 4], kind="bars"),
    ]
    chart = xy("t", ("round", "s"), bars)
    assert chart is not None
    values = [[point[3] for point in json.loads(shape.points)] for shape in chart.shapes]
    assert values == [["3", "4"], ["1", "0"]]
    named = xy("t", ("k", "y"), [Series("a", [0, 1], [1, 2])], names=["x", "y"])
    assert named is not None
    assert [text for _, text in named.x_ticks] == ["x", "y"]


def test_dots_and_stacked_rows() -> None:
    chart = dots("t", ["cat", "dog"], [("a", [0.25, math.nan]), ("b", [0.5])])
    assert chart is not None
    (cat, marks, value), (dog, others, unknown) = chart.rows
    assert (cat, value, dog, unknown, others) == ("cat", "25.0 %", "dog", "-", [])
    assert [(mark.group, mark.left) for mark in marks] == [(1, 50.0), (0, 25.0)]
    assert marks[0].tip == "cat: b 50.0 %"
    assert dots("t", ["cat"], [("a", [math.nan])]) is None
    time = stacked("t", ["a"], [("x", [30.0]), ("y", [0.0]), ("z", [10.0])], text=str)
    assert time is not None
    ((_, parts, total),) = time.rows
    assert total == "40.0"
    assert [(part.group, part.left, part.width) for part in parts] == [(0, 0, 75), (2, 75, 25)]
    assert stacked("t", ["a"], [("x", [0.0])], text=str) is None


def test_cells_are_pixels_as_opaque_as_their_values() -> None:
    values = np.array([[0.0, 1.0], [np.nan, 0.25]])
    chart = matrix(
        "t", ("row", "column"), (["a", "b"], ["x", "y"]), values, lambda r, c: f"{r}{c}", gamma=0.5
    )
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(chart.picture))))
    assert pixels[..., 3].tolist() == [[0, 255], [0, 128]]
    assert chart.texts == [(75.0, 25.0, "01", True), (75.0, 75.0, "11", False)]
    assert json.loads(chart.tips)["cells"] == [["00", "01"], ["10", "11"]]
    assert (chart.room, chart.short) == ("few", True)
    large = matrix(
        "t", ("r", "c"), (["a"] * 100, ["b"] * 100), np.ones((100, 100)), lambda r, c: "1"
    )
    assert large.texts == []
    assert len(large.rows) <= 45
    assert sum(always for _, _, always in large.columns) <= 12
