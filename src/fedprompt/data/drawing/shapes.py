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


# ---------------------------------------------------------------- fractals


def _fractals(
    index: int, count: int, recipe: np.random.Generator, generator: np.random.Generator
) -> tuple[Bytes, Bytes]:
    del index
    while True:
        maps = _contractions(recipe)
        trial = _chaos_game(maps[None], recipe)
        if 0.12 < (trial > 30).mean() < 0.6:
            break
    noisy = maps[None] * generator.uniform(0.88, 1.12, (count, *maps.shape)).astype(np.float32)
    masks = _chaos_game(noisy, generator)
    flip = generator.random(count) < 0.3
    masks[flip] = masks[flip, :, ::-1]
    return masks, np.zeros_like(masks)


def _contractions(generator: np.random.Generator) -> NDArray[np.float32]:
    """(maps, 2, 3): two to four random affine contractions of the plane."""
    number = int(generator.integers(2, 5))
    maps = generator.uniform(-1, 1, (number, 2, 3))
    norm = np.linalg.norm(maps[:, :, :2], ord=2, axis=(1, 2))
    maps[:, :, :2] *= (generator.uniform(0.45, 0.85, number) / norm)[:, None, None]
    return maps.astype(np.float32)


def _chaos_game(
    maps: NDArray[np.float32], generator: np.random.Generator, chains: int = 160, steps: int = 26
) -> Bytes:
    """Attractors of (count, maps, 2, 3) iterated function systems: (count, 32, 32)."""
    count, number = maps.shape[:2]
    area = np.abs(np.linalg.det(maps[..., :2])) + 0.01
    limits = np.cumsum(area / area.sum(axis=1, keepdims=True), axis=1)[:, None, :-1]
    rows = np.arange(count)[:, None]
    points = np.zeros((count, chains, 2), np.float32)
    visited = []
    for step in range(steps):
        draw = generator.random((count, chains, 1), dtype=np.float32)
        chosen = maps[rows, (draw > limits).sum(axis=2) if number > 1 else 0]
        points = np.einsum("ncij,ncj->nci", chosen[..., :2], points) + chosen[..., 2]
        if step >= 8:
            visited.append(points)
    cloud = np.concatenate(visited, axis=1)
    low, high = np.quantile(cloud[:, ::7], (0.01, 0.99), axis=1)
    span = (high - low).max(axis=1, keepdims=True) + 1e-6
    margin = generator.uniform(2, 5, (count, 1, 1))
    unit = (cloud - ((low + high) / 2)[:, None]) / span[:, None]
    pixel = np.rint(unit * (SIZE - 2 * margin) + SIZE / 2 - 0.5).astype(int)
    inside = ((pixel >= 0) & (pixel < SIZE)).all(axis=2)
    flat = (rows * SIZE + pixel[..., 1]) * SIZE + pixel[..., 0]
    hits = np.bincount(flat[inside], minlength=count * SIZE * SIZE).reshape(count, SIZE, SIZE)
    return np.clip(np.log1p(hits) * 90, 0, 255).astype(np.uint8)


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


# ---------------------------------------------------------------- part layouts


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


def _layouts(
    index: int, count: int, recipe: np.random.Generator, generator: np.random.Generator
) -> tuple[Bytes, Bytes]:
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


_FAMILIES: dict[
    str, Callable[[int, int, np.random.Generator, np.random.Generator], tuple[Bytes, Bytes]]
] = {
    "fractals": _fractals,
    "characters": _characters,
    "glyphs": _glyphs,
    "figures": _figures,
    "patterns": _patterns,
    "layouts": _layouts,
}
