"""Write `constraints.lock`: the version of everything that fedprompt's extras bring, as installed.

    make lock            after a package was added to setup.cfg and installed

What a release does not support of Python 3.10 to 3.12 gets a marker, and is free there.
"""

from __future__ import annotations

import configparser
import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "constraints.lock"
EXTRAS = ("dev", "docs", "real", "svg", "huggingface", "export")
"""`bench` pins a version of Ray of its own."""
PYTHONS = ("3.10", "3.11", "3.12")
HEAD = """# Made by `make lock`: all that the extras dev and docs bring, in the tested versions.
# `make setup` installs these. constraints.txt holds what was chosen by hand, and why.
"""


def declared(extras: Iterable[str] = EXTRAS) -> list[Requirement]:
    """What setup.cfg asks for."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [config["options"]["install_requires"]]
    texts += [config["options.extras_require"][extra] for extra in extras]
    return [Requirement(line) for text in texts for line in text.splitlines() if line.strip()]


def closure(requirements: Iterable[Requirement]) -> dict[str, importlib.metadata.Distribution]:
    """What requirements bring, by its canonical name.

    Raises:
        PackageNotFoundError: something of it is not installed.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(each, "") for each in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        installed = found.setdefault(name, importlib.metadata.distribution(name))
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                todo += [(Requirement(each), wanted) for each in installed.requires or ()]
    return found


def line(distribution: importlib.metadata.Distribution) -> str:
    """A pin, with a marker where the release supports not all Pythons of ours."""
    # "2.12.1+cpu" is 2.12.1 from another place.
    pin = f"{distribution.metadata['Name']}=={Version(distribution.version).public}"
    supported = SpecifierSet(distribution.metadata["Requires-Python"] or "")
    least = next(each for each in PYTHONS if f"{each}.99" in supported)
    return pin if least == PYTHONS[0] else f'{pin}; python_version >= "{least}"'


def lock() -> str:
    """The whole file."""
    pins = sorted(map(line, closure(declared()).values()), key=str.lower)
    return HEAD + "\n".join(pins) + "\n"


if __name__ == "__main__":
    TARGET.write_text(lock(), encoding="utf-8")
    print(f"{TARGET.name}: {len(closure(declared()))} packages, Python {sys.version.split()[0]}")
