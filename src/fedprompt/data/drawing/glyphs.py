"""Characters of the fonts that matplotlib brings, drawn, bent and turned."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Bytes = NDArray[np.uint8]
SIZE = 32
LARGE = 2 * SIZE
"""PIL draws without anti-aliasing, so masks are drawn at twice the size and averaged."""

_LOOK_ALIKES = (
    "AΑАᗅ BΒВ CСϹⅭ DⅮ EΕЕ FϜ HΗНҢ IΙІӀ JЈ aаɑα bЬьЪъ cсϲ dԁ eеёє fƒ gɡ hһћђ iіıι jјϳ "
    "OОΟ oоο lӀ|∣❘ ЗзЭӠӡ бϭ Ѳ Φ ℐ ℑ ∃"
)


# ---------------------------------------------------------------- glyphs


def forbidden_character(character: str) -> bool:
    """Whether pre-training must not show a character: a digit, a letter A-J or a look-alike of one.

    >>> [forbidden_character(c) for c in "a7²JKω"]
    [True, True, True, True, False, False]
    """
    base = unicodedata.normalize("NFKD", character)
    return (
        any(unicodedata.numeric(part, None) is not None for part in base)
        or any(part in "0123456789ABCDEFGHIJabcdefghij" for part in base)
        or any(part in _LOOK_ALIKES for part in base if not part.isspace())
    )


@lru_cache(maxsize=1)
def glyph_characters() -> tuple[str, ...]:
    """The characters that pre-training may draw, most letter-like first."""
    ranges = (
        range(ord("K"), ord("Z") + 1),
        range(ord("k"), ord("z") + 1),
        range(0x0393, 0x03CA),
        range(0x0411, 0x0450),
        range(0x2200, 0x2240),
        range(0x2190, 0x219A),
        range(0x2654, 0x2668),
        range(0x2701, 0x2740),
    )
    candidates = [chr(code) for codes in ranges for code in codes] + list("#$%&*+=?@§¶ß€£")
    return tuple(c for c in candidates if not forbidden_character(c) and has_glyph(c))


@lru_cache(maxsize=1)
def font_folder() -> Path:
    """Where matplotlib keeps the fonts that it ships."""
    import matplotlib  # only for its fonts, and slow to import

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@lru_cache(maxsize=64)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that matplotlib ships, by file name without ending."""
    return ImageFont.truetype(str(font_folder() / f"{name}.ttf"), size)


def has_glyph(character: str, font: str = "DejaVuSans") -> bool:
    """Whether a font has a picture of its own for a character."""
    loaded = load_font(font, 40)
    mask, missing = loaded.getmask(character), loaded.getmask("\uffff")
    return bool(mask.size[0] and mask.size[1]) and bytes(mask) != bytes(missing)


@lru_cache(maxsize=4096)
def glyph_image(character: str, font: str) -> Image.Image:
    """One character, 64 x 64 grey, its ink centred and 44 pixels large at the longer side."""
    left, top, right, bottom = load_font(font, 44).getbbox(character)
    size = int(44 * 44 / max(right - left, bottom - top, 8))
    loaded = load_font(font, min(size, 80))
    left, top, right, bottom = loaded.getbbox(character)
    image = Image.new("L", (LARGE, LARGE))
    position = ((LARGE - left - right) / 2, (LARGE - top - bottom) / 2)
    ImageDraw.Draw(image).text(position, character, fill=255, font=loaded)
    return image


def warp(
    image: Image.Image,
    generator: np.random.Generator,
    rotation: float = 0.4,
    scale: tuple[float, float] = (0.7, 1.15),
    shear: float = 0.2,
) -> Bytes:
    """A 64 x 64 grey image, randomly rotated (standard deviation in radians), sheared and scaled:
    (32, 32).

    Args:
        image: 64 x 64, grey.
        generator: source of every draw.
        rotation: standard deviation of the angle, in radians.
        scale: least and largest factor.
        shear: the most, to either side.
    """
    angle, slant = generator.normal(0, rotation), generator.uniform(-shear, shear)
    width, height = 1 / generator.uniform(*scale, 2)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = width * (cos + slant * sin), width * (-sin + slant * cos)
    d, e = height * sin, height * cos
    middle = LARGE / 2
    shift_x, shift_y = middle - (a + b) * middle, middle - (d + e) * middle
    moved = image.transform(
        (LARGE, LARGE),
        Image.Transform.AFFINE,
        (a, b, shift_x, d, e, shift_y),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(moved.reduce(2))


GLYPH_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold",
    "DejaVuSansMono", "STIXGeneral",
)  # fmt: skip
