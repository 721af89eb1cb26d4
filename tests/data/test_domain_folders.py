"""Folders of domains with folders of classes in them: recognised, read, and refused if unclear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import noise, png

import fedprompt
from fedprompt.config import automatic_whitening, compose
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.partition.base import create as create_partition
from fedprompt.data.partition.base import split_task
from fedprompt.data.reading.files import class_folders, image_names
from fedprompt.data.sets.imagefolder import ImageFolderOptions
from fedprompt.data.task import Split, Task, datasets
from fedprompt.runs.events import Note

DOMAINS, CLASSES = ("art", "photo", "sketch"), ("cat", "dog")


def create(root: Path, **options: Any) -> Task:
    return datasets.create(
        "imagefolder", root=str(root), **{"size": 8, "validation": 0.25, **options}
    )


def tree(root: Path, *folders: str, each: int = 8, seed: int = 0) -> dict[bytes, str]:
    """Images in each folder; pixels -> folder."""
    written: dict[bytes, str] = {}
    for number, folder in enumerate(folders):
        for index, image in enumerate(noise(each, 8, 8, seed + number)):
            png(root / folder / f"{index}.png", image)
            written[image.tobytes()] = folder
    return written


def nested(domains: tuple[str, ...] = DOMAINS, classes: tuple[str, ...] = CLASSES) -> list[str]:
    return [f"{domain}/{name}" for domain in domains for name in classes]


def folders_of(task: Task, split: Split) -> list[str]:
    """What the task says of each image, as a folder."""
    return [
        f"{task.group_names[group]}/{task.class_names[label]}"
        for group, label in zip(split.groups, split.labels, strict=True)
    ]


def check(task: Task, written: dict[bytes, str], *splits: Split) -> None:
    """The splits together hold each written image once, with its domain and class."""
    found = {
        image.tobytes(): folder
        for split in splits
        for image, folder in zip(split.images[:], folders_of(task, split), strict=True)
    }
    assert found == written and sum(map(len, splits)) == len(written)


def test_domains_without_splits_are_divided_by_domain_and_class(tmp_path: Path) -> None:
    written = tree(tmp_path, *nested())
    task = create(tmp_path, test=0.25)
    assert (task.group_names, task.class_names) == (DOMAINS, CLASSES)
    check(task, written, task.train, task.validation, task.test)
    # 8 of each: 2 are tested, and a quarter of the 6 that are left (1.5, rounded to 2) validated.
    for split, count in ((task.test, 2), (task.validation, 2), (task.train, 4)):
        assert sorted(folders_of(task, split)) == sorted(nested() * count)
    (note,) = task.notes
    assert "3 domains (art, photo, sketch)" in note and "2 classes (cat, dog)" in note
    again, other = create(tmp_path, test=0.25), create(tmp_path, test=0.25, seed=1)
    np.testing.assert_array_equal(again.test.images[:], task.test.images[:])
    assert (other.test.images[:] != task.test.images[:]).any()


@pytest.mark.parametrize("validation", ["valid", None])
def test_domains_below_splits(tmp_path: Path, validation: str | None) -> None:
    names = ["train", "test", *([validation] if validation else [])]
    written = {
        name: tree(tmp_path / name, *nested(), each=4, seed=9 * n) for n, name in enumerate(names)
    }
    task = create(tmp_path)
    assert task.group_names == DOMAINS
    check(task, written["test"], task.test)
    if validation:
        check(task, written[validation], task.validation)
        check(task, written["train"], task.train)
    else:
        check(task, written["train"], task.train, task.validation)


def test_a_class_that_one_domain_lacks(tmp_path: Path) -> None:
    tree(tmp_path, *nested(), "photo/fox", each=8)
    task = create(tmp_path)
    assert task.class_names == ("cat", "dog", "fox")
    assert task.class_mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["cat", "dog/small"], r"got images in cat and in dog/small; set data\.layout=class if"),
        (["art/cat", "art/dog", "sketch"], "got images in sketch and in art/cat"),
        (
            ["art/cat", "sketch/cat", "sketch/dog/old"],
            "got images in art/cat and in sketch/dog/old",
        ),
        (["art/cat", "art/dog"], "got one folder art with cat, dog in it; set data.root=.*/art to"),
        (["home/art/cat", "home/photo/cat"], "deep below home/art/cat; set data.root=.*/home to"),
        (["n01/images", "n02/images"], "got nothing but a folder images in each of n01, n02"),
        (["pets/cat", "pets/dog", "cars/vw"], "got cars, pets, which share no class: vw are in"),
        (["train/art/cat", "train/photo/cat", "test/cat"], "images in test/cat and in train/art"),
    ],
)
def test_a_tree_that_may_be_either_is_refused_in_one_line(
    tmp_path: Path, folders: list[str], message: str
) -> None:
    tree(tmp_path, *folders, each=2)
    with pytest.raises(InputError, match=rf"^[^\n]*{message}[^\n]*data\.layout=domain[^\n]*\Z"):
        create(tmp_path)


def test_the_layout_can_be_said(tmp_path: Path) -> None:
    written = tree(tmp_path / "a", *nested())
    task = create(tmp_path / "a", layout="class")
    assert (task.class_names, task.group_names, task.notes) == (DOMAINS, ("imagefolder",), ())
    assert len(task.train) + len(task.validation) + len(task.test) == len(written)
    tree(tmp_path / "b", "pets/cat", "pets/dog", "cars/vw", "cars/opel")
    task = create(tmp_path / "b", layout="domain")
    assert task.group_names == ("cars", "pets") and task.class_mask.sum() == 4
    tree(tmp_path / "c", "art/cat", "art/dog")
    assert create(tmp_path / "c", layout="domain").group_names == ("art",)
    tree(tmp_path / "b", "pets", each=1)
    with pytest.raises(InputError, match=r"got the image pets/0\.png in pets itself"):
        create(tmp_path / "b", layout="domain")
    (tmp_path / "c" / "art" / "fox").mkdir()
    with pytest.raises(InputError, match="art/fox: expected images of class 'fox', got none"):
        create(tmp_path / "c", layout="domain")
    with pytest.raises(InputError, match="expected images as DOMAIN/CLASS/IMAGE, got none"):
        create(_flat(tmp_path / "d"), layout="domain")
    with pytest.raises(ConfigError, match=r"data\.layout: expected one of .*did you mean 'domain'"):
        ImageFolderOptions(layout="domains")


def _flat(root: Path) -> Path:
    (root / "empty").mkdir(parents=True)
    return root


def test_domains_that_are_seen_turn_whitening_on(tmp_path: Path) -> None:
    """`auto` looks at the folders before anything is read, and reads no more than it must."""
    tree(tmp_path / "nested" / "train", *nested(), each=1)
    tree(tmp_path / "flat", "cat", "dog", each=1)

    def auto(name: str, **options: Any) -> str | bool:
        return automatic_whitening(ImageFolderOptions(root=str(tmp_path / name), **options))

    assert auto("nested") == "clients" and auto("flat") is False and auto("gone") is False
    assert auto("nested", layout="class") is False and auto("flat", layout="domain") == "clients"
    root = f"data.root={tmp_path / 'nested'}"
    config = compose("digits", ["data=imagefolder", root, "method=pfpt"])
    assert config.prompts.whiten == "clients" and config.prompts.selection == "keyed"


def test_natural_is_a_domain_a_client(tmp_path: Path) -> None:
    tree(tmp_path, *nested())
    task = create(tmp_path)
    parts = split_task(create_partition("natural"), task, 3, 0)
    assert [np.unique(task.train.groups[part]).tolist() for part in parts] == [[0], [1], [2]]


def test_a_run_reports_accuracy_by_domain(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    tree(tmp_path / "files", *nested(), each=12)
    seen: list[Any] = []
    result = fedprompt.run(
        "digits",
        tiny(
            *("data=imagefolder", f"data.root={tmp_path / 'files'}", "data.size=32"),
            *("partition=natural", "clients.count=3", "clients.per_round=2", "rounds=1"),
            "method=head_only",
            "prompts.count=0",
        ),
        on_event=seen.append,
    )
    assert set(result.summary["domain_accuracy"]) == set(DOMAINS)
    assert any("read as 3 domains" in event.text for event in seen if isinstance(event, Note))


def test_folders_may_be_links(tmp_path: Path) -> None:
    """As in a tree that is put together of parts of others."""
    written = tree(tmp_path / "store", "a", "b", "c", "d")
    for link, target in (
        ("art/cat", "a"),
        ("art/dog", "b"),
        ("photo/cat", "c"),
        ("photo/dog", "d"),
    ):
        (tmp_path / "nested" / link).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nested" / link).symlink_to(tmp_path / "store" / target)
    (tmp_path / "whole").mkdir()
    for domain in ("art", "photo"):
        (tmp_path / "whole" / domain).symlink_to(tmp_path / "nested" / domain)
    for root in ("nested", "whole"):
        task = create(tmp_path / root)
        assert task.group_names == ("art", "photo") and task.class_names == CLASSES
        assert sum(map(len, (task.train, task.validation, task.test))) == len(written)
    (tmp_path / "flat").mkdir()
    for name in ("a", "b"):
        (tmp_path / "flat" / name).symlink_to(tmp_path / "store" / name)
    assert create(tmp_path / "flat").class_names == ("a", "b")


# Hidden files and folders


def test_what_is_hidden_is_no_data(tmp_path: Path) -> None:
    written = tree(tmp_path, *nested())
    for place in (tmp_path, tmp_path / "art", tmp_path / "art" / "cat"):
        for name in (".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", "lost+found"):
            png(place / name / "copy.png", noise(1, 8, 8, 99)[0])
        for name in (".DS_Store", "Thumbs.db", "._0.png", "desktop.ini"):
            (place / name).write_bytes(b"no image")
    assert class_folders(tmp_path) == list(DOMAINS)
    assert len(image_names(tmp_path)) == len(written)
    task = create(tmp_path)
    check(task, written, task.train, task.validation, task.test)


def test_what_is_hidden_in_splits_and_classes_is_no_data(tmp_path: Path) -> None:
    written = tree(tmp_path / "train", *CLASSES) | tree(tmp_path / "test", *CLASSES, seed=9)
    for place in ("train", "test", "train/cat", "test/dog"):
        png(tmp_path / place / ".ipynb_checkpoints" / "0-checkpoint.png", noise(1, 8, 8, 99)[0])
    png(tmp_path / "__MACOSX" / "train" / "cat" / "0.png", noise(1, 8, 8, 99)[0])
    task = create(tmp_path)
    assert task.class_names == CLASSES and len(task.test) == 16
    assert len(task.train) + len(task.validation) + len(task.test) == len(written)
