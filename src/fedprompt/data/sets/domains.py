"""The drawn task `domains`: four visually different domains, 37 classes, no download.

An offline stand-in for the paper's 4-dataset (MNIST-M, Fashion-MNIST, CINIC-10, MMAFEDB), not an
equivalent of it:

- digits (10): scikit-learn's handwritten digits blended as |texture - digit| in colour
  (after MNIST-M)
- letters (10): A - J in many fonts, turned and sheared, on flat or noisy ground (after notMNIST)
- patterns (10): coloured patterns behind a distracting object, so that shape features alone cannot
  solve it
- faces (7): schematic faces with seven expressions

Pre-training (`fedprompt pretrain`) shows none of these digits, letters or faces, and six of the
ten patterns.

Patterns of all splits are taken from one stock of 800 fields a class: one test image in seven has
the field of a training image, and one in sixteen that of a public image, turned otherwise, in other
colours and behind another object. In the other domains no two splits share a source.

Labels are known without drawing; a split is drawn when one of its images is read, which no
one does once the prefix cache knows them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fedprompt.core import seeding
from fedprompt.core.checks import check_integer
from fedprompt.core.errors import ConfigError
from fedprompt.core.seeding import numpy_generator
from fedprompt.data import stratified
from fedprompt.data.drawing import composition, glyphs, patterns, shapes
from fedprompt.data.drawing.composition import Grounds, hsv_to_rgb, moved
from fedprompt.data.drawing.glyphs import SIZE, Bytes, glyph_image, warp
from fedprompt.data.drawing.patterns import HELD_OUT_PATTERNS
from fedprompt.data.drawing.shapes import draw_class
from fedprompt.data.sets import digits
from fedprompt.data.sets.digits import enlarge, source_digits
from fedprompt.data.stratified import stratified_parts
from fedprompt.data.task import Split, Task, datasets

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

DIGITS = tuple("0123456789")
LETTERS = tuple("ABCDEFGHIJ")
PATTERN_CLASSES = ("stripes", "checks", "dots", "rings", "plaid", "bricks", *HELD_OUT_PATTERNS)
EXPRESSIONS = ("neutral", "happy", "sad", "angry", "surprised", "afraid", "disgusted")
GROUPS = ("digits", "letters", "patterns", "faces")
_CLASSES = (DIGITS, LETTERS, PATTERN_CLASSES, EXPRESSIONS)
_SPLITS = ("public", "train", "validation", "test")
_SOURCE_SHARES = (0.2, 0.5, 0.1)
"""Shares of the handwritten digits behind public, train and validation; test has the rest."""

_NOISE = (0.12, 0.3, 0.06, 0.04)
"""Per domain, how much the strongest noise grows with difficulty; balances how hard the domains
are.
"""

_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral",
    "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10",
    "cmtt10", "cmmi10",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DomainsOptions:
    """How many images are drawn and how hard they are.

    Args:
        seed: of everything: which digits go to which split, and every image.
        train: training images over all domains; each domain gets a quarter.
        validation: validation images.
        test: test images.
        public: labelled images that belong to no client.
        resolution: side of the images in pixels; they are drawn at 32 and enlarged.
        difficulty: 0 (clean) to 1: noise, weak contrast, distortion, overlap of expressions.
    """

    several_domains: ClassVar[bool] = True

    seed: int = 0
    train: int = 5400
    validation: int = 900
    test: int = 1800
    public: int = 1800
    resolution: int = 32
    difficulty: float = 0.5

    def __post_init__(self) -> None:
        check_integer("data.seed", self.seed, 0)
        for name in _SPLITS:
            if getattr(self, name) < 40:
                raise ConfigError(
                    f"data.{name}: expected at least 40 images (one of each class), "
                    f"got {getattr(self, name)}"
                )
        if not 16 <= self.resolution <= 512:
            raise ConfigError(f"data.resolution: expected 16 to 512, got {self.resolution}")
        if not 0 <= self.difficulty <= 1:
            raise ConfigError(f"data.difficulty: expected 0 to 1, got {self.difficulty}")


@datasets.register("domains", DomainsOptions)
def domains(options: DomainsOptions) -> Task:
    """All splits; the same options give the same bytes."""
    splits = {name: _split(name, options) for name in _SPLITS}
    return Task(
        name="domains",
        class_names=tuple(
            f"{group}/{name}"
            for group, names in zip(GROUPS, _CLASSES, strict=True)
            for name in names
        ),
        group_names=GROUPS,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        public=splits["public"],
    )


def split_sources(seed: int) -> dict[str, Integers]:
    """Which of scikit-learn's digits stand behind which split; the index arrays are disjoint."""
    generator = numpy_generator(seed, "data/domains/sources")
    parts = stratified_parts(source_digits()[1], _SOURCE_SHARES, generator)
    return dict(zip(_SPLITS, parts, strict=True))


def _split(name: str, options: DomainsOptions) -> Split:
    """One split, shuffled, not drawn yet; the classes of a domain differ by at most one image."""
    offsets = np.cumsum([0, *map(len, _CLASSES)])
    own = _own_classes(getattr(options, name))
    labels = np.concatenate([classes + offsets[group] for group, classes in enumerate(own)])
    groups = np.repeat(np.arange(len(GROUPS)), [len(classes) for classes in own])
    order = _order(name, options)
    return Split(
        images=DrawnImages(name, options),
        labels=labels.astype(np.int64)[order],
        groups=groups.astype(np.int64)[order],
    )


def _own_classes(count: int) -> list[Integers]:
    """Per domain, each image's class among those of the domain, before shuffling."""
    shares = [count // len(GROUPS) + (group < count % len(GROUPS)) for group in range(len(GROUPS))]
    return [
        np.arange(share) % len(classes) for share, classes in zip(shares, _CLASSES, strict=True)
    ]


def _order(name: str, options: DomainsOptions) -> Integers:
    generator = numpy_generator(options.seed, f"data/domains/{name}/order")
    return generator.permutation(getattr(options, name))


class DrawnImages:
    """The images of one split, an `Images`: all drawn when the first is read.

    Args:
        name: of the split.
        options: of the data set.
    """

    def __init__(self, name: str, options: DomainsOptions) -> None:
        self.name = name
        self.options = options
        self.dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, side, side, 3)"""
        side = self.options.resolution
        return (getattr(self.options, self.name), side, side, 3)

    @cached_property
    def pixels(self) -> Bytes:
        """All images: (N, side, side, 3) uint8."""
        return draw_split(self.name, self.options)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Bytes:
        return np.asarray(self.pixels[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.pixels, dtype=dtype, copy=copy)

    def fingerprint(self) -> str:
        """What the pixels are a function of; the sizes of other splits are not among it."""
        options = self.options
        return (
            f"domains {self.name} {self.shape} seed={options.seed} "
            f"difficulty={options.difficulty!r} drawn by {_drawn_by()}"
        )


@lru_cache(maxsize=1)
def _drawn_by() -> str:
    """The code that draws: SHA-256 of the sources, versions of the libraries."""
    digest = hashlib.sha256()
    modules = (digits, stratified, composition, patterns, shapes, glyphs, seeding)
    for path in (__file__, *(module.__file__ for module in modules)):
        digest.update(Path(str(path)).read_bytes())
    # matplotlib brings the fonts, scikit-learn the digits.
    libraries = ("numpy", "pillow", "matplotlib", "scikit-learn")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in libraries]
    return ", ".join([digest.hexdigest(), *versions])


def draw_split(name: str, options: DomainsOptions) -> Bytes:
    """Draw one split, in its order: (N, side, side, 3) uint8."""
    sources = split_sources(options.seed)[name]
    images = []
    for group, own in enumerate(_own_classes(getattr(options, name))):
        generator = numpy_generator(options.seed, f"data/domains/{name}/{GROUPS[group]}")
        pixels = _DRAW[group](own, generator, sources, options.difficulty)
        images.append(_finish(pixels, _NOISE[group], generator, options))
    return np.concatenate(images)[_order(name, options)]


def _finish(
    pixels: Floats, noise: float, generator: np.random.Generator, options: DomainsOptions
) -> Bytes:
    """Sensor noise and rounding: (N, 32, 32, 3) in [0, 1] -> (N, side, side, 3) uint8."""
    high = 0.02 + noise * options.difficulty
    strength = generator.uniform(0.01, high, (len(pixels), 1, 1, 1)).astype(np.float32)
    noisy = pixels + strength * generator.standard_normal(pixels.shape, np.float32)
    images = np.asarray(np.rint(np.clip(noisy, 0, 1) * 255), dtype=np.uint8)
    if options.resolution == SIZE:
        return images
    side = (options.resolution, options.resolution)
    resized = [Image.fromarray(image).resize(side, Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in resized]).astype(np.uint8)


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


# ---------------------------------------------------------------- the four domains


@lru_cache(maxsize=1)
def _textures() -> Grounds:
    return Grounds(("clouds", "grain", "cells", "waves", "plaid", "gradient", "bricks"), 300, 1)


def _digits(
    own: Integers, generator: np.random.Generator, sources: Integers, difficulty: float
) -> Floats:
    """|texture - digit|: (N,) classes -> (N, 32, 32, 3)."""
    grey, digit = source_digits()
    chosen = np.empty(len(own), np.int64)
    for label in range(10):
        rows = own == label
        chosen[rows] = generator.choice(sources[digit[sources] == label], rows.sum())
    large = enlarge(grey[chosen])
    nothing = np.zeros(len(own), bool)
    ink, _ = moved(large, np.zeros_like(large), nothing, 3, generator)
    textures = _textures()
    field = textures.sample(generator.integers(0, len(textures.kinds), len(own)), generator)[
        ..., None
    ]
    first, second = (_colour(len(own), generator) for _ in range(2))
    weak = generator.uniform(0.9 - 0.65 * difficulty, 1.0, (len(own), 1, 1, 1)).astype(np.float32)
    pen = _colour(len(own), generator, (0.9, 1.0), (0.0, 0.6)) * weak
    return np.abs(first + field * (second - first) - ink * pen)


@lru_cache(maxsize=1)
def _grains() -> Grounds:
    return Grounds(("flat", "grain", "clouds"), 300, 2)


def _letters(
    own: Integers, generator: np.random.Generator, sources: Integers, difficulty: float
) -> Floats:
    """One letter in one of many fonts: (N,) classes -> (N, 32, 32, 3)."""
    del sources
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


def _patterns(
    own: Integers, generator: np.random.Generator, sources: Integers, difficulty: float
) -> Floats:
    """A pattern in two colours, partly hidden by an object that says nothing: (N,) -> (N, 32, 32,
    3).
    """
    del sources
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


@dataclasses.dataclass(frozen=True)
class _Look:
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
    _Look(0, 0.00, 0.13, 0.00, 0.02, 0.00),
    _Look(4, 0.03, 0.11, 0.22, 0.06, 0.00),
    _Look(22, 0.02, 0.10, -0.18, 0.02, 0.00),
    _Look(-24, -0.05, 0.10, -0.10, 0.05, 0.00),
    _Look(6, 0.12, 0.20, 0.00, 0.24, 0.00),
    _Look(22, 0.10, 0.19, -0.08, 0.13, 0.00),
    _Look(-12, -0.05, 0.06, -0.12, 0.03, 0.16),
)


def _faces(
    own: Integers, generator: np.random.Generator, sources: Integers, difficulty: float
) -> Floats:
    """Schematic faces: (N,) expressions -> (N, 32, 32, 3)."""
    del sources
    return np.stack([_face(_LOOKS[label], generator, difficulty) for label in own])


def _face(look: _Look, generator: np.random.Generator, difficulty: float) -> Floats:
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


_DRAW: tuple[Callable[[Integers, np.random.Generator, Integers, float], Floats], ...] = (
    _digits,
    _letters,
    _patterns,
    _faces,
)
