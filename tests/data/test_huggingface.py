"""Folders of Hugging Face datasets, written by the library itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import noise
from PIL import Image

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.partition.base import create as create_partition
from fedprompt.data.partition.base import split_task
from fedprompt.data.sets.huggingface import HuggingFaceOptions
from fedprompt.data.task import Task, datasets

hf = pytest.importorskip("datasets")
PIXELS = noise(24, 16, 16, 3)
NAMES = ("zebra", "unused", "ant")
"""Not in the order of the alphabet; labels are 0 and 2 in turn."""


def rows(index: range, **more: Any) -> Any:
    """Some of the 24 images as the library holds them."""
    columns = {
        "picture": [Image.fromarray(PIXELS[n]) for n in index],
        "label": [n % 2 * 2 for n in index],
        "site": [("north", "south")[n // 2 % 2] for n in index],
        "writer": [10 - n % 3 for n in index],
        **more,
    }
    features = hf.Features(
        {
            "picture": hf.Image(),
            "label": hf.ClassLabel(names=list(NAMES)),
            "site": hf.Value("string"),
            "writer": hf.Value("int64"),
            **{name: hf.Value("string") for name in more},
        }
    )
    return hf.Dataset.from_dict(columns, features=features)


@pytest.fixture(autouse=True)
def quiet() -> None:
    hf.disable_progress_bars()


def create(root: Path, **options: Any) -> Task:
    return datasets.create("huggingface", root=str(root), **{"size": 16, **options})


def refused(root: Path, message: str, **options: Any) -> None:
    with pytest.raises((ConfigError, InputError), match=rf"^[^\n]*{message}[^\n]*\Z"):
        create(root, **options)


def test_splits_columns_and_pixels(tmp_path: Path) -> None:
    splits = {"train": range(12), "validation": range(12, 16), "test": range(16, 24)}
    hf.DatasetDict({name: rows(index) for name, index in splits.items()}).save_to_disk(tmp_path)
    task = create(tmp_path, domain_column="site", client_column="writer")
    assert task.class_names == ("zebra", "ant") and task.group_names == ("north", "south")
    for name, index in splits.items():
        split = getattr(task, name)
        np.testing.assert_array_equal(split.images[:], PIXELS[list(index)])
        assert split.labels.tolist() == [n % 2 for n in index]
        assert split.groups.tolist() == [n // 2 % 2 for n in index]
        assert split.clients.tolist() == [2 - n % 3 for n in index]  # 8, 9 and 10 as numbers
    order = np.array([7, 2])
    np.testing.assert_array_equal(task.train.images[order], PIXELS[order])
    assert HuggingFaceOptions(domain_column="site").several_domains
    assert not HuggingFaceOptions().several_domains


def test_one_data_set_is_divided_and_keeps_the_publishers_order(tmp_path: Path) -> None:
    rows(range(24)).save_to_disk(tmp_path / "data")
    task = create(tmp_path / "data", validation=0, test=0.25)
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 0, 6)
    (tmp_path / "p.json").write_text(json.dumps({"a": list(range(12)), "b": list(range(12, 24))}))
    parts = split_task(create_partition("file", file=str(tmp_path / "p.json")), task, 2, 0)
    written = [{PIXELS[n].tobytes() for n in own} for own in (range(12), range(12, 24))]
    for part, own in zip(parts, written, strict=True):
        assert {image.tobytes() for image in task.train.images[part]} <= own
    again = create(tmp_path / "data", validation=0, test=0.25)
    assert again.train.images.fingerprint() == task.train.images.fingerprint()
    assert task.test.images.fingerprint() != task.train.images.fingerprint()


def test_a_bad_image_is_named_or_left_out(tmp_path: Path) -> None:
    table = rows(range(24)).cast_column("picture", hf.Image(decode=False))
    broken = [{"bytes": b"no image", "path": None}, *table[:]["picture"][1:]]
    table = table.remove_columns("picture").add_column("picture", broken)
    table.cast_column("picture", hf.Image()).save_to_disk(tmp_path)
    task = create(tmp_path, on_bad_image="skip")
    assert len(task.train) + len(task.validation) + len(task.test) == 23
    assert "1 of" in task.notes[0] and "train, row 0" in task.notes[0]
    task = create(tmp_path)
    with pytest.raises(InputError, match=r"train, row 0: the image does not decode \(its content"):
        for split in (task.train, task.validation, task.test):
            split.images[:]


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path, "huggingface: no data in .* save_to_disk")
    rows(range(12), word=["x"] * 12).save_to_disk(tmp_path / "a")
    a, d = tmp_path / "a", tmp_path / "d"
    refused(a, r"data\.label_column: .*'lable'; did you mean 'label'\?", label_column="lable")
    refused(a, r"data\.image_column: .*of type Image, got 'word' of type V", image_column="word")
    rows(range(12)).remove_columns("picture").save_to_disk(tmp_path / "b")
    refused(
        tmp_path / "b", r"one column of type Image in .*, got none of label, site, writer; name"
    )
    hf.DatasetDict({"train": rows(range(8)), "extra": rows(range(8))}).save_to_disk(tmp_path / "c")
    refused(tmp_path / "c", "expected the splits train and.*, got train, extra")
    rows(range(12), word=["x"] * 11 + [None]).save_to_disk(d)
    refused(d, "in each row of column 'word', got None in row 11", domain_column="word")
    (arrow,) = (tmp_path / "a").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    refused(tmp_path / "a", "got one that does not open")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(tmp_path / "b", r"needs the package datasets.*pip install 'fedprompt\[huggingface\]'")
