"""`fedprompt list`: everything that has a name, with a line each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from fedprompt.config import GROUPS, LISTS, REGISTRIES, conf_root, list_experiments
from fedprompt.core import plugins
from fedprompt.core.errors import ConfigError, suggest

OTHERS = ("experiment", "sweep", "method")
"""What is listed beside the groups of `conf/`."""
REGISTERED = {
    **REGISTRIES,
    "logger": LISTS["loggers"],
    "callback": LISTS["callbacks"],
}
KINDS = tuple(dict.fromkeys((*OTHERS, *GROUPS, *REGISTERED)))
COMMENT = re.compile(r"#\s*(.+)")
NO_WORDS = ("fedprompt ", "Source:")
"""How comments begin that do not say what a file is."""


@dataclasses.dataclass(frozen=True)
class Named:
    """Something that an experiment can name."""

    name: str
    words: str
    """What it is, in a line."""
    plugin: str = ""
    """Where it comes from, if not from this package."""


def kind_of(word: str) -> str:
    """What a user asks for, in the singular or the plural.

    >>> kind_of("aggregators"), kind_of("data"), kind_of("sweeps")
    ('aggregator', 'data', 'sweep')

    Raises:
        ConfigError: there is no such kind.
    """
    names = {**{kind: kind for kind in KINDS}, **{f"{kind}s": kind for kind in KINDS}}
    if word not in names:
        raise ConfigError(
            f"list: expected one of {', '.join(KINDS)}, got '{word}'{suggest(word, list(names))}"
        )
    return names[word]


def named(kind: str) -> list[Named]:
    """All that a kind has, in alphabetical order.

    Args:
        kind: of `KINDS`.
    """
    if kind == "experiment":
        return [Named(name, _words_of_experiment(name)) for name in list_experiments()]
    files = _files(kind)
    found = {name: Named(name, words_of(path), source) for name, (path, source) in files.items()}
    registry = REGISTERED.get(kind)
    for name in registry.names() if registry is not None else ():
        factory = registry.entry(name).factory  # type: ignore[union-attr]
        ours = factory.__module__.split(".")[0] == "fedprompt"
        before = found.get(name, Named(name, ""))
        found[name] = Named(
            name,
            before.words or _first_line(factory.__doc__),
            before.plugin or ("" if ours else factory.__module__),
        )
    return [found[name] for name in sorted(found)]


def words_of(path: Path) -> str:
    """The first sentence of the first comment of a YAML file; empty without one."""
    said: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = COMMENT.search(line)
        if match and not match[1].startswith(NO_WORDS):
            said.append(match[1])
        elif said:
            break
        if said and not line.startswith("#"):  # at the end of a line of YAML
            break
    return _sentence(" ".join(said))


def _files(kind: str) -> dict[str, tuple[Path, str]]:
    """The YAML files of a kind by name, our own and those of plug-ins, and whose they are."""
    roots = [(conf_root(), ""), *((folder, str(folder)) for folder in _folders())]
    return {
        path.stem: (path, source)
        for root, source in reversed(roots)
        for path in sorted((root / kind).glob("*.yaml"))
    }


def _folders() -> Iterable[Path]:
    return plugins.conf_folders(installed=True)


def _words_of_experiment(name: str) -> str:
    path = conf_root() / "experiment" / f"{name}.yaml"
    return words_of(path if path.is_file() else path.with_name("table.yaml"))


def _first_line(text: str | None) -> str:
    return _sentence((text or "").strip().partition("\n")[0])


def _sentence(text: str) -> str:
    """The first sentence, without the point.

    >>> _sentence("One kind. And more of it."), _sentence("see map, e.g. here")
    ('One kind', 'see map, e.g. here')
    """
    return re.split(r"\.\s+(?=[A-Z`])", text.strip())[0].rstrip(".")
