"""Procedural images for pre-training: shapes (`shapes`) laid in random colours on patterns
(`patterns`).

Masks and patterns are drawn once; colours, background, position and blur are drawn anew for every
presentation, vectorised over a batch, so that a network hardly ever sees the same image twice.
Everything is a function of seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedprompt.core.errors import InputError
from fedprompt.core.seeding import numpy_generator
from fedprompt.data.drawing.glyphs import SIZE, Bytes
from fedprompt.data.drawing.patterns import PATTERNS, fields, interpolation
from fedprompt.data.drawing.shapes import ShapeCounts, draw_class

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

HUES = 8
"""Hues are distinguished in eight equal bins of the colour circle."""
UNDEFINED = -1
"""Value of an attribute that an image does not have, such as the hue of a grey object."""


@dataclasses.dataclass(frozen=True)
class Masks:
    """What `draw_masks` returns: every shape that will be coloured."""

    body: Bytes
    """(N, 32, 32), 0 for ground."""
    details: Bytes
    """(N, 32, 32), small parts laid over the body; all zero for most families."""
    labels: Integers
    """(N,) class."""
    whole: NDArray[np.bool_]
    """(N,) whether the mask is a pattern that fills the image, without ground."""
    names: tuple[str, ...]
    """`family/index` of every class."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Composition:
    """Probabilities and ranges of everything that is not shape.

    `clean` is the share of images that are bright on a flat dark ground, sharp and without noise.
    """

    clean: float = 0.1
    flat: float = 0.4
    grey: float = 0.2
    difference: float = 0.15
    textured: float = 0.2
    blurred: float = 0.35
    noisy: float = 0.3
    shift: int = 3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            limit = SIZE // 2 if field.name == "shift" else 1
            if not 0 <= value <= limit:
                raise InputError(
                    f"Composition.{field.name}: expected a value from 0 to {limit}, got {value}"
                )


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Coloured images and the attributes that a promptable network is to name."""

    images: Bytes
    """(N, 32, 32, 3)"""
    foreground: Integers
    """(N,) hue bin of the object or `UNDEFINED`."""
    background: Integers
    """(N,) hue bin of the ground or `UNDEFINED`."""
    pattern: Integers
    """(N,) index into `PATTERNS` of the ground or `UNDEFINED`."""


def draw_masks(
    counts: ShapeCounts,
    images: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Masks:
    """Draw at least one and about `images / classes` masks of every class.

    Args:
        counts: how many classes of each family.
        images: about how many masks in all.
        seed: of the executions; the recipes of the classes do not depend on it.
        progress: receives the number of new masks after each class.

    Returns:
        The masks, sorted by class.
    """
    each = max(1, round(images / len(counts.classes)))
    body = np.empty((len(counts.classes), each, SIZE, SIZE), np.uint8)
    details = np.zeros_like(body)
    for label, (family, index) in enumerate(counts.classes):
        body[label], details[label] = draw_class(family, index, each, seed)
        if progress is not None:
            progress(each)
    whole = np.array([family == "patterns" for family, _ in counts.classes])
    return Masks(
        body=body.reshape(-1, SIZE, SIZE),
        details=details.reshape(-1, SIZE, SIZE),
        labels=np.repeat(np.arange(len(counts.classes)), each),
        whole=np.repeat(whole, each),
        names=tuple(f"{family}/{index}" for family, index in counts.classes),
    )


class Grounds:
    """A stock of patterns that backgrounds are taken from, turned and mirrored.

    Args:
        kinds: names of patterns.
        each: how many fields of each kind are drawn.
        seed: of the drawing.
        frequency: range of repetitions per image side.
    """

    def __init__(
        self,
        kinds: Sequence[str] = PATTERNS,
        each: int = 400,
        seed: int = 0,
        frequency: tuple[float, float] = (1.5, 6.0),
    ) -> None:
        self.kinds = tuple(kinds)
        self._fields = np.stack(
            [
                np.rint(
                    fields(
                        kind, each, numpy_generator(seed, f"drawing/ground/{kind}"), SIZE, frequency
                    )
                    * 255
                ).astype(np.uint8)
                for kind in self.kinds
            ]
        )

    def sample(self, kind: Integers, generator: np.random.Generator) -> Floats:
        """One field in [0, 1] per entry of `kind`: (N,) -> (N, 32, 32)."""
        chosen = self._fields[kind, generator.integers(0, self._fields.shape[1], len(kind))]
        turn = generator.integers(0, 8, len(kind))
        result = np.empty(chosen.shape, np.float32)
        for code in range(8):
            part = chosen[turn == code]
            part = part.transpose(0, 2, 1) if code & 1 else part
            part = part[:, ::-1] if code & 2 else part
            result[turn == code] = part[:, :, ::-1] if code & 4 else part
        result /= 255
        return result


def compose(
    body: Bytes,
    details: Bytes,
    whole: NDArray[np.bool_],
    grounds: Grounds,
    generator: np.random.Generator,
    composition: Composition | None = None,
) -> Drawn:
    """Colour masks: a ground of two colours in a pattern, the object over it or as |ground -
    object|.

    Args:
        body: (N, 32, 32) objects.
        details: (N, 32, 32) small parts over the objects.
        whole: (N,) images that the body fills; they stand on flat ground and are not moved.
        grounds: where patterns come from; the first kind is flat.
        generator: source of all randomness.
        composition: probabilities; the default is what the embedded weights were trained on.

    Returns:
        Images and attributes.
    """
    chance = composition or Composition()
    count = len(body)
    clean = np.asarray(generator.random(count) < chance.clean)
    detailed = np.asarray(details.any(axis=(1, 2)))
    plan = _plan(clean, whole, detailed, len(grounds.kinds), generator, chance)
    ink, marks = moved(body, details, whole, chance.shift, generator)
    field = grounds.sample(plan.kind, generator)[..., None]
    first, second, paint, contrast = plan.colours[:, :, None, None]
    ground = first + field * (second - first)
    texture = np.where((generator.random(count) < chance.textured) & ~clean, 1, 0)
    texture *= generator.integers(0, len(grounds.kinds), count)
    paint = paint * (1 - 0.5 * grounds.sample(texture, generator)[..., None])
    over = ground + ink * (paint - ground)
    difference = np.abs(ground - ink * np.maximum(paint, 0.5))
    pixels = np.where(plan.difference[:, None, None, None], difference, over)
    pixels = pixels + marks * (contrast - pixels)
    blurred = (generator.random(count) < chance.blurred) & ~clean
    pixels = _blurred(pixels, blurred, np.where(marks.any(axis=(1, 2, 3)), 12, 8), generator)
    noisy = np.flatnonzero((generator.random(count) < chance.noisy) & ~clean)
    strength = generator.uniform(0, 0.06, (len(noisy), 1, 1, 1)).astype(np.float32)
    pixels[noisy] += strength * generator.standard_normal((len(noisy), SIZE, SIZE, 3), np.float32)
    return Drawn(
        images=np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8),
        foreground=np.where(plan.grey | plan.difference | whole, UNDEFINED, plan.foreground),
        background=np.where(plan.grey | ~plan.one_hue | whole, UNDEFINED, plan.background),
        pattern=np.where(whole, UNDEFINED, plan.kind),
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The decisions of `compose`, each (N,); `colours` (4, N, 3): two of the ground, object,
    marks.
    """

    kind: Integers
    grey: NDArray[np.bool_]
    difference: NDArray[np.bool_]
    one_hue: NDArray[np.bool_]
    background: Integers
    foreground: Integers
    colours: Floats


def _plan(
    clean: NDArray[np.bool_],
    whole: NDArray[np.bool_],
    detailed: NDArray[np.bool_],
    kinds: int,
    generator: np.random.Generator,
    chance: Composition,
) -> _Plan:
    count = len(whole)
    grey, flat, one_hue, near = (
        generator.random(count) < probability
        for probability in (chance.grey, chance.flat, 0.7, 0.25)
    )
    grey, flat = grey | clean, flat | clean
    difference = (generator.random(count) < chance.difference) & ~whole & ~detailed & ~clean
    kind = generator.integers(1, max(kinds, 2), count)
    kind = np.where(flat | whole | (kinds == 1), 0, kind)

    background = generator.integers(0, HUES, count)
    foreground = (background + generator.integers(1, HUES, count)) % HUES
    second = np.where(one_hue, background, generator.integers(0, HUES, count))
    marks = generator.integers(0, HUES, count)
    hues = np.stack([background, second, foreground, marks]) + generator.uniform(
        -0.35, 0.35, (4, count)
    )

    dark = np.where(clean, 0.1, 1.0) * generator.random(count) ** 1.3
    other = _away_from(dark, generator.uniform(0.25, 0.65, count))
    middle = np.where(kind == 0, dark, (dark + other) / 2)
    apart = _away_from(middle, np.where(clean, 0.8, generator.uniform(0.3, 0.7, count)))
    # A quarter of the colourful objects may be as bright as the ground; grey ones never.
    bright = np.where(near & ~grey & ~whole, generator.uniform(0.35, 1, count), apart)
    brightness = np.stack(
        [dark, other, bright, _away_from(bright, generator.uniform(0.3, 0.6, count))]
    )
    # A hue can be seen only where there is enough light.
    brightness = np.where(grey, brightness, np.maximum(brightness, 0.2))
    saturation = np.where(grey, 0, generator.uniform(0.35, 1.0, (4, count)))
    saturation[3] *= generator.random(count) < 0.5
    colours = hsv_to_rgb(hues / HUES, saturation, np.clip(brightness, 0, 1))
    return _Plan(kind, grey, difference, one_hue, background, foreground, colours)


def _away_from(value: NDArray[np.float64], step: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move each value by its step towards the farther end of [0, 1]."""
    return np.clip(np.where(value > 0.5, value - step, value + step), 0, 1)


def hsv_to_rgb(
    hue: NDArray[np.float64], saturation: NDArray[np.float64], value: NDArray[np.float64]
) -> Floats:
    """Colours in [0, 1]: three arrays of one shape -> that shape + (3,); hue wraps at 1.

    Args:
        hue: any shape; turns of the colour circle.
        saturation: of that shape, 0 to 1.
        value: of that shape, 0 to 1.

    >>> hsv_to_rgb(np.array([0.0, 1 / 3]), np.ones(2), np.ones(2)).round(3).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    sector = (np.array([5.0, 3.0, 1.0]) + hue[..., None] * 6) % 6
    peak = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return np.asarray(value[..., None] * (1 - saturation[..., None] * peak), dtype=np.float32)


def moved(
    body: Bytes,
    details: Bytes,
    whole: NDArray[np.bool_],
    shift: int,
    generator: np.random.Generator,
) -> tuple[Floats, Floats]:
    """Both masks shifted together by up to `shift` pixels: each (N, 32, 32, 1) in [0, 1].

    Args:
        body: (N, 32, 32) uint8, the mask of the shape.
        details: (N, 32, 32) uint8, the mask of its parts.
        whole: (N,) which masks fill the image and stay where they are.
        shift: the most, in pixels.
        generator: source of the shifts.
    """
    count = len(body)
    move = generator.integers(0, 2 * shift + 1, (2, count))
    move[:, whole] = shift
    pad = ((0, 0), (shift, shift), (shift, shift))
    rows = (move[0][:, None] + np.arange(SIZE))[:, :, None]
    columns = (move[1][:, None] + np.arange(SIZE))[:, None, :]
    image = np.arange(count)[:, None, None]
    moved = [np.pad(mask, pad)[image, rows, columns][..., None] for mask in (body, details)]
    return moved[0].astype(np.float32) / 255, moved[1].astype(np.float32) / 255


def _blurred(
    pixels: Floats, chosen: NDArray[np.bool_], least: Integers, generator: np.random.Generator
) -> Floats:
    """Reduce the chosen images (N, 32, 32, 3) to 8 - 16 pixels, not below `least`, and enlarge
    them, in place.
    """
    side = np.maximum(generator.choice((8, 8, 10, 12, 16), len(pixels)), least)
    for size in np.unique(side[chosen]):
        index = np.flatnonzero(chosen & (side == size))
        matrix = _reduce_and_enlarge(int(size))
        rows = matrix @ pixels[index].reshape(len(index), SIZE, SIZE * 3)
        columns = matrix @ rows.reshape(len(index) * SIZE, SIZE, 3)
        pixels[index] = columns.reshape(-1, SIZE, SIZE, 3)
    return pixels


@lru_cache(maxsize=8)
def _reduce_and_enlarge(size: int) -> Floats:
    """(32, 32) matrix: linear reduction by averaging to `size` pixels, then linear
    interpolation.
    """
    reduce = interpolation(size, SIZE).T
    reduce /= reduce.sum(axis=1, keepdims=True)
    return np.asarray(interpolation(size, SIZE) @ reduce, dtype=np.float32)


def contact_sheet(images: Bytes, columns: int, border: int = 1) -> Image.Image:
    """Tile (N, H, W, 3) images row by row; the last row may be short.

    Args:
        images: (N, H, W, 3) uint8.
        columns: images in a row.
        border: pixels between images.
    """
    count, height, width = images.shape[:3]
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + border) + border, columns * (width + border) + border, 3), 255, np.uint8
    )
    for index, image in enumerate(images):
        top = border + index // columns * (height + border)
        left = border + index % columns * (width + border)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)
