"""Archives are unpacked inside one folder, all or nothing; whatever could leave it is refused."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.reading.archives import unpack


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for member, content in members:
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def file(name: str, content: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), content


def zipped(path: Path, *names: str, mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            archive.writestr(member, "content")
    return path


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A folder with something beside it that must stay as it is."""
    (tmp_path / "box").mkdir()
    (tmp_path / "victim").write_text("whole")
    return tmp_path / "box"


def test_one_folder_is_kept(box: Path) -> None:
    members = file("./data/a/b.bin", b"abc"), file("data/c.txt"), file("other/d.txt")
    archive = tar(box / "a.tar.gz", special("data", tarfile.DIRTYPE), *members)
    assert unpack(archive, "data") == box / "data"
    assert everything(box) == {"a.tar.gz", "data", "data/a", "data/a/b.bin", "data/c.txt"}
    assert (box / "data/a/b.bin").read_bytes() == b"abc"
    assert stat.S_IMODE((box / "data").stat().st_mode) & 0o500 == 0o500


def test_a_zip_archive(box: Path) -> None:
    unpack(zipped(box / "a.zip", "data/", "data/x/y.txt"), "data")
    assert everything(box) == {"a.zip", "data", "data/x", "data/x/y.txt"}


def test_a_second_process_that_was_faster_is_no_error(box: Path) -> None:
    archive = tar(box / "a.tar.gz", file("data/c.txt"))
    (box / "data").mkdir()
    (box / "data" / "c.txt").write_text("from the other")
    assert unpack(archive, "data") == box / "data"
    assert everything(box) == {"a.tar.gz", "data", "data/c.txt"}


Maker = Callable[[Path], Path]
HARMFUL: dict[str, tuple[Maker, str]] = {
    "absolute": (lambda b: tar(b / "a.tar", file("/tmp/evil")), "got '/tmp/evil'"),
    "up": (lambda b: tar(b / "a.tar", file("data/../../victim")), r"got 'data/\.\./\.\./victim'"),
    "symlink": (
        lambda b: tar(b / "a.tar", special("data/l", tarfile.SYMTYPE, "../..")),
        "got the link 'data/l'",
    ),
    "through a symlink": (
        lambda b: tar(
            b / "a.tar", special("data", tarfile.SYMTYPE, ".."), file("data/victim", b"evil")
        ),
        "got the link 'data'",
    ),
    "hard link": (
        lambda b: tar(b / "a.tar", special("data/l", tarfile.LNKTYPE, "/etc/passwd")),
        "got the link 'data/l'",
    ),
    "device": (
        lambda b: tar(b / "a.tar", special("data/d", tarfile.CHRTYPE)),
        "got the special file 'data/d'",
    ),
    "pipe": (
        lambda b: tar(b / "a.tar", special("data/p", tarfile.FIFOTYPE)),
        "got the special file 'data/p'",
    ),
    "twice": (lambda b: tar(b / "a.tar", file("data/x"), file("data/x")), "File exists"),
    "too big": (
        lambda b: tar(b / "a.tar.gz", file("data/x"), file("data/zeros", bytes(2000))),
        "at most 1000 bytes in 4 files, got more at 'data/zeros'",
    ),
    "too many": (
        lambda b: tar(b / "a.tar", *(file(f"data/{n}") for n in range(5))),
        "got more at 'data/4'",
    ),
    "other content": (lambda b: tar(b / "a.tar", file("x/y")), "expected the folder data in it"),
    "no archive": (lambda b: text(b / "a.tar", b"hello"), "cannot be unpacked"),
    "truncated": (lambda b: truncated(b / "a.tar.gz"), "cannot be unpacked"),
    "zip absolute": (lambda b: zipped(b / "a.zip", "/tmp/evil"), "got '/tmp/evil'"),
    "zip up": (lambda b: zipped(b / "a.zip", "data/../../victim"), "names inside the archive"),
    "zip backslash": (lambda b: zipped(b / "a.zip", "data/..\\..\\x"), "names inside the archive"),
    "zip drive": (lambda b: zipped(b / "a.zip", "C:/x"), "names inside the archive"),
    "zip symlink": (
        lambda b: zipped(b / "a.zip", "data/l", mode=stat.S_IFLNK | 0o777),
        "got the link 'data/l'",
    ),
    "zip device": (
        lambda b: zipped(b / "a.zip", "data/d", mode=stat.S_IFCHR | 0o777),
        "got the special file",
    ),
    "zip damaged": (lambda b: damaged(b / "a.zip"), "cannot be unpacked"),
}


def text(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def truncated(path: Path) -> Path:
    noise = np.random.default_rng(0).bytes(900)
    content = tar(path, file("data/x", noise)).read_bytes()
    return text(path, content[: len(content) // 2])


def damaged(path: Path) -> Path:
    content = bytearray(zipped(path, "data/x").read_bytes())
    content[content.index(b"content")] ^= 1  # its checksum no longer holds
    return text(path, bytes(content))


@pytest.mark.parametrize("case", HARMFUL)
def test_what_could_do_harm_is_refused_and_leaves_nothing(box: Path, case: str) -> None:
    make, message = HARMFUL[case]
    archive = make(box)
    before = everything(box.parent)
    with pytest.raises(InputError, match=rf"^[^\n]*{message}[^\n]*\Z") as error:
        unpack(archive, "data", max_bytes=1000, max_members=4)
    assert str(archive) in str(error.value)
    assert everything(box.parent) == before
    assert (box.parent / "victim").read_text() == "whole"


def test_a_size_that_lies_is_found(box: Path) -> None:
    """The limit counts what headers promise, so a member must not hold more than that."""
    archive = zipped(box / "a.zip", "data/x")
    content = archive.read_bytes().replace((7).to_bytes(4, "little"), (3).to_bytes(4, "little"))
    archive.write_bytes(content)
    with pytest.raises(InputError, match="cannot be unpacked"):
        unpack(archive, "data")
    assert everything(box) == {"a.zip"}


def test_a_folder_that_cannot_be_written_to(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tar(box / "a.tar", file("data/x"))

    def refuse(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ConfigError, match=r"unpack it elsewhere and set data\.root"):
        unpack(archive, "data")
