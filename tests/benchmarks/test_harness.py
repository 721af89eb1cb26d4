"""benchmarks/harness.py: rows come back as they were, tables grow row by row, marks are kept."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import doctest
import importlib
import math
import sys
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Table


@dataclasses.dataclass(frozen=True)
class Place:
    """Part of a row."""

    city: str
    north: bool


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of every kind of column."""

    name: str
    number: int
    share: float | None
    curve: tuple[float | None, ...]
    words: tuple[str, ...]
    place: Place


FULL = Line("a, b", 3, 0.1 + 0.2, (None, 1e-9, 2.0), ("x=1", "y"), Place("Å", True))
EMPTY = Line("", -1, None, (), (), Place("", False))


@pytest.fixture
def table(tmp_path: Path) -> Table[Line]:
    return Table(tmp_path / "new" / "lines.csv", Line, ("name", "number"))


def test_rows_come_back_as_they_were(table: Table[Line]) -> None:
    assert table.read() == []
    table.write([FULL, EMPTY])
    assert table.read() == [EMPTY, FULL]  # by key
    head, *lines = table.path.read_text(encoding="utf-8").splitlines()
    assert head == "name,number,share,curve,words,city,north"
    assert lines[1] == '"a, b",3,0.30000000000000004,- 1e-09 2.0,x=1 y,Å,true'


def test_a_row_is_added_or_takes_the_place_of_its_key(table: Table[Line]) -> None:
    table.add(FULL)
    table.add(EMPTY)
    table.add(dataclasses.replace(FULL, share=1.0))
    assert [row.share for row in table.read()] == [None, 1.0]
    assert [path.name for path in table.path.parent.iterdir()] == ["lines.csv"]


def test_two_that_add_at_once_lose_nothing(table: Table[Line]) -> None:
    rows = [dataclasses.replace(FULL, number=number) for number in range(20)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(table.add, rows))
    assert table.read() == rows


def test_a_table_with_other_columns_is_refused(table: Table[Line]) -> None:
    table.add(FULL)
    text = table.path.read_text(encoding="utf-8").replace("share", "shared", 1)
    table.path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"lines\.csv: expected the columns .*share"):
        table.read()
    with pytest.raises(SystemExit):  # and is not written over
        table.add(EMPTY)
    assert table.path.read_text(encoding="utf-8") == text


def test_what_stands_between_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = "<!-- x: made from the results; do not edit -->", "<!-- end of x -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    harness.put_between(page, "x", "new")
    assert page.read_text() == f"before\n{begin}\nnew\n{end}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="put them back"):
        harness.put_between(page, "x", "new")


def test_a_document_is_strict_json_of_few_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    assert harness.read_json(path) == {}
    harness.write_json(path, {"a": {"b": math.nan, "c": {"d": 1}}, "e": [1]})
    assert harness.read_json(path) == {"a": {"b": None, "c": {"d": 1}}, "e": [1]}
    assert '"a": { "b": null, "c": { "d": 1 } }' in path.read_text()


def test_the_command_is_what_a_reader_types(monkeypatch: pytest.MonkeyPatch) -> None:
    started = str(harness.ROOT / "benchmarks" / "methods" / "runner.py")
    monkeypatch.setattr(sys, "argv", [started, "--only", "a b"])
    assert harness.command() == "python -m benchmarks.methods.runner --only 'a b'"
    monkeypatch.setattr(sys, "argv", ["script.py", "1"])
    assert harness.command() == "python script.py 1"


def test_one_seed_has_no_interval_and_equal_differences_no_p() -> None:
    (one, same) = (
        harness.paired({0: 2.0}, {0: 1.0}),
        harness.paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}),
    )
    assert one is not None and (one.mean, one.seeds) == (1.0, 1)
    assert math.isnan(one.half_width) and math.isnan(one.p)
    assert same is not None and same.half_width == 0.0 and math.isnan(same.p)
    assert harness.paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    "name",
    ["harness", "planted", "methods.results", "methods.text", "methods.details", "methods.domains"],
)
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    found = doctest.testmod(module)
    assert found.failed == 0 and found.attempted > 0
