"""The page of all config keys is made from the dataclasses, and says what each key means."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PATH = Path(__file__).parents[2] / "docs" / "options.py"


def test_the_page_of_keys_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("options", PATH)
    assert spec is not None and spec.loader is not None
    options = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(options)
    page: str = options.page()
    written = PATH.with_suffix(".md").read_text(encoding="utf-8")
    # A plug-in that a user has added to the package is a section more.
    outdated = set(written.split("\n#")) - set(page.split("\n#"))
    assert not outdated, "run python docs/options.py"
    assert (
        "| `prompts.pool` | an integer or null | `null` | Prompts that the server starts with;"
        in written
    )
    assert "|  |" not in written, "every key says what it means"
    # The same keys, as shells complete them.
    lines = options.KEYS.read_text(encoding="utf-8").splitlines()
    assert set(lines) <= set(options.index().splitlines()), "run python docs/options.py"
    assert len(lines) > 200
