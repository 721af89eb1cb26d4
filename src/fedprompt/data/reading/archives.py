"""Unpack an archive that someone else made: inside one folder, within a size, all or nothing."""

from __future__ import annotations

import lzma
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from fedprompt.core.errors import ConfigError, InputError

MAX_BYTES = 8 << 30
"""What an archive may unpack to; the largest that is accepted, TinyImageNet's, has 0.3 GB."""
MAX_MEMBERS = 1_000_000

Member = tuple[str, str, int, Callable[[], IO[bytes]]]
"""Name, kind (`file`, `folder`, or what else it is), size in bytes, and how to open it."""


def unpack(
    archive: Path,
    folder: str,
    max_bytes: int = MAX_BYTES,
    max_members: int = MAX_MEMBERS,
    target: Path | None = None,
    keep: Callable[[str], bool] = lambda name: True,
) -> Path:
    """Unpack one folder of a zip or (compressed) tar archive, by default beside the archive.

    Everything is written to a temporary folder first, which is renamed at the end: the result is
    whole or absent, also when several processes start at once.

    Args:
        archive: the file.
        folder: name of the folder in the archive that is kept.
        max_bytes: what all members together may hold.
        max_members: how many there may be.
        target: what the folder becomes; None means a folder of its name beside the archive.
        keep: which members to write, by name; the others are checked and passed over.

    Returns:
        The folder.

    Raises:
        InputError: the archive is damaged, too large, or holds an absolute path, `..`, a link, a
            device or a name twice.
        ConfigError: the archive's folder cannot be written to.
    """
    target = target or archive.parent / folder
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=target.parent))
    except OSError as error:
        raise ConfigError(
            f"{archive} cannot be unpacked in {target.parent} ({error.strerror}); "
            "unpack it elsewhere and set data.root"
        ) from error
    try:
        members = _zip_members if zipfile.is_zipfile(archive) else _tar_members
        try:
            _write(archive, members(archive), temporary, max_bytes, max_members, keep)
        except (
            *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError),
            RuntimeError,  # a zip method that is not known; a password
            *(OSError, ValueError),  # a name that is no text
        ) as error:
            message = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{archive} cannot be unpacked ({message}); get it again or unpack it by hand"
            ) from error
        if not (temporary / folder).is_dir():
            raise InputError(f"{archive}: expected the folder {folder} in it; get it again")
        try:
            (temporary / folder).rename(target)
        except OSError as error:
            if not target.is_dir():  # else another process was faster, with the same content
                raise ConfigError(f"{target} cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write(
    archive: Path,
    members: Iterator[Member],
    target: Path,
    max_bytes: int,
    max_members: int,
    keep: Callable[[str], bool],
) -> None:
    total = 0
    for count, (name, kind, size, open_member) in enumerate(members, start=1):
        total += size
        if total > max_bytes or count > max_members:
            raise InputError(
                f"{archive}: expected at most {max_bytes} bytes in {max_members} files, got more "
                f"at '{name}'; it is not the published archive"
            )
        path = target / _inside(archive, name)
        if kind == "folder":
            path.mkdir(parents=True, exist_ok=True)
        elif kind == "file" and not keep(name):
            continue
        elif kind == "file":
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file, open_member() as content:
                shutil.copyfileobj(content, file, 1 << 20)
            if path.stat().st_size != size:
                raise InputError(f"{archive}: '{name}' is truncated; get the archive again")
        else:
            raise InputError(
                f"{archive}: expected files and folders alone, got the {kind} '{name}'; "
                "it is not the published archive"
            )


def _inside(archive: Path, name: str) -> PurePosixPath:
    """A member's name as a path that cannot leave the folder it is put into."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise InputError(
            f"{archive}: expected names inside the archive's folder, got '{name}'; "
            "it is not the published archive"
        )
    return path


def _tar_members(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive) as file:
        for member in file:
            kind = "file" if member.isreg() else "folder" if member.isdir() else "special file"
            if member.issym() or member.islnk():
                kind = "link"

            def open_member(member: tarfile.TarInfo = member) -> IO[bytes]:
                content = file.extractfile(member)
                if content is None:
                    raise tarfile.ReadError(f"'{member.name}' holds nothing")
                return content

            yield member.name, kind, member.size, open_member


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            # The upper half holds the Unix mode, or 0 where the archive was made elsewhere.
            mode = stat.S_IFMT(member.external_attr >> 16)
            kind = "folder" if member.is_dir() else "file"
            if stat.S_ISLNK(mode):
                kind = "link"
            elif mode not in (0, stat.S_IFREG, stat.S_IFDIR):
                kind = "special file"

            def open_member(member: zipfile.ZipInfo = member) -> IO[bytes]:
                return file.open(member)

            yield member.filename, kind, member.file_size, open_member
