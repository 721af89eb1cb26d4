"""One registry for all that is chosen by name: aggregators, objectives, data sets, runtimes ...

A new entry is one file with a decorated class or function. In the registry's package nothing else
is edited, because the registry imports every module there when it is first asked. Anywhere else the
file is a plug-in; see `plugins`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from fedprompt.core import plugins
from fedprompt.core.errors import ConfigError, suggest

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Entry(Generic[T]):
    """What is registered under a name: how to build it, and the dataclass of its options."""

    name: str
    factory: Callable[..., T]
    options: type


class Registry(Generic[T]):
    """Names and how to build what they stand for.

    Args:
        kind: what the entries are, in the words of error messages ("aggregator").
        package: dotted name of the package whose modules register themselves.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, Entry[T]] = {}
        self._missing: dict[str, str] = {}
        self._scanned = False

    def register(self, name: str, options: type) -> Callable[[F], F]:
        """Decorator that registers a factory under `name`; it is called with one instance of
        `options`.

        Raises:
            ConfigError: the name is taken.
        """

        def decorate(factory: F) -> F:
            if not self._is_own(factory):
                self._scan()  # its own names come first, whenever they are asked for
            before = self._entries.get(name)
            if before is not None and not _takes_over(factory, before.factory):
                raise ConfigError(
                    f"{self.kind} '{name}' is registered twice: in {_place(before.factory)} and in "
                    f"{_place(factory)}; choose another name"
                )
            self._entries[name] = Entry(name, factory, options)
            return factory

        return decorate

    def names(self) -> list[str]:
        """All registered names in alphabetical order, those of installed plug-ins included."""
        self._scan()
        plugins.load_installed()
        return sorted(self._entries)

    def entry(self, name: str) -> Entry[T]:
        """The entry called `name`.

        Raises:
            ConfigError: there is none; the message lists the names that exist.
        """
        if name not in self._entries:
            # A module with the entry's name is enough: `serial` must not import Ray.
            self._scan(name)
        if name not in self._entries:
            self._scan()
        if name not in self._entries:
            plugins.load_installed()
        if name not in self._entries:
            absent = [
                f"; {module} needs the package '{package}', which is not installed"
                for module, package in self._missing.items()
            ] + [f"; {failure}" for failure in plugins.failures()]
            hint = suggest(name, self._entries) or "; your own needs its file in plugins: [FILE.py]"
            raise ConfigError(
                f"unknown {self.kind} '{name}': expected one of {', '.join(self.names())}"
                f"{hint}{''.join(absent)}"
            )
        return self._entries[name]

    def create(self, name: str, /, **options: object) -> T:
        """Build the entry called `name` from keyword options.

        Raises:
            ConfigError: unknown name, unknown option, or a value that the options refuse.
        """
        entry = self.entry(name)
        known = [field.name for field in dataclasses.fields(entry.options)]
        for key in options:
            if key not in known:
                raise ConfigError(
                    f"unknown option '{key}' for {self.kind} '{name}': expected one of "
                    f"{', '.join(known) or '(none)'}{suggest(key, known)}"
                )
        return entry.factory(entry.options(**options))

    def _is_own(self, factory: Callable[..., object]) -> bool:
        return factory.__module__.split(".")[0] == self.package.split(".")[0]

    def _scan(self, only: str | None = None) -> None:
        """Import the package's modules, or the one called `only` if there is one."""
        if self._scanned:
            return
        self._scanned = only is None
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if only not in (None, module.name):
                continue
            try:
                importlib.import_module(f"{self.package}.{module.name}")
            except ModuleNotFoundError as error:
                if error.name is None or error.name.split(".")[0] == self.package.split(".")[0]:
                    raise
                # What the others register can be used without it.
                self._missing[module.name] = error.name


def _takes_over(factory: Callable[..., object], before: Callable[..., object]) -> bool:
    """Whether a factory replaces what has its name: after an import that failed, and when its file
    is imported again under another module name (a script that names itself as a plug-in, a plug-in
    that was edited).
    """
    if before.__module__ not in sys.modules:
        return True
    file = _file(factory)
    is_new = factory.__module__ != before.__module__
    same_name = factory.__qualname__ == before.__qualname__
    return is_new and same_name and file is not None and file == _file(before)


def _file(factory: Callable[..., object]) -> str | None:
    return getattr(sys.modules.get(factory.__module__), "__file__", None)


def _place(factory: Callable[..., object]) -> str:
    """Where a factory is from: the dotted name of our own modules, the file of others."""
    module = factory.__module__
    return module if module.startswith("fedprompt.") else _file(factory) or module
