"""Plug-ins: modules and files outside the package that register entries of their own.

An experiment names them (`plugins: [trimmed_mean.py, my_package.rules]`). Installed packages offer
theirs by an entry point of the group `fedprompt.plugins`; these are imported when a name is asked
for that nothing else has.

A file is imported under a name made of its own name and its content's hash. The same bytes are
therefore the same module wherever they lie, and what pickles of its classes refer to can be made in
any process: `loaded()` there, `install(...)` here. `Parcel` does both around a pickle.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pickle
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

from fedprompt.core.errors import ConfigError, FedpromptError

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENTRY_POINTS = "fedprompt.plugins"
"""The group of entry points by which installed packages offer plug-ins."""
FILE_MODULE = "fedprompt_plugin_"
"""How the module names of plug-in files start."""
CONF = "conf"
"""The folder beside a plug-in that holds its GROUP/NAME.yaml."""
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A plug-in that is imported."""

    spec: str
    """As it was written."""
    module: str
    """Name under which it is imported."""
    path: str
    """Its file; of a package, the folder."""
    sha256: str
    """Of the file; of a package, of all its Python files."""
    files: tuple[tuple[str, bytes], ...] = dataclasses.field(default=(), repr=False, compare=False)
    """Of a plug-in file: itself and the YAML files beside it, as (path in its folder, content).
    They travel with a run. An importable module has none: it has to be installed everywhere."""

    @property
    def name(self) -> str:
        """The file's name without its ending, or the dotted name."""
        return Path(self.path).stem if self.files else self.module

    @property
    def key(self) -> str:
        """What a composed config calls it: a file by its full path, a module by its name."""
        return self.path if self.files else self.module

    def record(self) -> dict[str, str]:
        """What a manifest keeps of it."""
        return {"name": self.name, "path": self.path, "sha256": self.sha256}


_plugins: dict[str, Plugin] = {}
"""What experiments named in this process: files by path, modules by name."""
_installed: dict[str, Plugin] | None = None
"""What entry points offer, by the entry point's name; None until someone asks."""
_failures: list[str] = []
"""One line for each entry point that cannot be used."""


def load_plugins(specs: Sequence[str], base: Path | None = None) -> tuple[Plugin, ...]:
    """Import plug-ins; what is imported already is not imported again.

    Args:
        specs: dotted names of modules, or paths of files that end in `.py`.
        base: the folder that relative paths start from; None is the working directory.

    Raises:
        ConfigError: one cannot be found, raises when it is imported, or takes a name that is taken.
    """
    if isinstance(specs, str):
        raise ConfigError(f"plugins: expected a list such as [{specs}], got the text '{specs}'")
    found = tuple(_load(spec, base or Path()) for spec in specs)
    names: dict[str, Plugin] = {}
    for plugin in found:
        before = names.setdefault(plugin.name, plugin)
        if before.sha256 != plugin.sha256:
            raise ConfigError(
                f"plug-ins '{before.spec}' and '{plugin.spec}': expected different names, because "
                f"a run keeps both in one folder, got {plugin.name} twice; rename one"
            )
    return found


def absolute(specs: Sequence[str], base: Path) -> list[str]:
    """The specs with full paths in place of relative ones; names of modules stay.

    >>> absolute(["../rule.py", "my_package.rules"], Path("/lab/runs"))
    ['/lab/rule.py', 'my_package.rules']
    """
    return [os.fspath(_full_path(spec, base)) if spec.endswith(".py") else spec for spec in specs]


def _full_path(spec: str, base: Path) -> Path:
    return (base / Path(spec).expanduser()).resolve()


def find(specs: Sequence[str]) -> tuple[Plugin, ...]:
    """Plug-ins that are loaded, by path or dotted name; no file is read."""
    return tuple(_plugins[spec] for spec in specs)


def loaded() -> tuple[Plugin, ...]:
    """All plug-ins that were named in this process, in that order; installed ones are not."""
    return tuple(_plugins.values())


def install(plugins: Sequence[Plugin]) -> None:
    """Have plug-ins that another process loaded in this one; their files need not exist here.

    Raises:
        ConfigError: a module is not installed here, or not in the same version.
    """
    for plugin in plugins:
        if plugin.files:
            _admit(plugin)
            continue
        here = _load_module(plugin.spec)
        if here.sha256 != plugin.sha256:
            raise ConfigError(
                f"plug-in '{plugin.spec}': expected sha256 {plugin.sha256[:12]}, as where the run "
                f"was started, got {here.sha256[:12]} ({here.path}); install the same version on "
                "every machine"
            )
        _plugins[plugin.key] = here


@dataclasses.dataclass(frozen=True)
class Parcel(Generic[T]):
    """A pickle with the plug-ins that its content may be made of, to be opened in any process."""

    plugins: tuple[Plugin, ...]
    content: bytes

    @classmethod
    def pack(cls, value: T) -> Parcel[T]:
        """The parcel of a value, with all plug-ins of this process."""
        return cls(loaded(), pickle.dumps(value))

    def open(self) -> T:
        """The value; its plug-ins are installed first.

        Raises:
            ConfigError: a plug-in is missing here, or a class of the value.
        """
        install(self.plugins)
        try:
            value: T = pickle.loads(self.content)
        except (AttributeError, ImportError) as error:
            raise ConfigError(
                "the experiment uses a class that only the process knows which started it "
                f"({error}); name the file that defines it: plugins: [FILE.py]"
            ) from error
        return value


def load_installed() -> tuple[Plugin, ...]:
    """Import what installed packages offer, once; what cannot be used is in `failures`."""
    global _installed
    if _installed is None:
        _installed = {}  # first: a plug-in that is imported asks for names, too
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
            try:
                _installed[entry.name] = _load_module(entry.module)
            except ConfigError as error:
                logger.info("%s", error)  # whoever asks for an unknown name reads it
                _failures.append(str(error))
    return tuple(_installed.values())


def imported_installed() -> tuple[Plugin, ...]:
    """Of what installed packages offer, that which this process has imported."""
    entries = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return tuple(_load_module(entry.module) for entry in entries if entry.module in sys.modules)


def failures() -> tuple[str, ...]:
    """One line for each installed plug-in that could not be used."""
    return tuple(_failures)


def conf_folders(installed: bool = False) -> list[Path]:
    """Folders of the plug-ins' YAML files, GROUP/NAME.yaml, in the order of the plug-ins.

    Args:
        installed: look for plug-ins of installed packages first, which takes a moment.
    """
    if installed:
        load_installed()
    known = [*_plugins.values(), *(_installed or {}).values()]
    folders = dict.fromkeys(_conf_folder(plugin) for plugin in known)
    return [folder for folder in folders if folder.is_dir()]


def _conf_folder(plugin: Plugin) -> Path:
    path = Path(plugin.path)
    if plugin.files and len(plugin.files) > 1 and not path.is_file():
        return _written(plugin) / CONF  # it came from another machine
    return (path if path.is_dir() else path.parent) / CONF


def _written(plugin: Plugin) -> Path:
    """A temporary folder of this process that holds the plug-in's files."""
    if plugin.sha256 not in _copies:
        folder = Path(tempfile.mkdtemp(prefix="fedprompt-plugin-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for name, content in plugin.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        _copies[plugin.sha256] = folder
    return _copies[plugin.sha256]


_copies: dict[str, Path] = {}


def _load(spec: str, base: Path) -> Plugin:
    if spec.endswith(".py"):
        return _load_file(spec, base)
    if not _DOTTED.fullmatch(spec):
        raise ConfigError(
            f"plug-in '{spec}': expected the dotted name of a module or the path of a file that "
            "ends in .py"
        )
    if spec not in _plugins:
        _plugins[spec] = _load_module(spec, base)
    return _plugins[spec]


def _load_file(spec: str, base: Path) -> Plugin:
    """Read a file and import what was read."""
    path = _full_path(spec, base)
    if not path.is_file() and os.fspath(path) in _plugins:
        return _plugins[os.fspath(path)]  # another machine sent it
    try:
        source = path.read_bytes()
    except OSError as error:
        start = "current" if base == Path() else "experiment file's"
        raise ConfigError(
            f"plug-in '{spec}': expected a Python file, got '{error.strerror}' for {path}; relative"
            f" paths start from the {start} folder"
        ) from error
    yaml = sorted((path.parent / CONF).glob("*/*.yaml"))
    beside = ((file.relative_to(path.parent), file.read_bytes()) for file in yaml)
    plugin = Plugin(
        spec,
        module_name(path.stem, source),
        os.fspath(path),
        hashlib.sha256(source).hexdigest(),
        ((path.name, source), *((name.as_posix(), content) for name, content in beside)),
    )
    return _admit(plugin)


def module_name(stem: str, source: bytes) -> str:
    """The name under which a file of this content is imported.

    >>> module_name("my-rule", b"")
    'fedprompt_plugin_my_rule_e3b0c44298fc'
    """
    digest = hashlib.sha256(source).hexdigest()
    return f"{FILE_MODULE}{re.sub(r'[^0-9a-zA-Z_]', '_', stem)}_{digest[:12]}"


def _admit(plugin: Plugin) -> Plugin:
    """Run a plug-in file's source as its module, unless that was done before, and note it."""
    if plugin.module not in sys.modules:
        spec = importlib.util.spec_from_file_location(plugin.module, plugin.path)
        if spec is None:
            raise ConfigError(f"plug-in '{plugin.spec}': expected a file that ends in .py")
        module = importlib.util.module_from_spec(spec)
        # First: dataclasses and pickle look for the module of what they are given.
        sys.modules[plugin.module] = module
        try:
            # The bytes that were hashed, not what the file holds by now.
            code = compile(plugin.files[0][1], plugin.path, "exec", dont_inherit=True)
            exec(code, vars(module))
        except (Exception, SystemExit) as error:  # a script may call `sys.exit` or parse arguments
            del sys.modules[plugin.module]
            raise _import_error(plugin.spec, error, plugin.path) from error
    _plugins[plugin.path] = plugin
    return plugin


def _load_module(name: str, base: Path | None = None) -> Plugin:
    """Import a module by its dotted name."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _import_error(name, error) from error
        near = f"{name}.py"
        hint = f"; did you mean '{near}'?" if base is not None and (base / near).is_file() else ""
        raise ConfigError(
            f"plug-in '{name}': expected a module that can be imported, found none; install its "
            f"package, or give the path of a .py file{hint}"
        ) from error
    except (Exception, SystemExit) as error:
        raise _import_error(name, error) from error
    path = _place(module)
    return Plugin(name, name, os.fspath(path), _hash(path))


def _place(module: ModuleType) -> Path:
    """The file of a module, or the folder of a package.

    Raises:
        ConfigError: it has none, as the interpreter's own.
    """
    folders, file = getattr(module, "__path__", None), getattr(module, "__file__", None)
    if folders:
        return Path(next(iter(folders)))
    if file is None:
        raise ConfigError(f"plug-in '{module.__name__}': expected a module that has a file")
    return Path(file)


def _hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all Python files in a folder."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(path).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _import_error(spec: str, error: Exception | SystemExit, file: str | None = None) -> ConfigError:
    """What an import raised, in one line, with the place, in `file` if that is given."""
    text = " ".join(str(error).split())
    if isinstance(error, FedpromptError):
        return ConfigError(f"plug-in '{spec}': {text}")
    if isinstance(error, SyntaxError):
        text, place = str(error.msg), f"{error.filename}:{error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        frame = [each for each in frames if each.filename == file or file is None][-1]
        place = f"{frame.filename}:{frame.lineno}"
    return ConfigError(
        f"plug-in '{spec}': its import failed with {type(error).__name__}: {text} ({place})"
    )
