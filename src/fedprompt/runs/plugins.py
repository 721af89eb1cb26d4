"""A run keeps its plug-ins: their files in `plugins/`, their hashes in `manifest.json`.

The config that the run directory holds names the copies, so that a run that is continued, or
started again from its `config.yaml`, computes what it computed before, whatever has become of the
files that the experiment named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedprompt.core import plugins
from fedprompt.core.errors import CheckpointError
from fedprompt.core.files import atomic_write
from fedprompt.core.plugins import Plugin
from fedprompt.runs.directory import PLUGINS, RunDirectory


def copy_of(plugin: Plugin) -> str:
    """How the run's own config names a plug-in: a file by its copy, a module by its name.

    >>> copy_of(Plugin("~/rule.py", "m", "/home/me/rule.py", "", (("rule.py", b""),)))
    'plugins/rule.py'
    """
    return f"{PLUGINS}/{plugin.name}.py" if plugin.files else plugin.spec


def keep(folder: Path, used: Iterable[Plugin]) -> None:
    """Write the plug-ins' files into the folder of a run or a sweep.

    Of two YAML files of the same name the first is kept, which is the one that was read.
    """
    contents: dict[str, bytes] = {}
    for plugin in used:
        for name, content in plugin.files:
            contents.setdefault(name, content)
    for name, content in contents.items():
        path = folder / PLUGINS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)


def records(used: Iterable[Plugin]) -> dict[str, list[dict[str, str]]]:
    """What the manifest says of the run's plug-ins, and of installed ones that are in use."""
    return {
        "plugins": [{**plugin.record(), "copy": copy_of(plugin)} for plugin in used],
        "installed_plugins": [plugin.record() for plugin in plugins.imported_installed()],
    }


def check_kept(directory: RunDirectory) -> None:
    """Refuse to continue a run whose plug-ins are not those that it started with.

    Raises:
        ConfigError: one cannot be found or imported.
        CheckpointError: one has another hash.
    """
    for record in directory.read_manifest().get("plugins", []):
        name, copy, expected = record["name"], record["copy"], record["sha256"]
        file = directory.path / copy
        if not copy.endswith(".py"):
            [plugin] = plugins.load_plugins([copy])
            place, found = plugin.path, plugin.sha256
            advice = "install the version that the run started with"
        elif file.is_file():
            place, found = str(file), hashlib.sha256(file.read_bytes()).hexdigest()
            advice = f"put the file back ({record['path']} was its origin)"
        else:
            raise CheckpointError(
                f"plug-in '{name}': expected the run's copy {file}, found none; put it back "
                f"({record['path']} was its origin) or start a new run"
            )
        if found != expected:
            raise CheckpointError(
                f"plug-in '{name}': expected sha256 {expected[:12]}, as when the run started, got "
                f"{found[:12]} ({place}); {advice} or start a new run"
            )


def check_same(directory: RunDirectory, specs: Sequence[str]) -> None:
    """Refuse a sweep whose trials would not all have the same plug-ins.

    Args:
        directory: a run of the sweep that has started.
        specs: plug-ins of the sweep's other trials.

    Raises:
        CheckpointError: the run had another version.
    """
    now = {plugin.name: plugin for plugin in plugins.find(specs)}
    for record in directory.read_manifest().get("plugins", []):
        plugin = now.get(record["name"])
        if plugin is not None and plugin.sha256 != record["sha256"]:
            raise CheckpointError(
                f"plug-in '{plugin.name}': expected sha256 {record['sha256'][:12]}, as in the "
                f"trials that are done, got {plugin.sha256[:12]} ({plugin.path}); put back the "
                f"version of {directory.path / PLUGINS} or start a new sweep"
            )
