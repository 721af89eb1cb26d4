"""Write `docs/options.md`, every config key with its default, from the options' dataclasses.

python docs/options.py
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

from fedprompt.config import LISTS, REGISTRIES, SECTIONS
from fedprompt.config.typed import shown

TARGET = Path(__file__).with_name("options.md")
HEAD = """# Config keys and their defaults

Made by `python docs/options.py` from the dataclasses that hold the defaults. [config.md](config.md)
says which source of a value wins. `fedprompt run NAME --print-config` shows what a run uses.
"""


def page() -> str:
    """The whole file."""
    parts = [HEAD]
    for key, options in SECTIONS.items():
        parts.append(f"## {key}\n\n{table(key, options)}")
    for group, registry in {**REGISTRIES, **LISTS}.items():
        if group in SECTIONS:
            continue
        parts.append(f"## {group}\n")
        for name in registry.names():
            entry = registry.entry(name)
            if entry.factory.__module__.startswith("fedprompt."):  # no plug-in of the user
                listed = group in LISTS
                title = f"### {group}: [{name}]" if listed else f"### {group}={name}"
                rows = table(name if listed else group, entry.options)
                parts.append(f"{title}\n\n{rows}" if rows else f"{title}\n")
    return "\n".join(parts)


def table(prefix: str, options: type) -> str:
    """One row for each key of a section; empty if it has none."""
    texts = meanings(options)
    rows = [
        f"| `{prefix}.{field.name}` | `{default_of(field)}` | {texts.get(field.name, '')} |"
        for field in dataclasses.fields(options)
    ]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows, ""]) if rows else ""


def default_of(field: dataclasses.Field[object]) -> str:
    """A default as YAML has it."""
    if field.default is not dataclasses.MISSING:
        return shown(field.default)
    factory = field.default_factory
    return shown(factory() if factory is not dataclasses.MISSING else None)


def meanings(options: type) -> dict[str, str]:
    """What the docstrings say of each field: below it, or under `Args:` of its class."""
    texts: dict[str, str] = {}
    for owner in reversed(options.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        for name, text in re.findall(
            r"^    (\w+): (.+(?:\n {8,}.+)*)", inspect.getdoc(owner) or "", re.MULTILINE
        ):
            texts[name] = one_line(text)
        body = ast.parse(inspect.getsource(owner)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text and isinstance(field.target, ast.Name):
                texts[field.target.id] = one_line(str(below.value.value))
    return texts


def one_line(text: str) -> str:
    """A docstring as a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
