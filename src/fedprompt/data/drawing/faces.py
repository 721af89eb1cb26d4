"""Schematic faces of random build and colouring, with seven expressions."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fedprompt.data.drawing.composition import hsv_to_rgb
from fedprompt.data.drawing.glyphs import SIZE

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

EXPRESSIONS = ("neutral", "happy", "sad", "angry", "surprised", "afraid", "disgusted")


@dataclasses.dataclass(frozen=True)
class Look:
    """An expression in numbers; lengths in units of the face's half height."""

    brow_tilt: float
    """Degrees; positive lifts the inner ends."""
    brow_lift: float
    eye_open: float
    mouth_curve: float
    """Positive smiles."""
    mouth_open: float
    mouth_skew: float


_LOOKS = (
    Look(0, 0.00, 0.13, 0.00, 0.02, 0.00),
    Look(4, 0.03, 0.11, 0.22, 0.06, 0.00),
    Look(22, 0.02, 0.10, -0.18, 0.02, 0.00),
    Look(-24, -0.05, 0.10, -0.10, 0.05, 0.00),
    Look(6, 0.12, 0.20, 0.00, 0.24, 0.00),
    Look(22, 0.10, 0.19, -0.08, 0.13, 0.00),
    Look(-12, -0.05, 0.06, -0.12, 0.03, 0.16),
)


def faces(own: Integers, generator: np.random.Generator, difficulty: float) -> Floats:
    """Schematic faces: (N, 32, 32, 3) in [0, 1].

    Args:
        own: (N,) index into `EXPRESSIONS`.
        generator: source of every draw.
        difficulty: 0 (clean) to 1: how far expressions overlap and faces lean.
    """
    return np.stack([_face(_LOOKS[label], generator, difficulty) for label in own])


def _face(look: Look, generator: np.random.Generator, difficulty: float) -> Floats:
    """One face of random build and colouring: (32, 32, 3) in [0, 1]."""
    scale = 2 * SIZE
    spread = np.array([7, 0.03, 0.025, 0.06, 0.025, 0.03]) * (0.1 + 0.8 * difficulty)
    tilt, lift, opening, curve, mouth, skew = (
        np.array(dataclasses.astuple(look)) + generator.normal(0, 1, 6) * spread
    )
    ground, hair, skin, dark, lips = _face_colours(generator)
    image = Image.new("RGB", (scale, scale), ground)
    draw = ImageDraw.Draw(image)
    x, y = scale / 2 + generator.uniform(-4, 4, 2)
    tall = generator.uniform(22, 28)
    wide = tall * generator.uniform(0.72, 0.95)
    draw.ellipse([x - wide * 1.1, y - tall * 1.15, x + wide * 1.1, y + tall * 0.5], fill=hair)
    draw.ellipse([x - wide, y - tall * 0.95, x + wide, y + tall], fill=skin)
    apart = wide * generator.uniform(0.38, 0.46)
    level = y - tall * generator.uniform(0.12, 0.2)
    width = int(generator.integers(2, 4))
    half = wide * generator.uniform(0.22, 0.28)
    for side in (-1, 1):
        eye = x + side * apart
        height = tall * max(opening, 0.03)
        draw.ellipse([eye - half, level - height, eye + half, level + height], fill=(240, 240, 235))
        pupil = min(half, height) * 0.75
        draw.ellipse([eye - pupil, level - pupil, eye + pupil, level + pupil], fill=dark)
        brow = level - tall * (0.24 + lift)
        rise = np.tan(np.radians(tilt)) * half * 1.3
        draw.line(
            [eye - side * half * 1.3, brow - rise, eye + side * half * 1.3, brow + rise],
            fill=hair,
            width=width,
        )
    draw.line([x, level + tall * 0.12, x - wide * 0.07, y + tall * 0.22], fill=dark, width=2)
    _mouth(
        draw,
        x,
        y + tall * 0.52,
        wide * generator.uniform(0.5, 0.62),
        tall,
        (curve, mouth, skew),
        dark,
        lips,
    )
    turned = image.rotate(
        float(generator.normal(0, 2 + 6 * difficulty)), Image.Resampling.BILINEAR, fillcolor=ground
    )
    return (np.asarray(turned.reduce(2)) / 255).astype(np.float32)


Rgb = tuple[int, int, int]


def _face_colours(generator: np.random.Generator) -> tuple[Rgb, Rgb, Rgb, Rgb, Rgb]:
    """Ground, hair, skin, dark and lips."""
    hue = np.array(
        [generator.random(), generator.uniform(0.0, 0.12), generator.uniform(0.03, 0.1), 0.05, 0.99]
    )
    saturation = np.array([generator.uniform(0, 0.4), 0.6, generator.uniform(0.25, 0.6), 0.4, 0.6])
    value = generator.uniform((0.2, 0.05, 0.45, 0.02, 0.3), (1.0, 0.4, 1.0, 0.2, 0.7))
    colours = np.rint(hsv_to_rgb(hue, saturation, value) * 255).astype(int)
    ground, hair, skin, dark, lips = ((int(r), int(g), int(b)) for r, g, b in colours)
    return ground, hair, skin, dark, lips


def _mouth(
    draw: ImageDraw.ImageDraw,
    x: float,
    y: float,
    half: float,
    tall: float,
    shape: tuple[float, float, float],
    dark: Rgb,
    lips: Rgb,
) -> None:
    """A mouth between two parabolas: `shape` is curve, opening and skew in units of `tall`."""
    curve, opening, skew = shape
    t = np.linspace(-1, 1, 13)
    middle = y + tall * (curve * (0.5 - t**2) + skew * t / 2)
    gap = tall * max(opening, 0.0) * (1 - t**2) / 2
    upper = list(zip(x + half * t, middle - gap, strict=True))
    lower = list(zip(x + half * t, middle + gap, strict=True))
    outline = [(float(a), float(b)) for a, b in [*upper, *reversed(lower)]]
    draw.polygon(outline, fill=dark)
    draw.line([*outline, outline[0]], fill=lips, width=2)
