"""Layouts: an ellipse with small marks inside, in places that four classes share."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fedprompt.core.seeding import numpy_generator
from fedprompt.data.drawing.glyphs import LARGE, Bytes


@dataclasses.dataclass(frozen=True)
class Part:
    """A small mark inside a body; x and y in units of the body's radius, angles in degrees."""

    kind: str
    x: float
    y: float
    size: float
    angle: float
    mirrored: bool


_PART_KINDS = ("dot", "ring", "bar", "smile", "frown", "wedge", "lens")


def layouts(
    index: int, count: int, recipe: np.random.Generator, generator: np.random.Generator
) -> tuple[Bytes, Bytes]:
    """Masks of one arrangement of marks.

    Args:
        index: of the class; four in a row share their places.
        count: how many masks.
        recipe: draws what all masks of the class have in common.
        generator: draws what they differ in.

    Returns:
        Body and details, both (count, 32, 32).
    """
    # Four classes share their places and differ in the marks: small parts must be looked at.
    places = numpy_generator(0, "drawing/layouts/places", client_id=index // 4)
    parts = []
    for mirrored in (True,) * int(places.integers(1, 3)) + (False,) * int(places.integers(1, 3)):
        parts.append(
            Part(
                kind=str(recipe.choice(_PART_KINDS)),
                x=float(places.uniform(0.25, 0.6)) if mirrored else 0.0,
                y=float(places.uniform(-0.65, 0.65)),
                size=float(places.uniform(0.32, 0.55)) * (1.0 if mirrored else 1.4),
                angle=float(recipe.uniform(-45, 45)),
                mirrored=mirrored,
            )
        )
    aspect = float(places.uniform(0.75, 1.2))
    pairs = [draw_layout(parts, aspect, generator) for _ in range(count)]
    return np.stack([body for body, _ in pairs]), np.stack([details for _, details in pairs])


def draw_layout(
    parts: list[Part], aspect: float, generator: np.random.Generator, jitter: float = 0.05
) -> tuple[Bytes, Bytes]:
    """An ellipse with marks, slightly different each time: body and details, both (32, 32).

    Args:
        parts: marks inside the ellipse.
        aspect: width of the ellipse by its height.
        generator: source of every draw.
        jitter: standard deviation of the places, in units of the radii.
    """
    body, details = Image.new("L", (LARGE, LARGE)), Image.new("L", (LARGE, LARGE))
    centre = LARGE / 2 + generator.uniform(-5, 5, 2)
    height = generator.uniform(20, 28)
    radius = np.array([min(height * aspect * generator.uniform(0.92, 1.08), 29.0), height])
    box = [*(centre - radius), *(centre + radius)]
    if generator.random() < 0.75:
        ImageDraw.Draw(body).ellipse(box, fill=255)
    else:
        ImageDraw.Draw(body).ellipse(box, outline=255, width=int(generator.integers(3, 6)))
    draw = ImageDraw.Draw(details)
    width = int(generator.integers(3, 6))
    for part in parts:
        for side in (-1, 1) if part.mirrored else (1,):
            offset = np.array([side * part.x, part.y]) + generator.normal(0, jitter, 2)
            size = part.size * generator.uniform(0.85, 1.2) * height
            angle = part.angle + generator.normal(0, 6)
            _mark(draw, part.kind, centre + offset * radius, size, side * angle, width)
    tilt = float(generator.normal(0, 7))
    place = (float(centre[0]), float(centre[1]))
    turned = [im.rotate(tilt, Image.Resampling.BILINEAR, center=place) for im in (body, details)]
    return np.asarray(turned[0].reduce(2)), np.asarray(turned[1].reduce(2))


def _mark(
    draw: ImageDraw.ImageDraw,
    kind: str,
    centre: NDArray[np.float64],
    size: float,
    angle: float,
    width: int,
) -> None:
    """Draw one mark; a `bar` is tilted by `angle`, the curve of `smile` and `frown` grows with
    it.
    """
    x, y = float(centre[0]), float(centre[1])
    half = size / 2
    flat = half * (0.5 + abs(angle) / 90)
    if kind == "dot":
        draw.ellipse([x - half * 0.7, y - half * 0.7, x + half * 0.7, y + half * 0.7], fill=255)
    elif kind == "ring":
        draw.ellipse([x - half, y - half, x + half, y + half], outline=255, width=max(width - 1, 2))
    elif kind == "bar":
        dx, dy = half * np.cos(np.radians(angle)), half * np.sin(np.radians(angle))
        draw.line([x - dx, y - dy, x + dx, y + dy], fill=255, width=width)
    elif kind == "smile":
        draw.arc([x - half, y - 2 * flat, x + half, y + flat], 20, 160, fill=255, width=width)
    elif kind == "frown":
        draw.arc([x - half, y - flat, x + half, y + 2 * flat], 200, 340, fill=255, width=width)
    elif kind == "wedge":
        draw.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=255)
    else:
        draw.ellipse([x - half, y - half * 0.45, x + half, y + half * 0.45], fill=255)
