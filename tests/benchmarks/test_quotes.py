"""benchmarks/quotes.py: the pages quote what was measured, and a wrong figure does not pass."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from benchmarks import quoted, quotes
from benchmarks.harness import DOCS, RESULTS, put_between, read_json
from benchmarks.quotes import PAGES, Page
from benchmarks.speed.page import tables

README = next(page for page in PAGES if page.path.name == "README.md")
BENCHMARK = next(page for page in PAGES if page.path.name == "benchmark.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.name)
def test_each_figure_is_what_was_measured(page: Page) -> None:
    assert quotes.check(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.name)
def test_another_figure_is_found(page: Page) -> None:
    text = page.path.read_text(encoding="utf-8")
    name = next(iter(page.only)) if page.only else "Added"
    (line,) = quotes.check(page, f"{text}\n## {name}\nIt has 12.345 ± 6.7 % there.\n")
    assert "12.345 ± 6.7 is not what was measured" in line


def test_a_stale_table_of_readme_is_found() -> None:
    true = quoted.accuracy("domains_frozen/dirichlet_0.5", "pfpt")
    other = quoted.accuracy("domains_frozen/dirichlet_0.1", "pfpt")
    head = "| test accuracy (%) | Dirichlet 0.5 | Dirichlet 0.1 |\n|---|---|---|\n"
    assert quotes.check(README, f"{head}| PFPT | {true} | {other} |") == []
    wrong = quotes.check(README, f"{head}| **PFPT** | {true} | {other} |".replace("**", "`"))
    assert wrong == []
    first, second = quotes.check(README, f"{head}| PFPT | {other} | {true} |")
    assert f"row 'PFPT', column 'Dirichlet 0.5': expected {true}, got {other}" in first
    assert "column 'Dirichlet 0.1'" in second


def test_readme_may_be_worded_anew() -> None:
    figure = quoted.gain("domains_frozen/dirichlet_0.5", "pfpt", "fedavg_pt")
    mean = figure.lstrip("+").partition(" ± ")[0]
    for text in (f"PFPT leads by {figure} points", f"a lead of {mean} points", f"{mean} % more"):
        assert quotes.check(README, text) == []
    assert len(quotes.check(README, "a lead of 13.3 points")) == 1


def test_a_figure_of_another_section_does_not_pass() -> None:
    figure = quoted.learned_centrally("per domain")
    assert quotes.check(BENCHMARK, f"# What limits PFPT\n{figure} %") == []
    assert len(quotes.check(BENCHMARK, f"# Protocol\n{figure} %")) == 1


def test_code_links_and_generated_tables_are_not_quotes() -> None:
    text = "`lr=0.77` [x](a-1.77.md)\n```\n0.77\n```\n"
    made = "<!-- x: made from the results; do not edit -->\n0.77\n<!-- end of x -->\n"
    assert quotes.check(BENCHMARK, f"# Protocol\n{text}{made}") == []
    assert len(quotes.check(BENCHMARK, "# Protocol\n0.77\n")) == 1


def test_tables_of_the_performance_page_are_made_of_the_committed_results(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    committed = (DOCS / "performance.md").read_text(encoding="utf-8")
    page.write_text(committed, encoding="utf-8")
    for name, lines in tables(read_json(RESULTS / "speed.json")["cases"]).items():
        put_between(page, name, lines)
    assert page.read_text(encoding="utf-8") == committed, "python -m benchmarks.speed.page"


@pytest.mark.parametrize("module", [quotes, quoted])
def test_examples_in_docstrings(module: object) -> None:
    found = doctest.testmod(module)
    assert found.failed == 0 and found.attempted > 0
