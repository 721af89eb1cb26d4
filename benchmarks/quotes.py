"""Each figure that a page quotes equals what was measured: `python -m benchmarks.quotes`.

Tables between marks are made from the results; a test makes them again and compares. This module
is about the rest. `PAGES` has, for each page and section, the texts that the results give, computed
here, and what no committed file holds (`BY_HAND`: single observations, and numbers that are
settings). Two things are checked:

* each figure of the page (a number with decimals, an interval, a percentage, a factor) is one of
  those of its section, so that neither a stale nor an invented one can stand there;
* each row of a table whose first cell names something that is known has that one's figures, in
  the columns where they belong (`ROWS`).

What is not a figure by that measure, whole numbers in a sentence ("ten of 40 clients"), is not
checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from benchmarks import quoted
from benchmarks.harness import DOCS, ROOT

GENERATED = re.compile(r"<!-- (.+?): made from the results.*?<!-- end of \1 -->", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|!\[[^\]]*\]", re.DOTALL)
NUMBER = r"[+-]?(?:\d[\d,]*)?\.\d+|[+-]?\d[\d,]*"
FIGURE = re.compile(
    rf"(?<![\w.,-])(?:{NUMBER}) ± (?:{NUMBER})|"  # an interval
    rf"(?<![\w.,-])[+-]?(?:\d[\d,]*)?\.\d+(?![\w.]*\d)|"  # decimals
    rf"(?<![\w.,-])[+-]?\d+(?:-\d+)?(?= ?%| ×(?! \d))"  # a percentage or a factor
)


@dataclasses.dataclass(frozen=True)
class Page:
    """What may stand on a page."""

    path: Path
    figures: Callable[[], Mapping[str, Iterable[str]]]
    """Heading of a section -> figures; `*` for all sections."""
    rows: Callable[[], quoted.Rows] = dict
    """(pattern of the first cell, pattern of the column) -> figure."""
    only: frozenset[str] = frozenset()
    """The sections that are checked, where not all are."""


PAGES = (
    Page(ROOT / "README.md", quoted.readme, quoted.readme_rows),
    # What the README once had; it has its figures.
    Page(DOCS / "limits.md", quoted.readme),
    Page(DOCS / "benchmark.md", quoted.benchmark),
    Page(DOCS / "performance.md", quoted.performance),
    Page(
        DOCS / "backbone.md",
        quoted.backbone,
        only=frozenset({"Do prompts matter?", "Linear probes"}),
    ),
    Page(DOCS / "cluster.md", quoted.cluster, quoted.cluster_rows, frozenset({"Figures"})),
    Page(
        DOCS / "pfpt.md",
        quoted.pfpt,
        quoted.pfpt_rows,
        frozenset({"Planted correspondences", "Speed", "Keys, drift and 200 rounds", "Extensions"}),
    ),
    Page(DOCS / "data.md", quoted.data, only=frozenset({"Partitions", "The prefix cache"})),
)


def normal(text: str) -> str:
    """A figure without what only adorns it.

    >>> normal("**0.5 ± 0.1**"), normal("−.18"), normal("+3.40 %")
    ('0.5 ± 0.1', '-.18', '+3.40')
    """
    plain = text.replace("*", "").replace("−", "-").replace("†", "")
    return plain.removesuffix("%").removesuffix("×").strip()


def sections(text: str) -> dict[str, str]:
    """The text under each heading, without what is generated.

    >>> sections("# A\\nx\\n## B\\ny 0.5\\n")
    {'A': 'x\\n', 'B': 'y 0.5\\n'}
    """
    found: dict[str, str] = {}
    heading, fenced = "", False
    for line in GENERATED.sub("", text).splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if line.startswith("#") and not fenced:
            heading = line.lstrip("#").strip()
        else:
            found[heading] = found.get(heading, "") + line
    return found


def figures_in(text: str) -> list[str]:
    """What counts as a figure.

    >>> figures_in("PFPT has 66.9 ± 1.9 % (`lr=0.5`), 5 seeds, 36 × as fast; at 50 %")
    ['66.9 ± 1.9', '36', '50']
    """
    plain = CODE.sub(" ", text.replace("−", "-").replace("*", ""))
    return [normal(found) for found in FIGURE.findall(plain)]


def parts_of(figure: str) -> list[str]:
    """A figure with an interval may be quoted without it, and without its sign."""
    mean = figure.partition(" ± ")[0]
    return [figure, mean, figure.lstrip("+-"), mean.lstrip("+-")]


def wrong_figures(page: Page, text: str) -> list[str]:
    """Figures of a page that no result gives."""
    known = {name: list(found) for name, found in page.figures().items()}
    wrong = []
    for heading, body in sections(text).items():
        if page.only and heading not in page.only:
            continue
        given = [*known.get(heading, ()), *known.get("*", ())]
        allowed = {part for figure in given for part in parts_of(normal(figure))}
        wrong += [
            f"{page.path.name}, '{heading}': {figure} is not what was measured; correct it, or "
            "say in benchmarks/quoted.py where it comes from"
            for figure in figures_in(body)
            if figure not in allowed and figure.lstrip("+-") not in allowed
        ]
    return wrong


def wrong_rows(page: Page, text: str) -> list[str]:
    """Cells of known rows that have another figure than was measured."""
    rows, wrong = page.rows(), []
    for head, line in table_lines(text):
        for (name, column), figure in rows.items():
            if not re.fullmatch(name, line[0]):
                continue
            for place, title in enumerate(head[1:], start=1):
                if re.search(column, title) and place < len(line):
                    cell = normal(line[place])
                    if cell != normal(figure):
                        wrong.append(
                            f"{page.path.name}: row '{line[0]}', column '{title}': expected "
                            f"{figure}, got {cell}; correct it"
                        )
    return wrong


def table_lines(text: str) -> Iterable[tuple[list[str], list[str]]]:
    """Head and cells of each line of each table."""
    head: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            head = None
            continue
        cells = [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        if head is None:
            head = cells
        elif not set(line) <= set("|-: "):
            yield head, cells


def check(page: Page, text: str | None = None) -> list[str]:
    """What is wrong on a page, one line each.

    Args:
        page: which.
        text: what stands there; None: what is in the file.
    """
    found = page.path.read_text(encoding="utf-8") if text is None else text
    return [*wrong_figures(page, found), *wrong_rows(page, found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    wrong = []
    for page in PAGES:
        found = check(page)
        number = sum(
            len(figures_in(body))
            for name, body in sections(page.path.read_text(encoding="utf-8")).items()
            if not page.only or name in page.only
        )
        print(f"{page.path.name}: {number} figures in sentences and tables, {len(found)} wrong")
        wrong += found
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
