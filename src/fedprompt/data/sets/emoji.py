"""The same pictures in five hands: emoji as five vendors draw them.

Every vendor draws each concept of Unicode anew, so that the five styles are domains with the same
classes: a class is a subcategory of Unicode (animal-mammal, clothing, drink, ...). Images come from
four packages of npm. Splits are drawn by *concept*, the same for all styles: what is tested was
never trained on, in any style.

Flags, parts of other emoji and the times of day are left out. So are people and families, who are
told apart by their surroundings rather than by what they are.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np

from fedprompt.core.checks import check_choice, check_integer
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.core.seeding import numpy_generator
from fedprompt.data.reading.files import data_folder, image_names
from fedprompt.data.reading.images import ImageFiles, Indices
from fedprompt.data.reading.packages import Package, package_folders
from fedprompt.data.reading.published import (
    ImageOptions,
    Labelled,
    Published,
    ValidationOptions,
    build_task,
    check_share,
    without_bad_images,
)
from fedprompt.data.stratified import stratified_parts
from fedprompt.data.task import Task, datasets

GOOGLE = Package(
    name="emoji-datasource-google",
    version="16.0.0",
    sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    licence="MIT; images Apache-2.0",
    source="Noto Emoji, Google",
    kept=("emoji.json", "img/google/64/*.png"),
)
TWITTER = Package(
    name="emoji-datasource-twitter",
    version="16.0.0",
    sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    licence="MIT; images CC-BY-4.0",
    source="Twemoji, Twitter and contributors",
    kept=("img/twitter/64/*.png",),
)
OPENMOJI = Package(
    name="openmoji",
    version="17.0.0",
    sha256="55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    licence="CC-BY-SA-4.0",
    source="OpenMoji, HfG Schwaebisch Gmuend",
    kept=("color/svg/*.svg", "black/svg/*.svg"),
)
FLUENT = Package(
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    licence="MIT",
    source="Fluent Emoji, Microsoft",
    kept=("assets/*.webp",),
)
PACKAGES = (GOOGLE, TWITTER, OPENMOJI, FLUENT)

FOLDERS = {
    "noto": f"{GOOGLE.folder}/img/google/64",
    "twemoji": f"{TWITTER.folder}/img/twitter/64",
    "openmoji": f"{OPENMOJI.folder}/color/svg",
    "line": f"{OPENMOJI.folder}/black/svg",
    "fluent3d": f"{FLUENT.folder}/assets",
}
"""Where the images of each style are."""
STYLES = tuple(FOLDERS)
LEVELS = ("subcategory", "category")
WITHOUT = frozenset({"Flags", "Component", "family", "time"})
"""Categories and subcategories that are left out, beside those of `person`."""


@dataclasses.dataclass(frozen=True)
class Concept:
    """What is drawn, once in each style."""

    name: str
    """Unicode's code points in hexadecimal, `1F600`."""
    category: str
    subcategory: str
    files: dict[str, str]
    """Name of the image of each style, below the data set's folder."""


@dataclasses.dataclass(frozen=True)
class EmojiOptions(ImageOptions, ValidationOptions):
    """Options of `emoji`; `test` and `validation` are shares of each class's concepts."""

    size: int = 98
    styles: list[str] = dataclasses.field(default_factory=lambda: list(STYLES))
    """The domains, of noto, twemoji, openmoji, line (drawings in black) and fluent3d."""
    public: str | None = None
    """A style that no client has: its images of the training concepts are the public split."""
    level: str = "subcategory"
    """What a class is: a `subcategory` of Unicode, or a coarser `category`."""
    min_concepts: int = 20
    """Classes with fewer concepts, counting those that all five styles draw, are left out."""
    shots: int | None = None
    """Training concepts of a class at most; null takes all."""
    test: float = 0.3
    """Share of each class's concepts that is tested."""

    @property
    def domains(self) -> tuple[str, ...]:
        """The styles that clients have."""
        return tuple(style for style in self.styles if style != self.public)

    @property
    def several_domains(self) -> bool:
        """Whether clients have more than one style."""
        return len(self.domains) > 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("test", self.test)
        check_choice("data.level", self.level, LEVELS)
        check_integer("data.min_concepts", self.min_concepts, 3)
        if self.shots is not None:
            check_integer("data.shots", self.shots, 1)
        for style in (*self.styles, *([] if self.public is None else [self.public])):
            check_choice("data.public" if style == self.public else "data.styles", style, STYLES)
        if len(set(self.styles)) < len(self.styles) or not self.domains:
            raise ConfigError(
                f"data.styles: expected different styles and at least one beside data.public, got "
                f"{', '.join(self.styles) or 'none'} and {self.public or 'no public one'}"
            )
        if self.test + self.validation >= 1:
            raise ConfigError(
                f"data.test: expected shares that leave training concepts, got {self.test} and "
                f"data.validation {self.validation}"
            )


@datasets.register("emoji", EmojiOptions)
def emoji(options: EmojiOptions) -> Task:
    """Classes of concepts, five domains with the same classes."""
    root = data_folder(options.root, "emoji")
    concepts = read_concepts(root)
    class_names, labels = classify(concepts, options.level, options.min_concepts)
    if not class_names:
        raise ConfigError(
            f"data.min_concepts: expected a class with at least {options.min_concepts} concepts in "
            f"all styles, got none; lower it"
        )
    chosen = [concept for concept, label in zip(concepts, labels, strict=True) if label >= 0]
    labels = labels[labels >= 0]
    test, validation, train = split_concepts(labels, options)
    split = {
        name: drawn_in(root, options.domains, chosen, labels, part, options.size)
        for name, part in (("train", train), ("test", test), ("validation", validation))
    }
    published = Published(
        class_names,
        split["train"],
        split["test"],
        split["validation"],
        options.domains,
        public=drawn_in(root, (options.public,), chosen, labels, train, options.size)
        if options.public
        else None,
    )
    published = without_bad_images("emoji", published, options)
    return build_task("emoji", published, options)


def read_concepts(root: Path, name: str = "emoji") -> list[Concept]:
    """The concepts that all five styles draw, in the order of Unicode.

    Args:
        root: the folder of the packages.
        name: of the data set, for messages.

    Raises:
        ConfigError: a package is not there.
        InputError: a package is another version or damaged.
    """
    package_folders(name, root, PACKAGES)
    path = root / GOOGLE.folder / "emoji.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise ValueError(type(entries).__name__)
        entries.sort(key=lambda entry: int(entry["sort_order"]))
        there = {style: set(image_names(root / folder)) for style, folder in FOLDERS.items()}
        return [
            Concept(entry["unified"], entry["category"], entry["subcategory"], files)
            for entry in entries
            if not is_left_out(entry["category"], entry["subcategory"])
            if (files := _files(entry, there)) is not None
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: expected a list of emoji with unified, sort_order, category and subcategory, "
            f"got another file ({' '.join(str(error).split())[:100]}); remove the folder "
            f"{path.parent.name} and get the package again"
        ) from error


def is_left_out(category: str, subcategory: str) -> bool:
    """Whether a kind of emoji is left out, see the top of this file."""
    return bool({category, subcategory} & WITHOUT) or subcategory.startswith("person")


def _files(entry: dict[str, str | None], there: dict[str, set[str]]) -> dict[str, str] | None:
    """The image of each style, or None if one is missing.

    Packages differ in how they write a code: in capitals or not, with leading zeros or not, with
    or without FE0F (which asks for a picture instead of a character).
    """
    unified = str(entry["unified"])
    plain = "-".join(part for part in unified.split("-") if part != "FE0F")
    codes = (unified, entry.get("non_qualified") or unified, plain)
    short = ["-".join(part.lstrip("0") for part in code.split("-")).lower() for code in codes]
    candidates = {
        "noto": [f"{code.lower()}.png" for code in codes],
        "twemoji": [f"{code.lower()}.png" for code in codes],
        "openmoji": [f"{code}.svg" for code in codes],
        "line": [f"{code}.svg" for code in codes],
        "fluent3d": [f"{code}.webp" for code in short],
    }
    found: dict[str, str] = {}
    for style, names in candidates.items():
        name = next((each for each in names if each in there[style]), None)
        if name is None:
            return None
        found[style] = f"{FOLDERS[style]}/{name}"
    return found


def classify(
    concepts: list[Concept], level: str, min_concepts: int
) -> tuple[tuple[str, ...], Indices]:
    """Names of the classes in alphabetical order, and each concept's class; -1 for none.

    Args:
        concepts: all that are drawn in every style.
        level: `category` or `subcategory`.
        min_concepts: what a class needs.
    """
    kinds = [getattr(concept, level) for concept in concepts]
    counts = collections.Counter(kinds)
    names = tuple(sorted(kind for kind, count in counts.items() if count >= min_concepts))
    number_of = {name: number for number, name in enumerate(names)}
    return names, np.array([number_of.get(kind, -1) for kind in kinds], np.int64)


def split_concepts(labels: Indices, options: EmojiOptions) -> tuple[Indices, Indices, Indices]:
    """Test, validation and training concepts; each class is divided in the same shares.

    Raises:
        ConfigError: a share leaves a split without concepts.
    """
    generator = numpy_generator(options.seed, "data/emoji/concepts")
    shares = (options.test, options.validation)
    test, validation, train = stratified_parts(labels, shares, generator)
    num_classes = len(np.unique(labels))
    full = len(test) and (len(validation) or not options.validation)
    if not full or len(np.unique(labels[train])) < num_classes:
        raise ConfigError(
            f"data.test: expected shares that leave every split concepts, got {options.test} and "
            f"data.validation {options.validation} of {len(labels)} concepts in {num_classes} "
            "classes"
        )
    if options.shots is not None:
        generator = numpy_generator(options.seed, "data/emoji/shots")
        taken = [
            generator.permutation(train[labels[train] == label])[: options.shots]
            for label in range(num_classes)
        ]
        train = np.sort(np.concatenate(taken))
    return test, validation, train


def drawn_in(
    root: Path,
    styles: tuple[str, ...],
    concepts: list[Concept],
    labels: Indices,
    chosen: Indices,
    size: int,
) -> Labelled:
    """The images of some concepts, style after style; a style's number is its domain.

    Args:
        root: folder of the packages.
        styles: which.
        concepts: all concepts.
        labels: (N,) their classes.
        chosen: positions of the concepts to take.
        size: side of the images in pixels.
    """
    names = [concepts[index].files[style] for style in styles for index in chosen]
    groups = np.repeat(np.arange(len(styles)), len(chosen)).astype(np.int64)
    images = ImageFiles(root, names, size, background="white")
    return Labelled(images, np.tile(labels[chosen], len(styles)), groups)
