"""The documents: short sentences, links that lead somewhere, paths that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "fedprompt"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))

# Pages that are still to be checked: take a page out of here as soon as it is rewritten.
# (`benchmark-tables.md` is made by a program and may stay.)
TO_BE_REWRITTEN = {
    "benchmark-tables.md",
}

SPEC = importlib.util.spec_from_file_location("links", ROOT / "docs" / "links.py")
assert SPEC is not None and SPEC.loader is not None
links = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(links)
outward = links.outward

LONGEST = 40
"""Words of a sentence."""
MEDIAN = 20
"""Of a page's sentences; the median lies below."""
MOST_NUMBERS = 2
"""In a sentence; more belong into a table."""

FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^[ ]{4,}\S.*\n)+", re.MULTILINE)
CODE = re.compile(r"`[^`]+`")
LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
BLOCK = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)")
END = re.compile(r"(?<=[.!?])[)\"*]*\s+(?=[A-Z0-9`*(\"\[])")
NUMBER = re.compile(
    r"(?<![\w.,-])[+-]?\d+(?:[.,]\d+)*(?:\s*(?:±|×|x|/)\s*\d+(?:[.,]\d+)*)*(?![\w-])"
)
PATH = re.compile(r"^(?:[\w.-]+/)+[\w.-]*$")


def sentences(text: str) -> list[str]:
    """The sentences of a page, without code blocks, tables, headings, pictures and link targets;
    a span of code counts as one word.

    >>> sentences("# A\\n\\nOne `a b` [two](x.md). Three 1.5 four.\\n\\n| no | no |\\n")
    ['One CODE two.', 'Three 1.5 four.']
    """
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not re.match(r"\s*(\||#|!\[)", line)]
    text = CODE.sub("CODE", LINK.sub(r"\1", CODE.sub("CODE", "\n".join(lines))))
    found: list[str] = []
    for block in BLOCK.split(text):
        if block.strip() and not INDENTED.fullmatch(block.strip("\n") + "\n"):
            plain = " ".join(re.sub(r"^\s*(?:[-*]|\d+\.)\s", "", block).replace("**", "").split())
            found += [sentence for sentence in END.split(plain) if sentence]
    return found


def words(sentence: str) -> int:
    """Words of a sentence; signs that stand alone are none.

    >>> words("two words - and 1.5 more")
    5
    """
    return len([part for part in sentence.split() if re.search(r"\w", part)])


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them.

    >>> sorted(anchors("# The `head`, *frozen*\\n## A\\n## A\\n"))
    ['a', 'a-1', 'the-head-frozen']
    """
    found: set[str] = set()
    for heading in re.findall(r"^#+\s+(.*)$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", LINK.sub(r"\1", heading).lower()).replace(" ", "-")
        taken = sum(
            each == plain or re.fullmatch(rf"{plain}-\d+", each) is not None for each in found
        )
        found.add(f"{plain}-{taken}" if taken else plain)
    return found


def rewritten() -> list[Path]:
    return [page for page in PAGES if page.name not in TO_BE_REWRITTEN]


def words_of(page: Path) -> str:
    """A page; of a notebook the cells that are no code."""
    if page.suffix != ".ipynb":
        return page.read_text(encoding="utf-8")
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def test_the_exempt_pages_exist():
    assert {page.name for page in PAGES} >= TO_BE_REWRITTEN


@pytest.mark.parametrize("page", [*rewritten(), *TUTORIALS], ids=lambda page: page.name)
def test_sentences_say_one_thing(page):
    found = sentences(words_of(page))
    assert found
    long = [f"{words(each)}: {each}" for each in found if words(each) > LONGEST]
    assert not long, "\n".join(long)
    assert statistics.median(map(words, found)) < MEDIAN


@pytest.mark.parametrize("page", rewritten(), ids=lambda page: page.name)
def test_many_numbers_stand_in_a_table(page):
    crowded = [
        each for each in sentences(page.read_text()) if len(NUMBER.findall(each)) > MOST_NUMBERS
    ]
    assert not crowded, "\n".join(crowded)


@pytest.mark.parametrize("page", [*rewritten(), *TUTORIALS], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = words_of(page)
    dead: list[str] = []
    for _, target in LINK.findall(CODE.sub("CODE", FENCE.sub("", text))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(words_of(file))):
            dead.append(target)
    assert not dead


@pytest.mark.parametrize("page", rewritten(), ids=lambda page: page.name)
def test_named_files_exist(page):
    """Of code: `src/...`, and `room/file.py` or `room/` inside the package."""
    missing: list[str] = []
    rooms = {folder.name for folder in PACKAGE.iterdir() if folder.is_dir()}
    for span in CODE.findall(FENCE.sub("", page.read_text())):
        name = span.strip("`")
        if not PATH.match(name) or "NAME" in name:
            continue
        first = name.split("/")[0]
        bases = (
            [ROOT] if first in {"src", "tests", "benchmarks", "conf", "examples", "jobs"} else []
        )
        bases += [PACKAGE] if first in rooms or name.endswith(".py") else []
        found = any((base / name).exists() for base in bases)
        if bases and not found and not any(PACKAGE.rglob(name)):
            missing.append(name)
    assert not missing


def test_the_glossary_names_what_exists():
    """`Class.field` in `room/file.py`: both stand in that file."""
    defined = re.findall(r"`([\w.]+)` in `([\w/]+\.py)`", (ROOT / "docs/glossary.md").read_text())
    assert len(defined) > 20
    missing = [
        f"{name} in {file}"
        for name, file in defined
        for part in name.split(".")
        if not re.search(rf"\b{part}\b", (PACKAGE / file).read_text())
    ]
    assert not missing


def nav() -> list[str]:
    """The pages that mkdocs.yml lists."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return re.findall(r"^ {2,8}- (?:[^:\n]+: )?([\w/-]+\.md)$", text, re.MULTILINE)


def test_the_site_has_every_page_once() -> None:
    """`make docs` checks the rest: it is strict."""
    made = {"reference/cli.md", "reference/python.md", "changelog.md", "contributing.md"}
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").glob("*.md")}
    made |= {f"tutorials/{path.stem}.md" for path in TUTORIALS}
    assert sorted(nav()) == sorted(pages | made)


@pytest.mark.parametrize("page", [ROOT / "CHANGELOG.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_out_of_the_site_to_the_code(page: Path) -> None:
    """No relative link is left where nothing lies beside the page."""
    folder = page.parent.relative_to(ROOT).as_posix()
    text = FENCE.sub("", outward(page.read_text(), folder, "https://host.example/me/it"))
    targets = [target for _, target in LINK.findall(CODE.sub("CODE", text))]
    assert all(re.match(r"https?://|#", each) for each in targets)
    places = re.findall(r"https://host\.example/me/it/(?:blob|raw)/HEAD/([^)#\s]+)", text)
    assert all((ROOT / place).exists() for place in places)


@pytest.mark.parametrize("page", rewritten(), ids=lambda page: page.name)
def test_a_list_begins_after_an_empty_line(page: Path) -> None:
    """A code host does without; the site would run it into the paragraph."""
    text = FENCE.sub("", page.read_text())
    glued = re.findall(r"^(?![-*\d|>#\s]).+\n(?:- |\d+\. ).+", text, re.MULTILINE)
    assert not glued


def test_the_readme_fits_on_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
