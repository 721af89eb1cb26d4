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
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedprompt.core import seeding
from fedprompt.core.checks import check_integer
from fedprompt.core.errors import ConfigError
from fedprompt.core.seeding import numpy_generator
from fedprompt.data import drawing, stratified
from fedprompt.data.drawing import faces, scenes
from fedprompt.data.drawing.faces import EXPRESSIONS
from fedprompt.data.drawing.glyphs import SIZE, Bytes
from fedprompt.data.drawing.scenes import LETTERS, PATTERN_CLASSES
from fedprompt.data.sets import digits
from fedprompt.data.sets.digits import enlarge, source_digits
from fedprompt.data.stratified import stratified_parts
from fedprompt.data.task import Split, Task, datasets

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

DIGITS = tuple("0123456789")
GROUPS = ("digits", "letters", "patterns", "faces")
_CLASSES = (DIGITS, LETTERS, PATTERN_CLASSES, EXPRESSIONS)
_SPLITS = ("public", "train", "validation", "test")
_SOURCE_SHARES = (0.2, 0.5, 0.1)
"""Shares of the handwritten digits behind public, train and validation; test has the rest."""

_NOISE = (0.12, 0.3, 0.06, 0.04)
"""Per domain, how much the strongest noise grows with difficulty; balances how hard the domains
are.
"""


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
    used = [Path(str(module.__file__)) for module in (digits, stratified, seeding)]
    # All of the drawing room, so that a new file cannot be forgotten.
    drawn = sorted(Path(drawing.__path__[0]).glob("*.py"))
    for path in (Path(__file__), *used, *drawn):
        digest.update(path.read_bytes())
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
        pixels = _draw_domain(group, own, generator, sources, options.difficulty)
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


def _draw_domain(
    group: int,
    own: Integers,
    generator: np.random.Generator,
    sources: Integers,
    difficulty: float,
) -> Floats:
    """The images of one domain from their classes (N,): (N, 32, 32, 3) in [0, 1]."""
    if GROUPS[group] == "digits":
        return scenes.blended(_written(own, generator, sources), generator, difficulty)
    draw = {
        "letters": scenes.letters,
        "patterns": scenes.covered_patterns,
        "faces": faces.faces,
    }[GROUPS[group]]
    return draw(own, generator, difficulty)


def _written(own: Integers, generator: np.random.Generator, sources: Integers) -> Bytes:
    """A handwritten digit of each class, among those of the split: (N, 32, 32) uint8."""
    grey, digit = source_digits()
    chosen = np.empty(len(own), np.int64)
    for label in range(10):
        rows = own == label
        chosen[rows] = generator.choice(sources[digit[sources] == label], rows.sum())
    return enlarge(grey[chosen])
