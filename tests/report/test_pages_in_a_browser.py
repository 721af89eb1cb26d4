"""Every page in a browser: no error, nothing that is cut, no empty figure; wide and narrow, light
and dark.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedprompt.report.page import make_html, make_report
from fedprompt.sweep.directory import SweepDirectory, make_table
from fedprompt.sweep.page import make_sweep_page
from fedprompt.sweep.space import build_sweep
from tests.chromium import PROGRAM, Browser
from tests.report.made_runs import write_experiment, write_run

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium to open the pages with")
WIDTHS = (1920, 1200, 375)
CUT = """(() => {
  const found = [];
  for (const each of document.querySelectorAll("details")) each.open = true;
  const wide = document.documentElement;
  if (wide.scrollWidth > innerWidth) found.push(`page: ${wide.scrollWidth} > ${innerWidth}`);
  for (const each of document.querySelectorAll("td, th, dd, code, figure, h1, h3, .xt, .card")) {
    const box = each.getBoundingClientRect();
    if (box.width && (box.right > innerWidth + 1 || box.left < -1)) found.push(each.textContent);
  }
  for (const each of document.querySelectorAll(".table")) {
    if (each.scrollWidth > each.clientWidth + 1) found.push(`table: ${each.scrollWidth}`);
  }
  for (const each of document.querySelectorAll("details")) each.open = false;
  return found;
})()"""
BOXES = """[...document.querySelectorAll("figure")].map((figure) => {
  const title = figure.querySelector("h3").textContent;
  const box = (figure.querySelector(".plot, .rows, .cells") ?? figure).getBoundingClientRect();
  return [title, box.left, box.top + scrollY, box.right, box.bottom + scrollY];
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run alone, several runs, a sweep over two keys, and one over seeds alone."""
    folder = tmp_path_factory.mktemp("runs")
    paths = write_experiment(folder)
    found = {
        "run": make_html(paths[0]),
        "several": make_report(paths, folder / "several" / "report.html"),
    }
    for name, space in (
        ("grid", {"prompts.lr": {"loguniform": [1e-4, 0.1]}, "partition.alpha": [0.1, 0.5, 5.0]}),
        ("seeds", {}),
    ):
        tree = {"experiment": "digits", "set": {"compare": []}, "space": space, "seeds": 3}
        sweep = build_sweep({"name": name, **tree})
        directory = SweepDirectory.create(folder / name, sweep)
        trials = sweep.trials()
        for number, trial in enumerate(trials):
            write_run(directory.run(trial).path, "pfpt", number)
        if name == "grid":
            directory.add_stopped(trials[-1], 3)
        table = make_table(directory, sweep, trials)
        found[name] = make_sweep_page(directory, sweep, table)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def faults_of(browser: Browser, page: Path, width: int, dark: bool) -> list[str]:
    """What is wrong with a page."""
    browser.open(page, width, dark)
    faults = [*browser.faults(), *(f"cut: {each}" for each in browser.value(CUT))]
    boxes = browser.value(BOXES)
    height = int(browser.value("document.documentElement.scrollHeight"))
    pixels = np.asarray(Image.open(io.BytesIO(browser.pixels(width, height))).convert("RGB"))
    background = pixels[:, 0].mean()
    if (background < 128) != dark:
        faults.append(f"the page is not {'dark' if dark else 'light'}: {background}")
    for title, *box in boxes:
        left, top, right, bottom = map(round, box)
        part = pixels[top:bottom, left:right].astype(int)
        coloured = (part.max(axis=2) - part.min(axis=2) > 50).sum() if part.size else 0
        if coloured < 20:
            faults.append(f"empty: {title}")
    return faults


@needs_browser
@pytest.mark.parametrize("name", ["run", "several", "grid", "seeds"])
def test_pages_show_all_and_cut_nothing(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    looks = [(width, dark) for width in WIDTHS for dark in (False, True)]
    if name in ("run", "seeds"):  # parts of the page about several
        looks = [(1200, True), (375, False)]
    for width, dark in looks:
        assert faults_of(browser, pages[name], width, dark) == [], (width, dark)
    titles = [title for title, *_ in browser.value(BOXES)]
    assert len(titles) >= (2 if name == "grid" else 12)


@needs_browser
def test_the_check_sees_errors_overflow_and_empty_figures(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<style>body { margin: 0; background: #fff }</style>"
        "<figure><h3>nothing</h3><svg class=plot width=90 height=90></svg></figure>"
        "<div style='width:2000px'>.</div><script>missing()</script>"
    )
    text = "\n".join(faults_of(browser, page, 1200, dark=True))
    for fault in ("missing is not defined", "page: 2000 > 1200", "empty: nothing", "not dark"):
        assert fault in text


@needs_browser
def test_values_under_the_pointer_and_lines_switched_off(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["several"], 1200, dark=False)
    over = """(where) => {
      const box = document.querySelector(where).getBoundingClientRect();
      const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
      document.querySelector(where).dispatchEvent(new PointerEvent("pointermove", at));
      const tip = document.getElementById("tip");
      return tip.style.display === "none" ? null : tip.innerText;
    }"""
    found = browser.value(f"({over})('.plot')")
    assert "round 6" in found or "round 7" in found
    assert "pfpt (partition.alpha=0.5): " in found
    assert "fedavg_pt: " in found
    assert "class of the image: class" in browser.value(f"({over})('.cells')")
    assert "photographs: " in browser.value(f"({over})('.rows .dot')")
    first = "document.querySelector('figure')"
    assert browser.value(f"{first}.querySelectorAll('.off').length") == 0
    browser.value(f"{first}.querySelector('.legend button').click()")
    assert browser.value(f"{first}.querySelectorAll('.off').length") == 2  # test and validation
    assert "pfpt (partition.alpha=0.5): " not in browser.value(f"({over})('.plot')")
    assert browser.value("document.querySelectorAll('.off').length") == 2  # in this figure alone
    browser.value(f"{first}.querySelector('.legend button').click()")
    assert browser.value("document.querySelectorAll('.off').length") == 0
    assert browser.faults() == []
