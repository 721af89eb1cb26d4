"""The tables of docs/real.md and of README are made of the committed results."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.harness import DOCS, ROOT
from benchmarks.methods import real_page


def test_tables_are_made_of_the_committed_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = {path: tmp_path / path.name for path in (DOCS / "real.md", ROOT / "README.md")}
    for path, copy in copies.items():
        shutil.copy(path, copy)
    page, readme = copies.values()
    picture = tmp_path / "real.png"
    arguments = ["--page", str(page), "--picture", str(picture), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", ["real_page", *arguments])
    real_page.main()
    assert picture.stat().st_size > 10_000
    for path, copy in copies.items():
        same = copy.read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
        assert same, "python -m benchmarks.methods.real_page"
