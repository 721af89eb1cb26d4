"""Folders of classes, and folders of domains that hold folders of classes: which of them a tree is.

    CLASS/IMAGE            a class folder holds images
    DOMAIN/CLASS/IMAGE     a domain folder holds class folders, as in PACS, Office-Home or DomainNet

A tree that could be both, or is neither, is refused with the folders that say so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fedprompt.core.errors import InputError
from fedprompt.data.reading.files import class_folders, image_names, is_image_name

LAYOUTS = ("auto", "class", "domain")


def looks_nested(folder: Path) -> bool:
    """Whether the first folder that holds anything holds folders with images, and no image itself.

    A quick look, which reads few entries of few folders; `recognise` looks at everything.
    """
    for name in class_folders(folder):
        if has_images(folder / name):
            return False
        if any(has_images(folder / name / inner) for inner in class_folders(folder / name)):
            return True
    return False


def has_images(folder: Path) -> bool:
    """Whether an image lies in a folder itself; stops at the first."""
    return any(True for _ in _own_images(folder))


def names_in_folders(folder: Path) -> list[str]:
    """Names of the images in the folders of a folder, relative to it, with `/` between parts.

    Folder after folder, each in the order of `image_names`. Links to folders are followed where
    domains and classes stand, and not further down.
    """
    names: list[str] = []
    for upper in class_folders(folder):
        own = list(_own_images(folder / upper))
        for inner in class_folders(folder / upper):
            own += [f"{inner}/{name}" for name in image_names(folder / upper / inner)]
        names += [f"{upper}/{name}" for name in sorted(own)]
    return names


def _own_images(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_image_name(entry.name) and not entry.is_dir():
                yield entry.name


def recognise(root: Path, splits: Mapping[str, Sequence[str]]) -> str:
    """`class` or `domain`: what the upper folders of a tree are.

    Args:
        root: the tree, for messages.
        splits: names of images, relative to the folder of their split, with `/` between parts. A
            split's key is the name of its folder and `/`, or empty where there is none.

    Raises:
        InputError: it may be either, or is neither; says which folders.

    >>> recognise(Path("pets"), {"": ["cat/1.png", "dog/1.png"]})
    'class'
    >>> recognise(Path("pets"), {"": ["photo/cat/1.png", "photo/dog/1.png", "sketch/cat/1.png"]})
    'domain'
    """
    depths: dict[int, dict[str, str]] = {}  # depth -> upper folder -> where an image lies
    inner: dict[str, set[str]] = {}
    for prefix, names in splits.items():
        for name in names:
            *folders, _ = name.split("/")
            where = f"{prefix}{'/'.join(folders)}"
            depths.setdefault(len(folders), {}).setdefault(folders[0], where)
            inner.setdefault(folders[0], set()).update(folders[1:2])
    if not depths or depths.keys() == {1}:
        return "class"
    if depths.keys() != {2}:
        shown = " and in ".join(next(iter(depths[depth].values())) for depth in sorted(depths)[:2])
        if len(inner) == 1 and 1 not in depths:
            raise _refusal(root, f"all images deep below {shown}", deeper=next(iter(inner)))
        raise _refusal(root, f"images in {shown}")
    if len(inner) == 1:
        (only,) = inner
        raise _refusal(root, f"one folder {only} with {some(inner[only])} in it", deeper=only)
    every = [name for names in inner.values() for name in names]
    if len(set(every)) == 1:
        raise _refusal(root, f"nothing but a folder {every[0]} in each of {some(inner)}")
    if len(set(every)) == len(every):
        raise _refusal(
            root,
            f"{some(inner)}, which share no class: {some(inner[min(inner)])} are in {min(inner)} "
            "alone",
        )
    return "domain"


def _refusal(root: Path, found: str, deeper: str | None = None) -> InputError:
    advice = f"data.root={root / deeper} to go one folder deeper, " if deeper else ""
    return InputError(
        f"{root}: expected CLASS/IMAGE in all folders, or DOMAIN/CLASS/IMAGE in all, with classes "
        f"that domains share, got {found}; set {advice}data.layout=class if the upper folders are "
        "classes, or data.layout=domain if they are domains"
    )


def some(names: Iterable[str]) -> str:
    """The first names, for a message."""
    names = sorted(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def in_domains(folder: Path, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Domain, class and name of each image, where the upper folders are domains.

    Args:
        folder: of the split, for messages.
        names: of images, relative to it.

    Raises:
        InputError: an image lies in a domain folder itself, or a class folder is empty.
    """
    found: list[tuple[str, str, str]] = []
    for name in names:
        parts = name.split("/")
        if len(parts) == 2:
            raise InputError(
                f"{folder}: data.layout=domain expected DOMAIN/CLASS/IMAGE, got the image {name} "
                f"in {parts[0]} itself; move it into the folder of its class"
            )
        found.append((parts[0], parts[1], name))
    full = {(domain, class_name) for domain, class_name, _ in found}
    for domain in class_folders(folder):
        for class_name in class_folders(folder / domain):
            if (domain, class_name) not in full:
                raise InputError(
                    f"{folder / domain / class_name}: expected images of class '{class_name}', "
                    "got none; put some there or remove the folder"
                )
    # Domain after domain, class after class: names alone are in another order ("a b" and "a").
    return sorted(found)
