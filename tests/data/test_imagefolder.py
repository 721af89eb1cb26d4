"""The user's own images: folders of classes in three shapes, and a CSV file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import class_folders, noise, png
from PIL import Image

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.task import Split, Task, datasets

CLASSES = ("ant", "bee", "cat")


def create(**options: Any) -> Task:
    return datasets.create("imagefolder", **{"size": 16, "validation": 0.25, **options})


def rows(*splits: Split) -> list[tuple[bytes, int]]:
    return sorted(
        (image.tobytes(), int(label))
        for split in splits
        for image, label in zip(split.images[:], split.labels, strict=True)
    )


def refused(message: str, **options: Any) -> None:
    with pytest.raises((ConfigError, InputError), match=rf"^[^\n]*{message}[^\n]*\Z"):
        create(**options)


@pytest.mark.parametrize("validation", ["val", "valid", "validation", None])
@pytest.mark.parametrize("test", [True, False])
def test_folders_of_splits(tmp_path: Path, validation: str | None, test: bool) -> None:
    splits = ["train", *([validation] if validation else []), *(["test"] if test else [])]
    written = class_folders(tmp_path, splits, CLASSES, 8, 16)
    task = create(root=str(tmp_path))
    assert task.class_names == CLASSES and task.group_names == ("imagefolder",)
    both = {
        name: sorted((i.tobytes(), n) for i, n in zip(*w, strict=True))
        for name, w in written.items()
    }
    if validation:
        assert rows(task.validation) == both[validation]
    if test:
        assert rows(task.test) == both["test"]
    cut = [s for s, own in ((task.validation, validation), (task.test, test)) if not own]
    assert rows(task.train, *cut) == both["train"]
    assert all(np.bincount(split.labels).min() >= 1 for split in cut)


@pytest.mark.parametrize(
    "folders",
    [["Train", "test"], ["val", "test"], ["train", "val", "valid"], ["train", "test", "extra"]],
)
def test_folders_that_are_splits_in_part_are_refused(tmp_path: Path, folders: list[str]) -> None:
    class_folders(tmp_path, folders, CLASSES, 4, 16)
    refused(f"or a folder for each class, got {', '.join(sorted(folders))};", root=str(tmp_path))


def test_folders_of_classes_are_divided_by_the_seed(tmp_path: Path) -> None:
    written = class_folders(tmp_path, ["."], ("ant", "bee", "train"), 10, 16)["."]
    task = create(root=str(tmp_path), validation=0.25, test=0.2)
    assert task.class_names == ("ant", "bee", "train")  # a class, since no folder is in it
    sizes = [len(split) for split in (task.train, task.validation, task.test)]
    assert sizes == [18, 6, 6]
    everything = rows(task.train, task.validation, task.test)
    assert everything == sorted((i.tobytes(), int(n)) for i, n in zip(*written, strict=True))
    again, other = create(root=str(tmp_path)), create(root=str(tmp_path), seed=5)
    assert rows(again.test) == rows(task.test) != rows(other.test)


def test_images_in_folders_below_a_class(tmp_path: Path) -> None:
    for number, image in enumerate(noise(8, 16, 16, 0)):
        png(tmp_path / "ant" / f"day {number % 2}" / f"{number}.PNG", image)
        png(tmp_path / "bee" / f"{number}.png", 255 - image)
    task = create(root=str(tmp_path), layout="class")
    assert np.bincount(np.concatenate([task.train.labels, task.test.labels])).tolist() == [6, 6]
    refused(r"got images in bee and in ant/day [01]; set data\.layout=class", root=str(tmp_path))


def test_folders_bad_input(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(r"no data in .*: expected folders train/CLASS/", root=str(tmp_path / "empty"))
    refused("no data in", root=str(tmp_path / "gone"))
    class_folders(tmp_path / "a", ["train", "test"], CLASSES, 4, 16)
    (tmp_path / "a" / "train" / "dog").mkdir()
    refused("expected images of class 'dog', got none", root=str(tmp_path / "a"))
    (tmp_path / "a" / "train" / "dog").rmdir()
    png(tmp_path / "a" / "test" / "dog" / "1.png", noise(1, 16, 16, 0)[0])
    refused("expected training images of every class, got none of 'dog'", root=str(tmp_path / "a"))
    class_folders(tmp_path / "b", ["train"], CLASSES, 2, 16)
    (tmp_path / "b" / "test").mkdir()
    refused("b/test: expected a folder for each class, got none", root=str(tmp_path / "b"))
    class_folders(tmp_path / "c", ["."], CLASSES, 2, 16)
    refused("data.test: expected a share that leaves both", root=str(tmp_path / "c"), test=0.01)
    (tmp_path / "b" / "test" / "ant").mkdir()
    (tmp_path / "b" / "test" / "ant" / "1.png").write_bytes(b"no image")
    task = create(root=str(tmp_path / "b"), validation=0.5)
    with pytest.raises(InputError, match=r"test/ant/1\.png: the image does not decode"):
        task.test.images[:]
    refused("leaves both splits images|data.test", root=str(tmp_path / "b"), validation=0.01)


# CSV


def table(folder: Path, columns: str, *lines: str) -> str:
    (folder / "list.csv").write_text("\n".join([columns, *lines]) + "\n", encoding="utf-8")
    return str(folder / "list.csv")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number, image in enumerate(noise(16, 16, 16, 7)):
        png(tmp_path / "img" / f"{number}.png", image)
    return tmp_path


def test_a_csv_with_all_columns(pictures: Path) -> None:
    lines = [
        f"img/{n}.png,{('bee', 'ant')[n % 2]},{('day', 'night')[n // 2 % 2]},"
        f"{('train', 'valid', 'test', 'train')[n // 4]},{10 - n % 3}"
        for n in range(16)
    ]
    task = create(csv=table(pictures, "path,label,group,split,client", *lines))
    assert task.class_names == ("ant", "bee") and task.group_names == ("day", "night")
    numbers = {
        "train": [0, 1, 2, 3, 12, 13, 14, 15],
        "validation": [4, 5, 6, 7],
        "test": range(8, 12),
    }
    for name, own in numbers.items():
        split: Split = getattr(task, name)
        np.testing.assert_array_equal(split.images[:], noise(16, 16, 16, 7)[list(own)])
        assert split.labels.tolist() == [1 - n % 2 for n in own]
        assert split.groups.tolist() == [n // 2 % 2 for n in own]
        assert split.clients is not None
        # Clients 8, 9 and 10 are numbered in the order of numbers, not of text.
        assert split.clients.tolist() == [2 - n % 3 for n in own]


def test_a_csv_with_two_columns_elsewhere(pictures: Path) -> None:
    (pictures / "lists").mkdir()
    file = table(pictures / "lists", "label,path", *(f"{n % 2 + 9},{n}.png" for n in range(16)))
    task = create(csv=file, root=str(pictures / "img"), test=0.25)
    assert task.class_names == ("9", "10") and task.group_names == ("all",)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [8, 4, 4]
    assert task.train.clients is None
    written = sorted((i.tobytes(), n % 2) for n, i in enumerate(noise(16, 16, 16, 7)))
    assert rows(task.train, task.validation, task.test) == written


@pytest.mark.parametrize(
    ("columns", "lines", "message"),
    [
        ("path,lable", ["img/0.png,a"], "unknown column 'lable'.*did you mean 'label'"),
        ("path,group", ["img/0.png,a"], "expected a first line with path and label"),
        ("path,label", [], "got 0 rows of path, label"),
        ("path,label", ["img/0.png"], "line 2: expected path, label, each with a value"),
        ("path,label", ["img/0.png,"], "line 2: expected path, label, each with a value"),
        ("path,label", ["img/0.png,a,b"], "line 2: expected path, label, each with a value"),
        ("path,label", ["img/0.png,a", "img/0.png,b"], "line 3: 'img/0.png' is there twice"),
        ("path,label,split", ["img/0.png,a,tset"], "line 2: split: .*did you mean 'test'"),
        ("path,label,split", ["img/0.png,a,test"], "expected rows with split 'train', got none"),
        (
            "path,label",
            ["img/0.png,a", "img/../img/0.png,a", "img/1.png,a"],
            "each image once, got",
        ),
        ("path,label", ["img/99.png,a"], "1 of 1 listed images do not exist, the first is img/99"),
        (
            "path,label,split",
            ["img/0.png,a,train", "img/1.png,a,val", "img/2.png,b,test"],
            "expected training images of every class, got none of 'b'",
        ),
        (
            "path,label,split,group",
            ["img/0.png,a,train,x", "img/1.png,a,val,x", "img/2.png,a,test,y"],
            "class 'a' of domain 'y' does not occur in the training split",
        ),
    ],
)
def test_csv_bad_input(pictures: Path, columns: str, lines: list[str], message: str) -> None:
    refused(message, csv=table(pictures, columns, *lines))


def test_a_csv_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    refused("data.csv: expected a CSV file, got .*gone.csv", csv=str(tmp_path / "gone.csv"))
    (tmp_path / "list.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    refused("cannot be read as CSV", csv=str(tmp_path / "list.csv"))


def test_labels_that_differ_by_blanks_are_one_class(pictures: Path) -> None:
    """Blanks around a value and doubled ones inside do not count; the names have single ones."""
    labels = ("big cat", " big cat", "big  cat ", "dog", "dog\t", "dog")
    lines = [f"img/{n}.png,{labels[n % 6]}, site {n % 2} , {n % 3}" for n in range(12)]
    task = create(csv=table(pictures, "path, label ,group, client", *lines))
    assert task.class_names == ("big cat", "dog") and task.group_names == ("site 0", "site 1")
    each = [split.labels for split in (task.train, task.validation, task.test)]
    assert np.bincount(np.concatenate(each)).tolist() == [6, 6]
    assert task.train.clients is not None and set(task.train.clients) == {0, 1, 2}


@pytest.mark.parametrize("column", ["label", "group", "client"])
def test_values_that_differ_by_blanks_inside_are_refused(pictures: Path, column: str) -> None:
    row = ["label", "group", "client"]
    odd = ["ab c" if name == column else "abc" for name in row]
    lines = [",".join([f"img/{n}.png", *(odd if n == 2 else ["abc"] * 3)]) for n in range(4)]
    refused(
        f"line 4: {column} 'ab c' differs from 'abc' in line 2 by blanks alone; write both alike",
        csv=table(pictures, "path,label,group,client", *lines),
    )


def test_svg_and_webp(tmp_path: Path) -> None:
    """A drawing of one colour a class; the animation is noted."""
    for name, colour in (("blue", "#0000ff"), ("red", "#ff0000")):
        folder = tmp_path / name
        folder.mkdir()
        shape = f'<rect width="8" height="8" fill="{colour}"/>'
        for number in range(6):
            text = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{shape}</svg>'
            (folder / f"{number}.svg").write_text(text)
            frames = [Image.new("RGB", (8, 8), colour), Image.new("RGB", (8, 8))]
            animated = number == 0
            frames[0].save(
                folder / f"{number}.webp",
                save_all=animated,
                append_images=frames[1:] if animated else [],
                lossless=True,
            )
    task = create(root=str(tmp_path))
    colours = np.array([(0, 0, 255), (255, 0, 0)])
    for split in (task.train, task.validation, task.test):
        expected = np.broadcast_to(colours[split.labels][:, None, None], split.images.shape)
        np.testing.assert_array_equal(split.images[:], expected)
    (note,) = task.notes
    assert "2 animated images" in note and "0.webp" in note


def test_a_drawing_that_is_refused_can_be_skipped(tmp_path: Path) -> None:
    class_folders(tmp_path, ["."], CLASSES, 8, 16)
    bad = tmp_path / "ant" / "bad.svg"
    bad.write_text('<svg viewBox="0 0 1 1"><script>x</script></svg>')
    task = create(root=str(tmp_path), on_bad_image="skip")
    (note,) = task.notes
    assert "1 of" in note and "bad.svg" in note
