"""Shapes: what is drawn on the ground. Each class is a recipe, each mask one noisy execution of it.

Families: iterated-function-system fractals (Kataoka et al., "Pre-training without Natural Images",
ACCV 2020), characters of random Bezier strokes, glyphs of the fonts that come with matplotlib,
filled and outlined figures, whole-image patterns, and layouts of small parts in an ellipse. No
digit, no letter A-J and none of their look-alikes in other alphabets is among the glyphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fedprompt.core.errors import InputError
from fedprompt.core.seeding import numpy_generator
from fedprompt.data.drawing.fractals import fractals
from fedprompt.data.drawing.glyphs import (
    GLYPH_FONTS,
    LARGE,
    SIZE,
    Bytes,
    glyph_characters,
    glyph_image,
    has_glyph,
    warp,
)
from fedprompt.data.drawing.layouts import layouts
from fedprompt.data.drawing.patterns import PATTERNS, fields


@dataclasses.dataclass(frozen=True)
class ShapeCounts:
    """How many classes of each family pre-training distinguishes."""

    fractals: int = 60
    characters: int = 150
    glyphs: int = 160
    figures: int = 40
    patterns: int = 22
    layouts: int = 80

    def __post_init__(self) -> None:
        for family, limit in (
            ("figures", 60),
            ("patterns", 22),
            ("glyphs", len(glyph_characters())),
        ):
            if getattr(self, family) > limit:
                raise InputError(
                    f"ShapeCounts.{family}: expected at most {limit}, got {getattr(self, family)}"
                )
        if min(dataclasses.astuple(self)) < 0 or sum(dataclasses.astuple(self)) < 2:
            raise InputError(
                f"ShapeCounts: expected counts >= 0 and at least two classes, got {self}"
            )

    @property
    def classes(self) -> tuple[tuple[str, int], ...]:
        """(family, index in the family) of every class."""
        return tuple(
            (field.name, index)
            for field in dataclasses.fields(self)
            for index in range(getattr(self, field.name))
        )


def draw_class(family: str, index: int, count: int, seed: int) -> tuple[Bytes, Bytes]:
    """Masks of one class.

    Args:
        family: a field of `ShapeCounts`.
        index: which class of the family; its recipe depends on the family and the index only.
        count: how many masks.
        seed: of the executions.

    Returns:
        Body and details, both (count, 32, 32) with 0 for ground; details are the small parts of a
        layout.
    """
    recipe = numpy_generator(0, f"drawing/{family}/recipe", client_id=index)
    generator = numpy_generator(seed, f"drawing/{family}", client_id=index)
    return _FAMILIES[family](index, count, recipe, generator)


# ---------------------------------------------------------------- characters


def _characters(
    index: int, count: int, recipe: np.random.Generator, generator: np.random.Generator
) -> tuple[Bytes, Bytes]:
    del index
    control = _strokes(recipe)
    noisy = control[None] + generator.normal(0, 0.035, (count, *control.shape))
    curves = _bezier(noisy).reshape(count, -1, 2)
    points = _affine(curves, generator, rotation=0.3, scale=(0.6, 0.95), shear=0.25)
    masks = draw_points(points, generator.uniform(0.03, 0.075, count))
    return masks, np.zeros_like(masks)


def _strokes(generator: np.random.Generator) -> NDArray[np.float64]:
    """(strokes, 4, 2) control points in [-.5, .5]; half of the strokes start where the previous
    one ends.
    """
    strokes: list[NDArray[np.float64]] = []
    for _ in range(int(generator.integers(1, 5))):
        points = generator.uniform(-0.5, 0.5, (4, 2))
        while np.linalg.norm(points[3] - points[0]) < 0.4:
            points = generator.uniform(-0.5, 0.5, (4, 2))
        points[1:3] *= generator.uniform(0.6, 1.8)
        if strokes and generator.random() < 0.5:
            points[0] = strokes[-1][3]
        strokes.append(points)
    return np.stack(strokes)


def _bezier(control: NDArray[np.float64], samples: int = 36) -> NDArray[np.float64]:
    """Cubic Bezier curves: (..., 4, 2) -> (..., samples, 2)."""
    t = np.linspace(0, 1, samples)
    basis = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
    return np.asarray(basis @ control)


def _affine(
    points: NDArray[np.float64],
    generator: np.random.Generator,
    rotation: float,
    scale: tuple[float, float],
    shear: float,
) -> NDArray[np.float64]:
    """Random rotation, shear and anisotropic scale of (count, points, 2) around the centre of each
    set.
    """
    count = len(points)
    angle = generator.normal(0, rotation / 2, count)
    slant = generator.uniform(-shear, shear, count)
    width, height = generator.uniform(*scale, (2, count))
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.stack(
        [
            np.stack([width * cos, height * (slant * cos - sin)], axis=1),
            np.stack([width * sin, height * (slant * sin + cos)], axis=1),
        ],
        axis=1,
    )
    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    span = np.maximum((high - low).max(axis=2, keepdims=True), 0.5)
    centred = (points - (low + high) / 2) / span
    return np.asarray(centred @ matrix.transpose(0, 2, 1))


def draw_points(
    points: NDArray[np.float64], radius: NDArray[np.float64], size: int = SIZE
) -> Bytes:
    """A soft pen: every pixel whose centre is within `radius` of a point is inked.

    Args:
        points: (count, points, 2) in [-.5, .5], dense along the strokes.
        radius: (count,) in the same unit.
        size: side in pixels.

    Returns:
        (count, size, size)
    """
    axis = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    grid = np.stack(np.meshgrid(axis, axis, indexing="xy")).reshape(2, -1)
    masks = np.empty((len(points), size * size), np.uint8)
    for start in range(0, len(points), 64):
        part = points[start : start + 64].astype(np.float32)
        square = -2 * (part @ grid)
        square += (part**2).sum(axis=2, keepdims=True)
        distance = np.sqrt(np.maximum(square.min(axis=1) + (grid**2).sum(axis=0), 0))
        reach = radius[start : start + 64, None].astype(np.float32)
        ink = np.clip((reach - distance) * size + 0.5, 0, 1)
        masks[start : start + 64] = np.rint(ink * 255)
    return masks.reshape(-1, size, size)


def _glyphs(
    index: int, count: int, recipe: np.random.Generator, generator: np.random.Generator
) -> tuple[Bytes, Bytes]:
    del recipe
    character = glyph_characters()[index]
    fonts = [font for font in GLYPH_FONTS if has_glyph(character, font)]
    chosen = generator.integers(0, len(fonts), count)
    masks = np.stack([warp(glyph_image(character, fonts[font]), generator) for font in chosen])
    return masks, np.zeros_like(masks)


# ---------------------------------------------------------------- figures

_OUTLINES = (
    [(-5, -2), (1, -2), (1, -5), (5, 0), (1, 5), (1, 2), (-5, 2)],  # arrow
    [(-1.5, -5), (1.5, -5), (1.5, -1.5), (5, -1.5), (5, 1.5), (1.5, 1.5), (1.5, 5), (-1.5, 5),
     (-1.5, 1.5), (-5, 1.5), (-5, -1.5), (-1.5, -1.5)],  # plus
    [(-4, -5), (-1, -5), (-1, 2), (4, 2), (4, 5), (-4, 5)],  # corner
    [(-5, -5), (5, -5), (5, -2), (1.5, -2), (1.5, 5), (-1.5, 5), (-1.5, -2), (-5, -2)],  # tee
    [(-5, -5), (-2, -5), (-2, 2), (2, 2), (2, -5), (5, -5), (5, 5), (-5, 5)],  # trough
    [(0, -5), (5, -1), (3.5, -1), (3.5, 5), (-3.5, 5), (-3.5, -1), (-5, -1)],  # house
    [(1, -5), (-4, 1), (-0.5, 1), (-1, 5), (4, -1), (0.5, -1)],  # bolt
    [(-5, -4), (0, 0), (5, -4), (5, 0), (0, 4), (-5, 0)],  # chevron
)  # fmt: skip


def _figures(
    index: int, count: int, recipe: np.random.Generator, generator: np.random.Generator
) -> tuple[Bytes, Bytes]:
    if index < 6:
        outline = _star(index + 3, 1.0)
    elif index < 12:
        outline = _star(index - 3, 0.42)
    elif index < 12 + len(_OUTLINES):
        outline = np.asarray(_OUTLINES[index - 12]) / 5
    else:
        angle = np.sort(recipe.uniform(0, 2 * np.pi, int(recipe.integers(5, 9))))
        radius = recipe.uniform(0.35, 1.1, len(angle))
        outline = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    masks = np.stack([_figure(outline, generator) for _ in range(count)])
    return masks, np.zeros_like(masks)


def _star(points: int, inner: float) -> NDArray[np.float64]:
    """Vertices of a regular polygon (`inner` 1) or star: (points or 2 points, 2)."""
    if inner == 1.0:
        angle = np.arange(points) * 2 * np.pi / points
        radius = np.ones(points)
    else:
        angle = np.arange(2 * points) * np.pi / points
        radius = np.ones(2 * points)
        radius[1::2] = inner
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _figure(outline: NDArray[np.float64], generator: np.random.Generator) -> Bytes:
    """One filled or outlined polygon at a random angle and size: (32, 32)."""
    angle = generator.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    radius = generator.uniform(17, 28, 2)
    noisy = outline + generator.normal(0, 0.03, outline.shape)
    points = (noisy @ turn.T) * radius + LARGE / 2 + generator.uniform(-4, 4, 2)
    image = Image.new("L", (LARGE, LARGE))
    corners = [(float(x), float(y)) for x, y in points]
    draw = ImageDraw.Draw(image)
    if generator.random() < 0.6:
        draw.polygon(corners, fill=255)
    else:
        draw.line([*corners, corners[0]], fill=255, width=int(generator.integers(3, 7)))
    return np.asarray(image.reduce(2))


# ---------------------------------------------------------------- whole-image patterns


def _patterns(
    index: int, count: int, recipe: np.random.Generator, generator: np.random.Generator
) -> tuple[Bytes, Bytes]:
    del recipe
    kind = PATTERNS[1 + index // 2]
    frequency = (1.5, 3.5) if index % 2 == 0 else (4.5, 8.0)
    masks = np.rint(fields(kind, count, generator, SIZE, frequency) * 255).astype(np.uint8)
    return masks, np.zeros_like(masks)


_FAMILIES: dict[
    str, Callable[[int, int, np.random.Generator, np.random.Generator], tuple[Bytes, Bytes]]
] = {
    "fractals": fractals,
    "characters": _characters,
    "glyphs": _glyphs,
    "figures": _figures,
    "patterns": _patterns,
    "layouts": layouts,
}
