"""Letters as fonts draw them: white on black, as large as they fit, in the middle."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from fedprompt.core.errors import InputError
from fedprompt.data.reading.files import signature
from fedprompt.data.reading.images import VERSION, Indices, Pixels

FILLED = 0.7
"""What the longer side of a letter takes of the image's side."""


def draw_letter(font: Path, letter: str, size: int) -> Pixels:
    """One letter: (size, size, 3) uint8.

    Args:
        font: a file that FreeType reads (.ttf, .otf, .woff).
        letter: what to draw.
        size: side in pixels.

    Raises:
        InputError: the file is no font, or the letter is empty in it.
    """
    try:
        left, top, right, bottom = ImageFont.truetype(font, 100).getbbox(letter)
        scaled = ImageFont.truetype(font, 100 * FILLED * size / max(right - left, bottom - top))
    except (OSError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"{font}: expected a font with the letter {letter}, got another file ({error}); "
            "get it again"
        ) from error
    image = Image.new("L", (size, size))
    left, top, right, bottom = scaled.getbbox(letter)
    corner = ((size - left - right) / 2, (size - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, letter, fill=255, font=scaled)
    return np.asarray(image.convert("RGB"))


class GlyphImages:
    """Letters that are drawn on access, an `Images` that can be cut.

    Args:
        fonts: one file for each image.
        letters: one letter for each image.
        size: side in pixels.
    """

    def __init__(self, fonts: Sequence[Path], letters: Sequence[str], size: int) -> None:
        self.size = size
        self.pairs: NDArray[np.object_] = np.empty((len(fonts), 2), dtype=object)
        self.pairs[:, 0], self.pairs[:, 1] = list(fonts), list(letters)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, size, size, 3)"""
        return (len(self.pairs), self.size, self.size, 3)

    def __getitem__(self, index: slice | Indices) -> Pixels:
        chosen = self.pairs[index]
        result = np.empty((len(chosen), *self.shape[1:]), np.uint8)
        for position, (font, letter) in enumerate(chosen):
            result[position] = draw_letter(font, letter, self.size)
        return result

    def take(self, index: Indices) -> GlyphImages:
        """The images at these positions, in this order."""
        return GlyphImages(self.pairs[index, 0], self.pairs[index, 1], self.size)

    def fingerprint(self) -> str:
        """SHA-256 over the fonts (path, length, time of change), letters, size and FreeType."""
        fonts = sorted(set(self.pairs[:, 0]))
        drawn = f"{VERSION}, FreeType {features.version('freetype2')}, {FILLED} of {self.size}"
        digest = hashlib.sha256(f"{drawn}\n{signature(fonts)}\n".encode())
        for font, letter in self.pairs:
            digest.update(f"{font}\0{letter}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()
