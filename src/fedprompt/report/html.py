"""Pages out of templates: one file each, without a network, with one script and one style sheet."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedprompt.report.charts import Chart

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclasses.dataclass(frozen=True)
class Table:
    """Heads and rows; on a phone each row is a card whose lines are named by the heads."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False
    """Whether cells are text and not numbers."""
    lead: bool = False
    """Whether the first row is the one that the page is about."""


@dataclasses.dataclass(frozen=True)
class Page:
    """What `page.html.j2` shows, from top to bottom; what is empty is left out."""

    title: str
    subtitle: str
    warnings: Sequence[str] = ()
    cards: Sequence[tuple[str, str]] = ()
    """Value, and what it is."""
    facts: Sequence[tuple[str, str]] = ()
    commands: Sequence[tuple[str, str]] = ()
    """What a command is for, and the command."""
    tables: Sequence[tuple[str, Table, str]] = ()
    """Heading, table, and what is to be said below it."""
    figures: Sequence[Chart] = ()
    details: Sequence[tuple[str, Table | None, str]] = ()
    """What is folded: its name, and a table or a text."""


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("fedprompt.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    """A file of the templates as it is."""
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0].strip()


def render(page: Page) -> str:
    """The page as HTML, every text escaped."""
    from markupsafe import Markup

    script, style = _asset("page.js"), _asset("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing is loaded, and no other script runs, even if a name were to slip through unescaped.
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    fields = {field.name: getattr(page, field.name) for field in dataclasses.fields(page)}
    template = _environment().get_template("page.html.j2")
    text = template.render(**fields, policy=policy, script=Markup(script), style=Markup(style))
    return text.lstrip() + "\n"
