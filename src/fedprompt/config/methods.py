"""The presets of `conf/method`, for `fedprompt methods`."""

from __future__ import annotations

import dataclasses

from fedprompt.config import files


@dataclasses.dataclass(frozen=True)
class MethodCard:
    """What the first lines of a method's preset say."""

    name: str
    text: str
    source: str


def list_methods() -> list[MethodCard]:
    """All presets of `conf/method` in alphabetical order."""
    cards = []
    for path in sorted((files.conf_root() / "method").glob("*.yaml")):
        lines = [line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines()]
        cards.append(MethodCard(path.stem, lines[0], lines[1].removeprefix("Source: ")))
    return cards
