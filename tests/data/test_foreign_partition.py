"""Partitions of other programs: JSON, FedLab's dictionary, LEAF's files; by number and by path."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import cifar10_binary, class_folders

import fedprompt
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.data.partition.base import create, left_out, split_task
from fedprompt.data.partition.file import read_partition
from fedprompt.data.reading import bounded
from fedprompt.data.reading.bounded import read_arrays
from fedprompt.data.task import Task, datasets
from fedprompt.runs.events import Note
from fedprompt.runs.federation import prepare

Parts = list[np.ndarray[Any, np.dtype[np.int64]]]
BY_CLIENT = {"9": [5, 0, 7], "10": [1, 98, 99], "11": [50]}
"""Numbers in the published order of 100 images; JSON and text sort 10 before 9."""


@pytest.fixture
def cifar(tmp_path: Path) -> Callable[..., tuple[Task, np.ndarray[Any, Any]]]:
    """The task, and the training images in the order in which they were written."""
    written, _ = cifar10_binary(tmp_path / "cifar" / "cifar-10-batches-bin", per_batch=20)

    def task(**options: Any) -> tuple[Task, np.ndarray[Any, Any]]:
        return datasets.create("cifar10", root=str(tmp_path / "cifar"), **options), written[0]

    return task


def divide(path: Path, task: Task, num_clients: int = 3) -> Parts:
    return split_task(create("file", file=str(path)), task, num_clients, 0)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def fedlab_archive(path: Path) -> Path:
    np.savez(path, **{client: np.array(own) for client, own in BY_CLIENT.items()})
    return path


def leaf(members: dict[str, list[Any]], labels: dict[str, list[Any]] | None = None) -> Any:
    return {
        "users": list(members),
        "num_samples": [len(each) for each in members.values()],
        "user_data": {
            user: {"x": own, **({} if labels is None else {"y": labels[user]})}
            for user, own in members.items()
        },
    }


# What they say


@pytest.mark.parametrize("kind", ["json", "client_dict", "npz", "leaf", "leaf in files"])
def test_numbers_are_positions_in_the_published_order(
    tmp_path: Path, cifar: Callable[..., Any], kind: str
) -> None:
    contents = {
        "json": BY_CLIENT,
        "client_dict": {"client_dict": BY_CLIENT},
        "leaf": leaf(BY_CLIENT),
    }
    if kind in contents:
        path = write(tmp_path / "clients.json", contents[kind])
    elif kind == "npz":
        path = fedlab_archive(tmp_path / "clients.npz")
    else:
        path = tmp_path / "train"
        for name in ("9", "10", "11"):
            write(path / f"part_{int(name):02}.json", leaf({name: BY_CLIENT[name]}))
        (path / ".DS_Store").write_bytes(b"no JSON")
    task, published = cifar(validation=0)
    parts = divide(path, task)
    for part, own in zip(parts, ([0, 5, 7], [1, 98, 99], [50]), strict=True):
        np.testing.assert_array_equal(task.train.images[part], published[own])


def test_images_held_out_for_validation_are_left_out_and_counted(
    tmp_path: Path, cifar: Callable[..., Any]
) -> None:
    task, published = cifar(validation=0.3, max_train=60)
    assert len(task.train) == 60
    path = write(tmp_path / "all.json", {"a": list(range(50)), "b": list(range(50, 100))})
    partitioner = create("file", file=str(path))
    parts = split_task(partitioner, task, 2, 0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(60))
    for part, (first, last) in zip(parts, ((0, 50), (50, 100)), strict=True):
        theirs = {image.tobytes() for image in published[first:last]}
        assert {image.tobytes() for image in task.train.images[part]} <= theirs
    (note,) = left_out(partitioner, parts)
    assert note.startswith("partition: 40 of 100 images that the file lists are held out")
    everything, _ = cifar(validation=0)
    assert left_out(partitioner, split_task(partitioner, everything, 2, 0)) == []
    assert left_out(create("iid"), parts) == []


@pytest.mark.parametrize(
    "spelt",
    [
        lambda root, name: name,
        lambda root, name: f"train/{name}",
        lambda root, name: f"{root.name}/train/{name}",
        lambda root, name: str(root / "train" / name),
        lambda root, name: f"./train//{name}",
    ],
)
def test_paths_are_compared_from_their_end(
    tmp_path: Path, spelt: Callable[[Path, str], str]
) -> None:
    root = tmp_path / "files"
    written = class_folders(root, ["train", "test"], ("ant", "bee"), 4, 8)["train"][0]
    task = datasets.create("imagefolder", root=str(root), size=8, validation=0)
    own = {"x": ["bee/0004.png", "ant/0001.png"], "y": ["bee/0007.png"]}
    path = write(
        tmp_path / "p.json",
        {who: [spelt(root, each) for each in names] for who, names in own.items()},
    )
    parts = divide(path, task, 2)
    np.testing.assert_array_equal(task.train.images[parts[0]], written[[1, 4]])
    np.testing.assert_array_equal(task.train.images[parts[1]], written[[7]])


def test_a_file_name_alone_will_do_where_it_is_the_only_one(tmp_path: Path) -> None:
    """As in LEAF's CelebA: `x` holds file names, `y` what the program calls the classes."""
    class_folders(tmp_path / "files", ["."], ("ant", "bee"), 8, 8)  # numbered from 0 to 15
    options = {"root": str(tmp_path / "files"), "size": 8, "validation": 0, "test": 0.25}
    task = datasets.create("imagefolder", **options)
    names = {"a": [f"{n:04d}.png" for n in range(8)], "b": [f"{n:04d}.png" for n in range(8, 16)]}
    path = write(tmp_path / "leaf.json", leaf(names, {"a": [7] * 8, "b": [3] * 8}))
    parts = divide(path, task, 2)
    # A quarter of each class is tested; what is left of the first eight images are ants.
    assert [len(part) for part in parts] == [6, 6]
    assert [set(task.train.labels[part]) for part in parts] == [{0}, {1}]
    wrong = write(tmp_path / "wrong.json", leaf(names, {"a": [7] * 8, "b": [3] * 4 + [7] * 4}))
    line = r"labels in .* do not fit the data: 7 stands for classes 0 and 1"
    with pytest.raises(ConfigError, match=line):
        divide(wrong, task, 2)


def test_positions_survive_bad_images_and_cuts(tmp_path: Path) -> None:
    """An image that is left out keeps its number, so that those behind it keep theirs."""
    written = class_folders(tmp_path / "files", ["."], ("ant", "bee"), 8, 8)["."][0]
    (tmp_path / "files" / "ant" / "0002.png").write_bytes(b"no image")
    task = datasets.create(
        "imagefolder", root=str(tmp_path / "files"), size=8, on_bad_image="skip", test=0.25
    )
    path = write(tmp_path / "p.json", {"a": list(range(8)), "b": list(range(8, 16))})
    ants = {image.tobytes() for image in written[:8]}
    first, second = (task.train.images[part] for part in divide(path, task, 2))
    assert {image.tobytes() for image in first} <= ants
    assert not {image.tobytes() for image in second} & ants


def test_the_order_of_digits_is_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    task = datasets.create("digits", validation=0)
    path = write(tmp_path / "p.json", {"a": list(range(900)), "b": list(range(900, 1797))})
    parts = divide(path, task, 2)
    assert sum(map(len, parts)) == len(task.train)
    target = load_digits().target
    held = sorted(np.bincount(target[900:]) - np.bincount(task.train.labels[parts[1]]))
    assert min(held) >= 0 and sum(held) == 897 - len(parts[1])


# What is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "got no client"),
        ([[1, 2]], "got a list instead of a mapping"),
        ({"a": 3}, "got a int for client 'a'"),
        ({"a": [1.5]}, "got a float in the list of client 'a'"),
        ({"a": [True]}, "got a bool in the list"),
        ({"a": [[0.1, 0.2]]}, "a file that holds the images themselves is no partition"),
        ({"a": [1], "b": ["x.png"]}, "got numbers and paths; write one kind"),
        ({"a": [-1]}, "got a number out of range"),
        ({"a": [10**30]}, "got a number out of range"),
        (
            {"a": [0], "b": [100], "c": [1]},
            "client 'b' .* holds image 100, but .* with 100, counted",
        ),
        ({"a": [0], "b": [3, 3], "c": [1]}, "got image 3 for clients 'b' and 'b'"),
        ({"a": [0], "b": [1], "c": [0]}, "got image 0 for clients 'a' and 'c'"),
        ({"a": [0], "b": []}, r"^clients\.count: .* is for 2 clients, got 3; set clients\.count=2"),
        ({"a": [0], "b": [], "c": [1]}, "client 'b' .* has no image that is trained on, of 0"),
        ({"a": ["x.png"], "b": ["y"], "c": ["z"]}, "lists paths, but the images .* are no files"),
        ({**leaf({"a": [1, 2]}), "num_samples": [3]}, "a num_samples that does not fit user_data"),
        ({**leaf({"a": [1]}), "users": ["a", "b"]}, "got 'b'"),
        (leaf({"a": [1]}, {"a": []}), "got other numbers of x and y"),
        (leaf({"a": [[0.5] * 784]}, {"a": [3]}), "holds the images themselves is no partition"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, cifar: Callable[..., Any], content: Any, message: str
) -> None:
    path, (task, _) = write(tmp_path / "bad.json", content), cifar(validation=0)
    with pytest.raises(ConfigError, match=rf"^[^\n]*{message.removeprefix('^')}[^\n]*\Z"):
        divide(path, task)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe", "can't decode byte"),
        (b'{"a": [1], "a": [2]}', "the key 'a' twice"),
        (b'{"a":' + b"[" * 100_000, "recursion"),
        (pickle.dumps({"a": [1]}), "can't decode byte"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^partition\.file: [^\n]*{message}[^\n]*\Z"):
        create("file", file=str(tmp_path / "bad.json"))


def test_paths_that_are_not_there_or_not_clear(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        class_folders(tmp_path / "files" / name, ["."], ("x", "y"), 2, 8)
    options = {"root": str(tmp_path / "files"), "size": 8, "validation": 0, "layout": "class"}
    task = datasets.create("imagefolder", **options)
    gone = write(tmp_path / "gone.json", {"a": ["ant/x/0000.png", "gone.png"], "b": ["../u.png"]})
    with pytest.raises(
        ConfigError, match=r"2 of 3 images that .* no training images, .* gone\.png"
    ):
        divide(gone, task, 2)
    unclear = write(tmp_path / "unclear.json", {"a": ["x/0000.png"]})
    with pytest.raises(ConfigError, match=r"several training images end in x/0000\.png"):
        divide(unclear, task, 1)


class Program:
    """Leaves a mark when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["clients.pkl", "clients.npy", "clients.json", "clients.npz"])
def test_a_pickle_is_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"client_dict": Program(tmp_path / "ran")}))
    advice = r"json\.dump\(" if name[-3:] in ("pkl", "npy") else "got "
    with pytest.raises(ConfigError, match=rf"^partition\.file: [^\n]*{advice}[^\n]*\Z"):
        create("file", file=str(tmp_path / name))
    pickled = tmp_path / "objects.npz"
    np.savez(pickled, client_dict=np.array([Program(tmp_path / "ran")]), allow_pickle=True)
    with pytest.raises(ConfigError, match="pickled objects, which are not read"):
        create("file", file=str(pickled))
    assert not (tmp_path / "ran").exists()


# Lengths


def lying(path: Path, shape: str, data: bytes = bytes(8)) -> Path:
    """An archive of one array whose header promises another shape."""
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("indices.npy", array)
        archive.writestr("sizes.npy", array)
    return path


def test_lengths_are_checked_before_anything_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = lying(tmp_path / "honest.npz", "(1,)")
    assert read_arrays(honest)["indices"].tolist() == [0]
    for shape in ("(10000000000000,)", "(3000000000, 3000000000)", "(2,)", "(0,)"):
        path = lying(tmp_path / "lying.npz", shape)
        with pytest.raises(ConfigError, match=r"an array 'indices' of \d+ bytes in 8"):
            read_partition(path)
    bomb = lying(tmp_path / "bomb.npz", "(125000,)", bytes(1_000_000))
    assert bomb.stat().st_size < 10_000
    monkeypatch.setattr(bounded, "MAX_BYTES", 1_000_000)
    with pytest.raises(ConfigError, match="bytes, more than 0 MB"):
        read_partition(bomb)
    monkeypatch.setattr(bounded, "MAX_JSON", 10)
    with pytest.raises(ConfigError, match="19 bytes, more than 0 MB"):
        create("file", file=str(write(tmp_path / "a.json", {"a": [1, 2, 3, 4]})))
    monkeypatch.setattr(bounded, "MAX_ARRAYS", 1)
    with pytest.raises(ConfigError, match="2 arrays, more than 1"):
        read_partition(honest)


def test_arrays_are_those_of_numpy(tmp_path: Path) -> None:
    arrays = {
        "f": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "text": np.array("a recipe"),
        "big": np.arange(3, dtype=">i4"),
        "none": np.zeros(0, np.int64),
    }
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save(stream, **arrays)  # type: ignore[operator]
        (tmp_path / "a.npz").write_bytes(stream.getvalue())
        found = read_arrays(tmp_path / "a.npz")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)


# A whole run


def test_a_run_on_a_foreign_partition_and_on_its_own_copy(
    tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    path = write(tmp_path / "p.json", {"a": list(range(600)), "b": list(range(600, 1797))})
    seen: list[Any] = []
    clients = (
        "clients.count=2",
        "clients.per_round=2",
        "rounds=1",
        "method=head_only",
        "prompts.count=0",
    )
    overrides = tiny(*clients, "data={name: digits, train: 0.12, validation: 0.05, test: 0.05}")
    first = fedprompt.run(
        "digits", [*overrides, f"partition={{name: file, file: {path}}}"], on_event=seen.append
    )
    assert any(
        "images that the file lists are held out" in e.text for e in seen if isinstance(e, Note)
    )
    # The run's own copy holds rows of the training split: the same ones.
    copied = compose("digits", [*overrides, f"partition={{name: file, file: {first.run_dir}}}"])
    given = compose("digits", [*overrides, f"partition={{name: file, file: {path}}}"])
    for one, other in zip(prepare(copied).data.parts, prepare(given).data.parts, strict=True):
        np.testing.assert_array_equal(one, other)
