"""One registry for all that is chosen by name: aggregators, objectives, data sets, runtimes ...

A new entry is one file in the registry's package with a decorated class or function; nothing else
is edited, because the registry imports every module of its package when it is first asked.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Generic, TypeVar

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
        self._loaded = False

    def register(self, name: str, options: type) -> Callable[[F], F]:
        """Decorator that registers a factory under `name`; it is called with one instance of
        `options`.

        Raises:
            ConfigError: the name is taken.
        """

        def decorate(factory: F) -> F:
            if name in self._entries:
                raise ConfigError(f"{self.kind} '{name}' is registered twice; choose another name")
            self._entries[name] = Entry(name, factory, options)
            return factory

        return decorate

    def names(self) -> list[str]:
        """All registered names in alphabetical order."""
        self._load()
        return sorted(self._entries)

    def entry(self, name: str) -> Entry[T]:
        """The entry called `name`.

        Raises:
            ConfigError: there is none; the message lists the names that exist.
        """
        if name not in self._entries:
            # A module with the entry's name is enough: `serial` must not import Ray.
            self._load(name)
        if name not in self._entries:
            self._load()
        if name not in self._entries:
            absent = [
                f"; {module} needs the package '{package}', which is not installed"
                for module, package in self._missing.items()
            ]
            raise ConfigError(
                f"unknown {self.kind} '{name}': expected one of {', '.join(self.names())}"
                f"{suggest(name, self._entries)}{''.join(absent)}"
            )
        return self._entries[name]

    def create(self, name: str, /, **options: Any) -> T:
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

    def _load(self, only: str | None = None) -> None:
        """Import the package's modules, or the one called `only` if there is one."""
        if self._loaded:
            return
        self._loaded = only is None
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
