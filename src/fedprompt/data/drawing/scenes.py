"""Scenes of the task `domains`: digits, letters and patterns, each laid in random colours on a
ground.

Each function takes the classes of N images, and gives (N, 32, 32, 3) in [0, 1]. `difficulty` is 0
for clean images and 1 for the hardest.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedprompt.data.drawing.composition import Grounds, hsv_to_rgb, moved
from fedprompt.data.drawing.glyphs import SIZE, Bytes, glyph_image, warp
from fedprompt.data.drawing.patterns import HELD_OUT_PATTERNS
from fedprompt.data.drawing.shapes import draw_class

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

LETTERS = tuple("ABCDEFGHIJ")
PATTERN_CLASSES = ("stripes", "checks", "dots", "rings", "plaid", "bricks", *HELD_OUT_PATTERNS)

_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral",
    "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10",
    "cmtt10", "cmmi10",
)  # fmt: skip


def _colour(
    count: int,
    generator: np.random.Generator,
    value: tuple[float, float] = (0.1, 1.0),
    saturation: tuple[float, float] = (0.2, 1.0),
) -> Floats:
    """Random colours, ready to be laid over images: (count, 1, 1, 3)."""
    hue = generator.random(count)
    colour = hsv_to_rgb(
        hue, generator.uniform(*saturation, count), generator.uniform(*value, count)
    )
    return colour[:, None, None]


@lru_cache(maxsize=1)
def _textures() -> Grounds:
    return Grounds(("clouds", "grain", "cells", "waves", "plaid", "gradient", "bricks"), 300, 1)


def blended(masks: Bytes, generator: np.random.Generator, difficulty: float) -> Floats:
    """|texture - digit| in random colours (after MNIST-M).

    Args:
        masks: (N, 32, 32) uint8, the digits.
        generator: source of every draw.
        difficulty: 0 to 1; weakens the pen.
    """
    count = len(masks)
    ink, _ = moved(masks, np.zeros_like(masks), np.zeros(count, bool), 3, generator)
    textures = _textures()
    kinds = generator.integers(0, len(textures.kinds), count)
    field = textures.sample(kinds, generator)[..., None]
    first, second = (_colour(count, generator) for _ in range(2))
    weak = generator.uniform(0.9 - 0.65 * difficulty, 1.0, (count, 1, 1, 1)).astype(np.float32)
    pen = _colour(count, generator, (0.9, 1.0), (0.0, 0.6)) * weak
    return np.abs(first + field * (second - first) - ink * pen)


@lru_cache(maxsize=1)
def _grains() -> Grounds:
    return Grounds(("flat", "grain", "clouds"), 300, 2)


def letters(own: Integers, generator: np.random.Generator, difficulty: float) -> Floats:
    """One letter in one of many fonts, turned and sheared (after notMNIST).

    Args:
        own: (N,) index into `LETTERS`.
        generator: source of every draw.
        difficulty: 0 to 1; bends the letter, weakens the pen, roughens the ground.
    """
    fonts = generator.integers(0, len(_FONTS), len(own))
    rotation, shear = 0.1 + 0.7 * difficulty, 0.15 + 0.45 * difficulty
    masks = np.stack(
        [
            warp(glyph_image(LETTERS[label], _FONTS[font]), generator, rotation, (0.5, 1.1), shear)
            for label, font in zip(own, fonts, strict=True)
        ]
    )
    ink, _ = moved(masks, np.zeros_like(masks), np.zeros(len(own), bool), 4, generator)
    ground = _colour(len(own), generator, (0.05, 1.0), (0.0, 0.5))
    step = generator.uniform(0.55 - 0.7 * difficulty, 0.6, (len(own), 1, 1, 1)).astype(np.float32)
    pen = np.clip(
        np.where(ground.mean(axis=3, keepdims=True) > 0.5, ground - step, ground + step), 0, 1
    )
    grains = _grains()
    rough = grains.sample(generator.integers(0, len(grains.kinds), len(own)), generator)[..., None]
    depth = generator.uniform(0, 0.2 + 0.6 * difficulty, (len(own), 1, 1, 1)).astype(np.float32)
    ground = ground + depth * (rough - 0.5) * (rough.max(axis=(1, 2), keepdims=True) > 0)
    return np.asarray(ground + ink * (pen - ground), dtype=np.float32)


@lru_cache(maxsize=1)
def _pattern_stock() -> Grounds:
    return Grounds(PATTERN_CLASSES, 800, 3, (2.0, 4.5))


@lru_cache(maxsize=1)
def _distractors() -> Bytes:
    """Objects that hide part of a pattern, a little more than half as large as the image: (M, 32,
    32).
    """
    families = [("figures", 40), ("glyphs", 60), ("characters", 60)]
    large = np.concatenate(
        [draw_class(name, index, 6, 4)[0] for name, many in families for index in range(many)]
    )
    side, edge = 18, (SIZE - 18) // 2
    small = [Image.fromarray(mask).resize((side, side), Image.Resampling.BOX) for mask in large]
    return np.pad(
        np.stack([np.asarray(mask) for mask in small]), ((0, 0), (edge, edge), (edge, edge))
    )


def covered_patterns(own: Integers, generator: np.random.Generator, difficulty: float) -> Floats:
    """A pattern in two colours, partly hidden by an object that says nothing.

    Args:
        own: (N,) index into `PATTERN_CLASSES`.
        generator: source of every draw.
        difficulty: 0 to 1; brings the two colours closer.
    """
    field = _pattern_stock().sample(own, generator)[..., None]
    first = _colour(len(own), generator)
    step = generator.uniform(0.7 - 0.3 * difficulty, 0.8, (len(own), 1, 1, 1)).astype(np.float32)
    toward = np.where(first.mean(axis=3, keepdims=True) > 0.5, -1, 1)
    tint = _colour(len(own), generator, (0.5, 1.0), (0.0, 1.0)) * 1.4
    second = np.clip(first + toward * step * tint, 0, 1)
    objects = _distractors()
    chosen = objects[generator.integers(0, len(objects), len(own))]
    ink, _ = moved(chosen, np.zeros_like(chosen), np.zeros(len(own), bool), 6, generator)
    ground = first + field * (second - first)
    return np.asarray(ground + ink * (_colour(len(own), generator) - ground), dtype=np.float32)
