"""Write small trees of the packages behind `emoji` and `mixed`, as their archives hold them."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from fedprompt.data.reading.packages import Package
from fedprompt.data.sets.emoji import FLUENT, GOOGLE, OPENMOJI, PACKAGES, TWITTER
from fedprompt.data.sets.fonts import FONTS
from fedprompt.data.sets.mixed import FACES, MNIST, OBJECTS

SIDE = 8
EMOJI_CLASSES = {"drink": "Food & Drink", "tool": "Objects"}


def describe(root: Path, package: Package, version: str | None = None) -> Path:
    """The folder of a package, with its description alone."""
    folder = root / package.folder
    folder.mkdir(parents=True, exist_ok=True)
    content = {"name": package.name, "version": version or package.version}
    (folder / "package.json").write_text(json.dumps(content))
    return folder


def emoji(root: Path, counts: Mapping[str, int] | None = None) -> None:
    """Packages of emoji with as many concepts of each subcategory; 20 of two by default.

    Every second concept has FE0F in its code, which OpenMoji leaves out, and codes begin with a
    zero, which Fluent leaves out.
    """
    counts = {"drink": 20, "tool": 20} if counts is None else counts
    google, twitter, openmoji, fluent = (describe(root, package) for package in PACKAGES)
    entries = []
    generator = np.random.default_rng(0)
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    for number, kind in enumerate(kinds):
        plain = f"0{0xA00 + number:X}"
        unified = f"{plain}-FE0F" if number % 2 else plain
        entries.append(
            {
                "unified": unified,
                "non_qualified": plain if number % 2 else None,
                "category": EMOJI_CLASSES.get(kind, "Others"),
                "subcategory": kind,
                "sort_order": number,
            }
        )
        noise = generator.integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
        for index, folder in enumerate((google / "img/google/64", twitter / "img/twitter/64")):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise[index]).save(folder / f"{unified.lower()}.png")
        for index, colour in enumerate(("color", "black")):
            path = openmoji / colour / "svg" / f"{plain}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(square(f"#{0x100000 * (index + 1) + number:06x}"))
        path = fluent / "assets" / f"{unified.lower().lstrip('0')}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise[2]).save(path, lossless=True)
    (google / "emoji.json").write_text(json.dumps(entries))


def square(colour: str) -> str:
    """A drawing that is one colour all over."""
    shape = f'<rect width="8" height="8" fill="{colour}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{shape}</svg>'


def mnist(root: Path, each: int = 12) -> list[np.ndarray]:
    """The package `mnist` with some noise as digits; returns (each, 28, 28) bytes of each class."""
    folder = describe(root, MNIST) / "src" / "digits"
    folder.mkdir(parents=True)
    written = []
    for digit in range(10):
        pixels = np.random.default_rng(digit).integers(0, 256, (each, 28, 28), np.uint8)
        values = [round(value / 255, 3) for value in pixels.ravel().tolist()]
        (folder / f"{digit}.json").write_text(json.dumps({"data": values}))
        written.append(pixels)
    return written


def font(path: Path, seed: int) -> None:
    """A font whose letters A to J are random triangles."""
    generator = np.random.default_rng(seed)
    letters = "ABCDEFGHIJ"
    glyphs = {}
    for name in (".notdef", *letters):
        pen = TTGlyphPen(None)
        corners = [(0, 0), *((int(x), int(y)) for x, y in generator.integers(300, 1000, (2, 2)))]
        pen.moveTo(corners[0])
        pen.lineTo(corners[1])
        pen.lineTo((corners[2][0], corners[2][1] // 3))
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(letter): letter for letter in letters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": f"triangles {seed}", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.font.flavor = "woff"
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)


def mixed(home: Path, concepts: int = 8) -> None:
    """All packages of `mixed`, with so many concepts of each class of emoji."""
    emoji(home / "emoji", dict.fromkeys((*FACES, *OBJECTS), concepts))
    mnist(home / "mnist")
    for seed, package in enumerate(FONTS):
        folder = describe(home / "fonts", package)
        name = package.name.rpartition("/")[2]
        font(folder / "files" / f"{name}-latin-400-normal.woff", seed)


def packed(folder: Path, archive: Path, more: Sequence[tuple[str, bytes]] = ()) -> None:
    """A package's folder as the archive that `npm pack` writes."""
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, "package")
        for name, content in more:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def styles_of(name: str) -> dict[str, str]:
    """Path of each style's image below the root, for a concept with the code `name`."""
    plain = name.removesuffix("-FE0F")
    return {
        "noto": f"{GOOGLE.folder}/img/google/64/{name.lower()}.png",
        "twemoji": f"{TWITTER.folder}/img/twitter/64/{name.lower()}.png",
        "openmoji": f"{OPENMOJI.folder}/color/svg/{plain}.svg",
        "line": f"{OPENMOJI.folder}/black/svg/{plain}.svg",
        "fluent3d": f"{FLUENT.folder}/assets/{name.lower().lstrip('0')}.webp",
    }


def flat(values: Sequence[Sequence[str]]) -> list[str]:
    """All in one list."""
    return list(itertools.chain.from_iterable(values))
