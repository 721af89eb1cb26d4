"""Write `docs/options.md`, every config key with its type, default and meaning, and
`src/fedprompt/cli/keys.json`, which shells complete from: both from the options' dataclasses.

python docs/options.py
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from fedprompt.config import GROUPS, LISTS, REGISTRIES, SECTIONS
from fedprompt.config.experiment import WHEN
from fedprompt.config.groups import Scalars
from fedprompt.config.typed import kind, shown
from fedprompt.core.errors import ConfigError

TARGET = Path(__file__).with_name("options.md")
KEYS = Path(__file__).parents[1] / "src" / "fedprompt" / "cli" / "keys.json"
HEAD = """# Config keys and their defaults

Made by `python docs/options.py` from the dataclasses that hold the defaults. [config.md](config.md)
says which source of a value wins. `fedprompt run NAME --print-config` shows what a run uses.
"""
FLAGS = ("true", "false")
NONSENSE = "no such choice"
CHOICES = re.compile(r"expected (?:[^,]*, or )?one of (.+?), got")


class Key(typing.NamedTuple):
    """One line of an experiment."""

    name: str
    kind: str
    """Its type in words, `text` for names."""
    default: str
    """As YAML has it; empty where there is none."""
    words: str
    """What it means."""
    values: tuple[str, ...] = ()
    """All names that it takes, where only some are known."""
    owner: str = ""
    """The entry of a registry that it is an option of."""

    def row(self) -> str:
        """As a row of the table."""
        names = ", ".join(f"`{each}`" for each in self.values if each not in FLAGS)
        kinds = self.kind.replace("text", names) if names else self.kind
        default = f"`{self.default}`" if self.default else "–"
        return f"| `{self.name}` | {kinds} | {default} | {self.words} |"


def sections() -> Iterator[tuple[str, list[Key]]]:
    """All keys: the heading of each section and what stands in it."""
    yield "## top level", keys_of("", Scalars)
    for name, options in SECTIONS.items():
        yield f"## {name}", keys_of(name, options)
    for group, registry in {**REGISTRIES, **LISTS}.items():
        if group in SECTIONS:
            continue
        yield f"## {group}", []
        for name in registry.names():
            entry = registry.entry(name)
            if entry.factory.__module__.startswith("fedprompt."):  # no plug-in of the user
                title = f"{group}: [{name}]" if group in LISTS else f"{group}={name}"
                where = name if group in LISTS else group
                yield f"### {title}", keys_of(where, entry.options, name)


def page() -> str:
    """The whole file."""
    parts = [HEAD]
    for heading, keys in sections():
        rows = [each.row() for each in keys]
        table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
        parts.append(f"{heading}\n\n" + "\n".join(table) if rows else f"{heading}\n")
    return "\n".join(parts)


def index() -> str:
    """The keys as shells complete them, a line each."""
    found = [each for _, keys in sections() for each in keys]
    rows = [
        {
            "key": each.name,
            "owner": each.owner,
            "values": list(each.values),
            "words": re.split(r"[.;] ", each.words)[0].rstrip("."),
        }
        for each in found
    ]
    groups = {group: _names(group) for group in GROUPS}
    lines = [
        f'{{"groups": {json.dumps(groups)},\n "keys": [',
        ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "]}\n",
    ]
    return "\n".join(lines)


def _names(group: str) -> list[str]:
    """Names that are registered by this package; files of `conf/` may have more."""
    registry = REGISTRIES.get(group)
    return [
        name
        for name in (registry.names() if registry else ())
        if registry and registry.entry(name).factory.__module__.startswith("fedprompt.")
    ]


def keys_of(prefix: str, options: type, owner: str = "") -> list[Key]:
    """The keys of a section.

    Args:
        prefix: name of the section; empty at the top.
        options: its dataclass.
        owner: the entry of a registry whose options they are.
    """
    texts, hints = meanings(options), typing.get_type_hints(options)
    return [
        Key(
            f"{prefix}.{field.name}" if prefix else field.name,
            kind(hints[field.name]),
            default_of(field),
            texts.get(field.name, ""),
            choices_of(options, field, hints[field.name]),
            owner,
        )
        for field in dataclasses.fields(options)
    ]


def choices_of(options: type, field: dataclasses.Field[object], hint: object) -> tuple[str, ...]:
    """The names that a key takes: those that it lists when it refuses nonsense.

    Args:
        options: the dataclass.
        field: of it.
        hint: the field's type.
    """
    words = kind(hint)
    flags = FLAGS if "true or false" in words else ()
    if options is Scalars:  # checked by ExperimentConfig
        return WHEN if field.name in ("eval_clients", "eval_alone") else ()
    if "text" not in words:
        return flags
    try:
        dataclasses.replace(options(), **{field.name: NONSENSE})
    except ConfigError as error:
        found = CHOICES.search(str(error))
        if found is not None and NONSENSE in str(error):
            return (*flags, *found[1].split(", "))
    except TypeError:  # it has no default
        pass
    return flags


def default_of(field: dataclasses.Field[object]) -> str:
    """A default as YAML has it."""
    if field.default is not dataclasses.MISSING:
        return shown(field.default)
    factory = field.default_factory
    return shown(factory()) if factory is not dataclasses.MISSING else ""


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
    KEYS.write_text(index(), encoding="utf-8")
