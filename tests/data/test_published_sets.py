"""Every published data set, from small files in its true format: pixels, labels, bad input."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import (
    CINIC,
    EMOTIONS,
    Written,
    cifar10_binary,
    cifar10_python,
    cifar100_binary,
    cifar100_python,
    class_folders,
    fashion_mnist,
    four,
    idx,
    imagenet_lt,
    labels_of,
    mnist_m,
    noise,
    png,
    python2_pickle,
    saved_to_disk,
    tinyimagenet,
)
from PIL import Image

import package_trees
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.reading import files
from fedprompt.data.reading.archives import unpack
from fedprompt.data.reading.published import limited
from fedprompt.data.sets.cifar100_lt import long_tail_sizes
from fedprompt.data.task import Split, Task, datasets, fingerprint

FILE_SETS = sorted(set(datasets.names()) - {"digits", "domains"})


def create(name: str, root: Path, **options: Any) -> Task:
    """With a validation share that a class of four images can give, if the set has one."""
    if "validation" in vars(datasets.entry(name).options()):
        options = {"validation": 0.25, **options}
    return datasets.create(name, root=str(root), **options)


def rows(*splits: Split) -> list[tuple[bytes, int]]:
    """Pixels and label of every image, in an order that does not depend on the split."""
    return sorted(
        (image.tobytes(), int(label))
        for split in splits
        for image, label in zip(split.images[:], split.labels, strict=True)
    )


def expected(*written: Written) -> list[tuple[bytes, int]]:
    return sorted(
        (image.tobytes(), int(label))
        for images, labels in written
        for image, label in zip(images, labels, strict=True)
    )


def check(task: Task, train: Written, test: Written, validation: Written | None = None) -> None:
    """The task holds exactly what was written; the test split in the order of the files."""
    if validation is None:
        assert rows(task.train, task.validation) == expected(train)
    else:
        assert rows(task.train) == expected(train)
        assert rows(task.validation) == expected(validation)
    np.testing.assert_array_equal(task.test.images[:], test[0])
    np.testing.assert_array_equal(task.test.labels, test[1])
    prints = {fingerprint(split.images) for split in (task.train, task.validation, task.test)}
    assert len(prints) == 3


def refused(name: str, root: Path, message: str, **options: Any) -> str:
    """The one line with which a data set is refused."""
    with pytest.raises((ConfigError, InputError), match=rf"^[^\n]*{message}[^\n]*\Z") as error:
        task = create(name, root, **options)
        for split in (task.train, task.validation, task.test):
            split.images[:]
    return str(error.value)


# What holds for all


@pytest.mark.parametrize("name", FILE_SETS)
def test_a_missing_data_set_gives_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPROMPT_DATA", str(tmp_path))
    other = {"fourdataset": "mnist_m", "cifar100_lt": "cifar100", "mixed": "emoji"}
    first = other.get(name, name)
    with pytest.raises(ConfigError, match=r"^[^\n]+no data in [^\n]+: expected [^\n]+\Z") as error:
        datasets.create(name)
    assert str(tmp_path / first) in str(error.value)
    assert "data.root=FOLDER" in str(error.value)
    monkeypatch.delenv("FEDPROMPT_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no data in") as error:
        datasets.create(name)
    assert str(tmp_path / "data" / first) in str(error.value)


SAMPLES: dict[str, Callable[[Path], Any]] = {
    "cifar10": cifar10_binary,
    "cifar100": lambda root: cifar100_binary(root, per_class=4),
    "cifar100_lt": lambda root: cifar100_binary(root, per_class=8),
    "cinic10": lambda root: class_folders(root, ("train", "valid", "test"), CINIC, 4, 32),
    "emoji": package_trees.emoji,
    "fashion_mnist": fashion_mnist,
    "fourdataset": four,
    "huggingface": lambda root: saved_to_disk(root, 40, 32),
    "imagefolder": lambda root: class_folders(root, ["."], CINIC, 8, 40),
    "imagenet_lt": lambda root: imagenet_lt(root, root),
    "mixed": package_trees.mixed,
    "mmafedb": lambda root: class_folders(root, ("train", "valid", "test"), EMOTIONS, 4, -48),
    "mnist_m": mnist_m,
    "pacs": lambda root: pacs(root),
    "tinyimagenet": lambda root: tinyimagenet(root, IDS),
}
"""How to write a small one of each; a new data set joins the tests below with a line here."""


@pytest.mark.parametrize("name", FILE_SETS)
def test_every_data_set_keeps_the_contract(name: str, tmp_path: Path) -> None:
    SAMPLES[name](tmp_path)
    options = {"test": 0.25} if "test" in vars(datasets.entry(name).options()) else {}
    if "size" in vars(datasets.entry(name).options()):
        options["size"] = 32
    task, again, other = (create(name, tmp_path, **options, seed=seed) for seed in (3, 3, 4))
    pictures: list[bytes] = []
    prints: set[str] = set()
    for split in ("train", "validation", "test"):
        own: Split = getattr(task, split)
        images = own.images[:]
        assert images.shape == own.images.shape == (len(own), *own.images.shape[1:])
        assert images.dtype == np.uint8 and images.flags.c_contiguous and images.flags.writeable
        assert own.labels.dtype == own.groups.dtype == np.int64
        order = np.random.default_rng(0).permutation(len(own))
        np.testing.assert_array_equal(own.images[order], images[order])
        np.testing.assert_array_equal(own.images[1:3], images[1:3])
        np.testing.assert_array_equal(getattr(again, split).images[:], images)
        np.testing.assert_array_equal(getattr(again, split).labels, own.labels)
        assert fingerprint(getattr(again, split).images) == fingerprint(own.images)
        prints.add(fingerprint(own.images))
        pictures += [image.tobytes() for image in images]
    assert len(prints) == 3 and len(set(pictures)) == len(pictures), "the splits are disjoint"
    if "validation" in options or "validation" in vars(datasets.entry(name).options()):
        assert rows(other.validation) != rows(task.validation), "the seed draws"


WRONG: dict[str, tuple[Any, str]] = {
    "seed": (-1, "expected an integer >= 0, got -1"),
    "max_train": (0, "expected an integer >= 1 or null, got 0"),
    "max_test": (-2, "expected an integer >= 1 or null, got -2"),
    "validation": (1.0, r"expected a share between 0 and 1, got 1\.0"),
    "test": (0, "expected a share between 0 and 1, got 0"),
    "size": (4, "expected 8 to 2048 pixels, got 4"),
    "on_bad_image": ("skipp", "expected one of refuse, skip, got 'skipp'; did you mean 'skip'"),
}


@pytest.mark.parametrize(
    ("name", "option"),
    [(n, o) for n in FILE_SETS for o in WRONG if o in vars(datasets.entry(n).options())],
)
def test_wrong_options_are_named(name: str, option: str) -> None:
    value, message = WRONG[option]
    with pytest.raises(ConfigError, match=rf"^data\.{option}: {message}[^\n]*\Z"):
        datasets.create(name, **{option: value})


def test_a_relative_root_is_settled_when_the_options_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert datasets.entry("cifar10").options(root="here").root == str(tmp_path / "here")


# CIFAR


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar10_binary(tmp_path: Path, inner: str) -> None:
    train, test = cifar10_binary(tmp_path / inner)
    task = create("cifar10", tmp_path, validation=0.2)
    check(task, train, test)
    assert task.class_names == tuple(f"class{n}" for n in range(10))
    assert task.group_names == ("cifar10",) and len(task.validation) == 20
    assert np.bincount(task.validation.labels).tolist() == [2] * 10
    again = create("cifar10", tmp_path, validation=0.2)
    assert rows(again.validation) == rows(task.validation)
    assert fingerprint(again.train.images) == fingerprint(task.train.images)
    other = create("cifar10", tmp_path, validation=0.2, seed=1)
    assert rows(other.validation) != rows(task.validation)
    assert fingerprint(other.train.images) != fingerprint(task.train.images)


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar10_python(tmp_path: Path, inner: str) -> None:
    train, test = cifar10_python(tmp_path / inner)
    task = create("cifar10", tmp_path)
    check(task, train, test)
    assert task.class_names[9] == "class9"


@pytest.mark.parametrize(
    ("folder", "archive", "write"),
    [
        ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", cifar10_binary),
        ("cifar-10-batches-py", "cifar-10-python.tar.gz", cifar10_python),
    ],
)
def test_an_archive_is_unpacked_once(
    tmp_path: Path, folder: str, archive: str, write: Callable[[Path], tuple[Written, Written]]
) -> None:
    train, test = write(tmp_path / "made" / folder)
    (tmp_path / "root").mkdir()
    with tarfile.open(tmp_path / "root" / archive, "w:gz") as file:
        file.add(tmp_path / "made" / folder, folder)
    check(create("cifar10", tmp_path / "root"), train, test)
    assert {path.name for path in (tmp_path / "root").iterdir()} == {archive, folder}
    (tmp_path / "root" / archive).write_bytes(b"no longer needed")
    check(create("cifar10", tmp_path / "root"), train, test)


@pytest.mark.parametrize("inner", ["cifar-10-batches-bin", "another-folder"])
def test_an_archive_of_something_else_is_unpacked_once_at_most(
    tmp_path: Path, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / ".DS_Store").write_bytes(b"nothing")
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as file:
        file.add(tmp_path / "made", inner)
    calls = []

    def counted(archive: Path, folder: str) -> Path:
        calls.append(archive)
        return unpack(archive, folder)

    monkeypatch.setattr(files, "unpack", counted)
    for _ in range(2):
        refused("cifar10", tmp_path, "expected .*batches-bin.*; (remove that folder|get it again)")
    assert len(calls) == (1 if inner == "cifar-10-batches-bin" else 2)


def test_a_packed_batch_is_not_taken_for_a_batch(tmp_path: Path) -> None:
    cifar10_binary(tmp_path)
    batch = tmp_path / "data_batch_1.bin"
    batch.rename(tmp_path / "data_batch_1.bin.gz")
    refused("cifar10", tmp_path, "data_batch_1.bin missing in")


@pytest.mark.parametrize("write", [cifar100_binary, cifar100_python])
@pytest.mark.parametrize("coarse", [False, True])
def test_cifar100(tmp_path: Path, write: Callable[[Path], dict[str, Any]], coarse: bool) -> None:
    written = write(tmp_path)
    task = create("cifar100", tmp_path, coarse=coarse, validation=0.34)
    which = 2 if coarse else 1
    check(task, *((written[split][0], written[split][which]) for split in ("train", "test")))
    assert task.num_classes == (20 if coarse else 100)
    assert task.class_names[3] == ("coarse3" if coarse else "fine3")


def test_cifar_bad_input(tmp_path: Path) -> None:
    cifar10_binary(tmp_path)
    batch = tmp_path / "data_batch_3.bin"
    good = batch.read_bytes()
    for content, message in (
        (good[:-1], "data_batch_3.bin: expected records of 3073 bytes, got 61459 bytes"),
        (b"", "data_batch_3.bin: expected records of 3073 bytes, got 0 bytes"),
        (good[:-3073], "expected equally many images .* got 20, 20, 19, 20, 20"),
        (b"\x0a" + good[1:], r"data_batch_3.bin: labels must lie in 0\.\.9, got 10 for image 0"),
    ):
        batch.write_bytes(content)
        refused("cifar10", tmp_path, message)
    batch.unlink()
    refused("cifar10", tmp_path, "cifar10: data_batch_3.bin missing in")
    batch.write_bytes(good)
    (tmp_path / "batches.meta.txt").write_text("cat\n")
    refused("cifar10", tmp_path, "expected 10 class names in .*, got 1")


def test_cifar_python_bad_input(tmp_path: Path) -> None:
    cifar10_python(tmp_path)
    data = noise(20, 32, 32, 0).reshape(20, -1)
    labels = labels_of(20, 10).tolist()
    for content, message in (
        ({b"labels": labels}, r"expected 'data' of shape \(N, 3072\), got NoneType"),
        ({b"data": data[:, :9], b"labels": labels}, r"got \(20, 9\)"),
        ({b"data": data, b"labels": labels[:-1]}, "got 19 labels and 20 images"),
        ({b"data": data, b"labels": b"text"}, "expected a list of integers in 'labels'"),
        ({b"data": data, b"labels": [*labels[:-1], -1]}, r"0\.\.9, got -1 for image 19"),
    ):
        (tmp_path / "data_batch_2").write_bytes(python2_pickle(content))
        refused("cifar10", tmp_path, f"data_batch_2: .*{message}")
    (tmp_path / "data_batch_2").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused("cifar10", tmp_path, r"it asks for .*system, which no data set needs")


def test_a_class_without_images_and_a_class_that_is_only_tested(tmp_path: Path) -> None:
    cifar10_binary(tmp_path)
    for path in tmp_path.glob("data_batch_*.bin"):
        records = np.fromfile(path, np.uint8).reshape(-1, 3073)
        records[records[:, 0] == 7, 0] = 6
        path.write_bytes(records.tobytes())
    refused("cifar10", tmp_path, "expected training images of every class, got none of 'class7'")


def test_limits_keep_every_class(tmp_path: Path) -> None:
    train, test = cifar10_binary(tmp_path, per_batch=40)
    task = create("cifar10", tmp_path, max_train=30, max_validation=10, max_test=20)
    for split, count in ((task.train, 30), (task.validation, 10), (task.test, 20)):
        assert np.bincount(split.labels).tolist() == [count // 10] * 10
    known = set(expected(train))
    assert set(rows(task.train, task.validation)) < known
    assert not set(rows(task.train)) & set(rows(task.validation))
    assert set(rows(task.test)) < set(expected(test))
    refused("cifar10", tmp_path, "data.max_train: expected at least 10 images", max_train=9)
    refused("cifar10", tmp_path, "expected a share that leaves both", validation=0.001)


def test_limited_draws_shares_or_equal_counts() -> None:
    labels = np.repeat([0, 1, 2], [1000, 100, 1])
    for seed in range(5):
        drawn = limited(labels, 110, np.random.default_rng(seed))
        assert len(np.unique(drawn)) == 110 and (np.diff(drawn) > 0).all()
        counts = np.bincount(labels[drawn])
        assert counts[2] == 1 and abs(counts[1] - 10) <= 1
        even = limited(labels, 151, np.random.default_rng(seed), balanced=True)
        assert np.bincount(labels[even]).tolist() == [75, 75, 1]
    assert limited(labels, 9999, np.random.default_rng(0)).tolist() == list(range(1101))


# CIFAR-100-LT


@pytest.mark.parametrize(("factor", "total"), [(10, 19573), (50, 12608), (100, 10847)])
def test_the_published_sizes_of_the_long_tail(factor: float, total: int) -> None:
    sizes = long_tail_sizes(500, 100, factor)
    assert sizes.sum() == total and sizes[0] == 500 and sizes[-1] == 500 // factor
    assert (np.diff(sizes) <= 0).all()


def test_cifar100_lt(tmp_path: Path) -> None:
    written = cifar100_binary(tmp_path, per_class=20)
    task = create("cifar100_lt", tmp_path, imbalance_factor=10, validation=0.2)
    labels = np.concatenate([task.train.labels, task.validation.labels])
    assert np.bincount(labels).tolist() == long_tail_sizes(20, 100, 10).tolist()
    assert np.bincount(labels)[[0, 99]].tolist() == [20, 2]
    assert set(rows(task.train, task.validation)) < set(expected(written["train"][:2]))
    assert np.bincount(task.test.labels).tolist() == [1] * 100
    other = create("cifar100_lt", tmp_path, imbalance_factor=10, validation=0.2, seed=3)
    assert rows(other.train, other.validation) != rows(task.train, task.validation)
    refused("cifar100_lt", tmp_path, "data.imbalance_factor: expected", imbalance_factor=0.5)


# Fashion-MNIST


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw"])
def test_fashion_mnist(tmp_path: Path, suffix: str, inner: str) -> None:
    splits = fashion_mnist(tmp_path / inner, suffix=suffix)
    task = create("fashion_mnist", tmp_path)
    check(task, *((np.repeat(images[..., None], 3, 3), labels) for images, labels in splits))
    assert task.test.images.shape == (40, 28, 28, 3) and task.class_names[8] == "Bag"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_bad_input(tmp_path: Path, suffix: str) -> None:
    fashion_mnist(tmp_path, suffix=suffix)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    pack = gzip.compress if suffix else bytes
    good = gzip.decompress(path.read_bytes()) if suffix else path.read_bytes()
    huge = good[:4] + b"\xff" * 12
    for content, message in (
        (good[:-1], "promises 40 x 28 x 28 = 31360 bytes of values, got 31359"),
        (good + b"x", "promises 40 x 28 x 28 = 31360 bytes of values, got .*31361"),
        (huge, "promises 4294967295 x 4294967295 x 4294967295 = .* got 0"),
        (b"\0\0\x0d\x03" + good[4:], "got the header 00000d03"),
        (b"\0\0\x08\x01" + good[4:], "expected an idx file .* with 3 dimension"),
        (b"", r"got the header \(empty\)"),
    ):
        path.write_bytes(pack(content))
        refused("fashion_mnist", tmp_path, f"train-images-idx3-ubyte.*{message}")
    if suffix:
        for content in (pack(good)[:-9], b"no gzip file"):
            path.write_bytes(content)
            refused("fashion_mnist", tmp_path, "train-images-idx3-ubyte.gz cannot be read")
    path.write_bytes(pack(good))
    idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", np.zeros(39, np.uint8))
    refused("fashion_mnist", tmp_path, "t10k-labels.*equally many images and labels, got 40 and 39")
    idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", np.full(40, 10, np.uint8))
    refused("fashion_mnist", tmp_path, r"labels must lie in 0\.\.9, got 10 for image 0")
    idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", np.zeros(0, np.uint8))
    idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", np.zeros((0, 28, 28), np.uint8))
    refused("fashion_mnist", tmp_path, "got 0 and 0")


# MNIST-M


@pytest.mark.parametrize("inner", ["", "mnist_m"])
def test_mnist_m_files(tmp_path: Path, inner: str) -> None:
    train, test = mnist_m(tmp_path / inner)
    check(create("mnist_m", tmp_path), train, test)


def test_mnist_m_tensors(tmp_path: Path) -> None:
    written = []
    (tmp_path / "processed").mkdir()
    for seed, name in enumerate(("train", "test")):
        images, labels = noise(40, 28, 28, seed), labels_of(40, 10)
        pair = torch.from_numpy(images), torch.from_numpy(labels)
        torch.save(pair, tmp_path / "processed" / f"mnist_m_{name}.pt")
        written.append((images, labels))
    check(create("mnist_m", tmp_path, size=28), *written)
    assert create("mnist_m", tmp_path).train.images.shape[1:] == (32, 32, 3)
    path = tmp_path / "processed" / "mnist_m_test.pt"
    for content, message in (
        ((pair[0], pair[1][:-1]), r"labels of shape \(39,\) for 40 images"),
        ((pair[0].float(), pair[1]), "float32"),
        ((pair[0], pair[1] + 5), r"labels must lie in 0\.\.9, got 10 for image 5"),
        (Path("a class that is not allowed"), "mnist_m_test.pt: expected a pair of tensors"),
    ):
        torch.save(content, path)
        refused("mnist_m", tmp_path, message)
    path.write_bytes(b"hello")
    refused("mnist_m", tmp_path, "mnist_m_test.pt: expected a pair of tensors")


def test_mnist_m_bad_input(tmp_path: Path) -> None:
    mnist_m(tmp_path)
    path = tmp_path / "mnist_m_train_labels.txt"
    good = path.read_text()
    for content, message in (
        (good.replace("00000003.png 3", "00000003.png"), "line 4: expected a path and a label"),
        (good.replace(".png 3", ".png 11"), r"labels must lie in 0\.\.9, got 11 for image 3"),
        (
            good.replace("00000003.png 3\n", ""),
            r"got 39 lines and 40 images that differ in 00000003\.png",
        ),
        (
            good.replace("00000003", "00000004"),
            r"got 40 lines and 40 images that differ in 00000003\.png",
        ),
        (good.replace("00000003", "99999999"), r"that differ in 00000003\.png"),
        ("", "mnist_m_train_labels.txt: .*empty file"),
    ):
        path.write_text(content)
        refused("mnist_m", tmp_path, message)
    path.write_bytes(b"\xff\xfe")
    refused("mnist_m", tmp_path, "cannot be read as text")


# Images that do not decode


def test_bad_images_are_refused_by_name_or_skipped_and_counted(tmp_path: Path) -> None:
    train, test = mnist_m(tmp_path)
    for name in ("mnist_m_train/00000003.png", "mnist_m_train/00000014.png"):
        (tmp_path / name).write_bytes(b"hello")
    line = refused("mnist_m", tmp_path, r"0000000?[0-9]+\.png: the image does not decode")
    assert str(tmp_path / "mnist_m_train") in line and "data.on_bad_image=skip" in line
    task = create("mnist_m", tmp_path, on_bad_image="skip")
    kept = np.setdiff1d(np.arange(40), [3, 14])
    check(task, (train[0][kept], train[1][kept]), test)
    (note,) = task.notes
    assert note == (
        "mnist_m: 2 of 40 train images do not decode and are left out, the first is "
        f"{tmp_path / 'mnist_m_train' / '00000003.png'}"
    )
    for path in (tmp_path / "mnist_m_test").iterdir():
        path.write_bytes(b"")
    refused("mnist_m", tmp_path, "expected images in the test split, got none", on_bad_image="skip")
    for number in (3, 13, 23, 33):
        (tmp_path / "mnist_m_train" / f"{number:08d}.png").write_bytes(b"")
    refused("mnist_m", tmp_path, "got none of '3'", on_bad_image="skip")


# TinyImageNet

IDS = ["n02124075", "n04067472", "n04540053"]


def test_tinyimagenet(tmp_path: Path) -> None:
    written = tinyimagenet(tmp_path, IDS)
    task = create("tinyimagenet", tmp_path)
    check(task, written["train"], written["test"])
    assert task.class_names[0] == "n02124075 word0"
    assert task.test.images.shape == (3, 64, 64, 3)


def test_tinyimagenet_from_its_archive(tmp_path: Path) -> None:
    written = tinyimagenet(tmp_path / "made" / "tiny-imagenet-200", IDS)
    (tmp_path / "root").mkdir()
    with zipfile.ZipFile(tmp_path / "root" / "tiny-imagenet-200.zip", "w") as archive:
        for path in sorted((tmp_path / "made").rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "made"))
    task = create("tinyimagenet", tmp_path / "root")
    check(task, written["train"], written["test"])


def test_tinyimagenet_bad_input(tmp_path: Path) -> None:
    tinyimagenet(tmp_path, IDS)
    path = tmp_path / "val" / "val_annotations.txt"
    good = path.read_text()
    for content, message in (
        (good.replace(IDS[1], "n99999999"), "line 2: expected a file name, a tab and an id"),
        (good.splitlines()[0], "got 1 lines and 3 images"),
        ("", "got 0 lines"),
        (good.replace("val_2", "val_9"), "that differ in val_2.JPEG"),
    ):
        path.write_text(content)
        refused("tinyimagenet", tmp_path, message)
    path.write_text(good)
    shutil.rmtree(tmp_path / "train" / IDS[2] / "images")
    refused("tinyimagenet", tmp_path, f"expected images of class {IDS[2]}, got none")
    path.unlink()
    refused("tinyimagenet", tmp_path, "tinyimagenet: val/val_annotations.txt missing in")


# Folders of classes


@pytest.mark.parametrize(
    ("name", "classes", "inner", "side"),
    [
        ("cinic10", CINIC, "", 32),
        ("cinic10", CINIC, "CINIC-10", 32),
        ("mmafedb", EMOTIONS, "", -48),
    ],
)
def test_three_splits_of_class_folders(
    tmp_path: Path, name: str, classes: list[str], inner: str, side: int
) -> None:
    written = class_folders(tmp_path / inner, ("train", "valid", "test"), classes, 2, side)
    if side < 0:
        written = {
            split: (np.repeat(images[..., None], 3, axis=3), labels)
            for split, (images, labels) in written.items()
        }
    (tmp_path / inner / "train" / classes[0] / "Thumbs.db").write_bytes(b"no image")
    (tmp_path / inner / "train" / classes[0] / "._0.png").write_bytes(b"no image")
    task = create(name, tmp_path)
    check(task, written["train"], written["test"], written["valid"])
    assert task.class_names == tuple(classes)
    shutil.rmtree(tmp_path / inner / "valid" / classes[3])
    refused(name, tmp_path, f"expected images of class '{classes[3]}', got no such folder")
    (tmp_path / inner / "valid" / classes[3]).mkdir()
    refused(name, tmp_path, f"expected images of class '{classes[3]}', got no image")
    shutil.rmtree(tmp_path / inner / "valid")
    refused(name, tmp_path, f"{name}: valid/ missing in")


# The 4-dataset


def test_fourdataset(tmp_path: Path) -> None:
    four(tmp_path)
    options = {"size": 32}
    task = create("fourdataset", tmp_path, **options)
    assert task.group_names == ("mnist_m", "fashion_mnist", "cinic10", "mmafedb")
    assert task.num_classes == 37
    assert task.class_names[:11] == (
        *(f"mnist_m/{n}" for n in range(10)),
        "fashion_mnist/T-shirt/top",
    )
    assert task.class_names[-1] == "mmafedb/surprise"
    mask = np.zeros((4, 37), bool)
    for group, (start, stop) in enumerate(((0, 10), (10, 20), (20, 30), (30, 37))):
        mask[group, start:stop] = True
    np.testing.assert_array_equal(task.class_mask, mask)
    assert np.bincount(task.train.groups).tolist() == [30, 30, 40, 28]
    assert np.bincount(task.validation.groups).tolist() == [10, 10, 40, 28]
    # Each domain holds what its own loader reads.
    for group, name in enumerate(task.group_names):
        alone = create(name, tmp_path / name, **({"size": 32} if name != "fashion_mnist" else {}))
        mine = np.flatnonzero(task.test.groups == group)
        labels = task.test.labels[mine] - [0, 10, 20, 30][group]
        np.testing.assert_array_equal(labels, alone.test.labels)
        images = alone.test.images[:]
        if name == "fashion_mnist":
            images = np.stack(
                [
                    np.asarray(Image.fromarray(each).resize((32, 32), Image.Resampling.BILINEAR))
                    for each in images
                ]
            )
        np.testing.assert_array_equal(task.test.images[mine], images)


def test_fourdataset_limits_hold_for_each_domain(tmp_path: Path) -> None:
    four(tmp_path, per_class=6)
    sad = sorted((tmp_path / "mmafedb" / "MMAFEDB" / "train" / "sad").iterdir())
    for path in sad[2:]:
        path.unlink()
    limits = {"max_train": 28, "max_validation": 10, "max_test": 14, "size": 32}
    task = create("fourdataset", tmp_path, validation=0.34, **limits)
    for split, count in ((task.train, 28), (task.validation, 10), (task.test, 14)):
        assert np.bincount(split.groups).tolist() == [count] * 4
    counts = np.bincount(task.train.labels, minlength=37)
    assert sorted(counts[:10].tolist()) == [2] * 2 + [3] * 8
    # Two sad images are all there are; the other six expressions share the remaining 26.
    assert counts[30 + EMOTIONS.index("sad")] == 2
    assert sorted(np.delete(counts[30:], EMOTIONS.index("sad")).tolist()) == [4, 4, 4, 4, 5, 5]
    defaults = datasets.entry("fourdataset").options()
    assert (defaults.max_train, defaults.max_test, defaults.size) == (30_000, 2_500, 256)


def test_fourdataset_skips_bad_images_of_any_domain(tmp_path: Path) -> None:
    four(tmp_path)
    (tmp_path / "cinic10" / "test" / "cat" / "0013.png").write_bytes(b"")
    (tmp_path / "mmafedb" / "MMAFEDB" / "train" / "sad" / "0020.png").write_bytes(b"")
    options = {"size": 32}
    refused("fourdataset", tmp_path, "(0013|0020).png: the image", **options)
    task = create("fourdataset", tmp_path, on_bad_image="skip", **options)
    assert [note.split(" do not")[0] for note in task.notes] == [
        "cinic10: 1 of 40 test images",
        "mmafedb: 1 of 28 train images",
    ]
    assert np.bincount(task.test.groups).tolist() == [40, 40, 39, 28]


def test_fourdataset_says_which_part_is_missing(tmp_path: Path) -> None:
    four(tmp_path)
    shutil.rmtree(tmp_path / "cinic10")
    refused("fourdataset", tmp_path, f"cinic10: no data in {tmp_path / 'cinic10'}: expected train/")


# PACS

PACS_DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


def pacs(root: Path, per_class: int = 4, lists: Path | None = None) -> dict[str, Any]:
    """Images by their path; with lists, the last of each class is for cross-validation."""
    images = {}
    for number, domain in enumerate(PACS_DOMAINS):
        listed: dict[str, list[str]] = {"train": [], "crossval": []}
        for label, name in enumerate(PACS_CLASSES):
            for each, pixels in enumerate(noise(per_class, 227, 227, 10 * number + label)):
                path = f"{domain}/{name}/pic_{each:03d}.png"
                png(root / path, pixels)
                images[path] = pixels
                listed["crossval" if each == per_class - 1 else "train"].append(
                    f"{path} {label + 1}\n"
                )
        if lists is not None:
            lists.mkdir(exist_ok=True)
            listed["test"] = listed["train"] + listed["crossval"]
            for split, lines in listed.items():
                (lists / f"{domain}_{split}_kfold.txt").write_text("".join(lines))
    return images


def found(task: Task, split: Split, images: dict[str, Any]) -> set[str]:
    """The written paths of a split, after a check of labels and domains."""
    path_of = {pixels.tobytes(): path for path, pixels in images.items()}
    paths = [path_of[image.tobytes()] for image in split.images[:]]
    for path, label, group in zip(paths, split.labels, split.groups, strict=True):
        assert path.split("/")[:2] == [task.group_names[group], task.class_names[label]]
    assert len(set(paths)) == len(paths)
    return set(paths)


@pytest.mark.parametrize("where", [".", "..", "../pacs_label"])
def test_pacs_with_the_publishers_lists(tmp_path: Path, where: str) -> None:
    root = tmp_path / "PACS" / "kfold"
    root.mkdir(parents=True)
    images = pacs(root, lists=root / where)
    path = root / where / "sketch_train_kfold.txt"
    path.write_text(path.read_text() + "sketch/dog/n02103406_4068-1.png 1\n")  # as published
    task = create("pacs", tmp_path, validation=0.34)
    last = {path for path in images if path.endswith("003.png")}
    assert found(task, task.test, images) == last
    train, held = (found(task, split, images) for split in (task.train, task.validation))
    assert train | held == set(images) - last and not train & held
    assert len(held) == 28 and task.class_mask.all()


def test_pacs_without_lists_is_divided_by_the_seed(tmp_path: Path) -> None:
    images = pacs(tmp_path)
    task = create("pacs", tmp_path, validation=0.34, test=0.25)
    parts = [found(task, split, images) for split in (task.train, task.validation, task.test)]
    assert [len(part) for part in parts] == [56, 28, 28]
    assert set.union(*parts) == set(images)
    pairs = set(zip(task.test.groups.tolist(), task.test.labels.tolist(), strict=True))
    assert len(pairs) == 28, "one test image of each class of each domain"


def test_pacs_bad_input(tmp_path: Path) -> None:
    pacs(tmp_path, lists=tmp_path)
    path = tmp_path / "photo_train_kfold.txt"
    good = path.read_text()
    for content, message in (
        (good.replace(".png 1", ".png 8"), r"labels must lie in 1\.\.7, got 8 for image 0"),
        (good.replace(".png 1", ".png 2"), "expected paths of photo/elephant/ with label 2"),
        (good.replace(".png 1", ".png 0"), "line 1: expected a path and a label >= 1"),
        (
            good.replace("photo/dog/pic_000", "photo/dog/pic_999"),
            "1 of 84 listed images do not exist",
        ),
        (good + good.splitlines()[0] + "\n", "expected each image once, got .* twice in train"),
    ):
        path.write_text(content)
        refused("pacs", tmp_path, message, validation=0.34)
    path.unlink()
    refused("pacs", tmp_path, "pacs: photo_train_kfold.txt missing in")
    for each in tmp_path.glob("*.txt"):
        each.unlink()
    shutil.rmtree(tmp_path / "sketch" / "horse")
    refused("pacs", tmp_path, "sketch/horse: expected images, got none")


# ImageNet-LT


@pytest.mark.parametrize("elsewhere", [False, True])
def test_imagenet_lt(tmp_path: Path, elsewhere: bool) -> None:
    images = tmp_path / ("imagenet" if elsewhere else "ImageNet_LT")
    written = imagenet_lt(tmp_path / "ImageNet_LT", images)
    more = {"images": str(images)} if elsewhere else {}
    task = create("imagenet_lt", tmp_path, size=24, **more)
    check(task, written["train"], written["test"], written["val"])
    assert task.class_names == ("n00", "n01", "n02")
    assert np.bincount(task.train.labels).tolist() == [5, 3, 2]


def test_imagenet_lt_bad_input(tmp_path: Path) -> None:
    imagenet_lt(tmp_path, tmp_path)
    train, test = tmp_path / "ImageNet_LT_train.txt", tmp_path / "ImageNet_LT_test.txt"
    good, good_test = train.read_text(), test.read_text()
    for path, content, message in (
        (train, good.replace("EG 1", "EG 7"), "expected images of every class from 0 to 7"),
        (train, good.replace("EG 1", "EG 2"), "images of class 2 in one folder, got n01 and n02"),
        (train, good.replace("train_0", "gone"), "1 of 10 listed images do not exist"),
        (train, good.replace("EG 0", "EG x"), "line 1: expected a path and a label"),
        (
            test,
            good_test + good.splitlines()[0] + "\n",
            "each image once, got .* in train and test",
        ),
        (test, good_test.replace("EG 2", "EG 3"), r"labels must lie in 0\.\.2, got 3 for image 4"),
    ):
        path.write_text(content)
        refused("imagenet_lt", tmp_path, message)
        train.write_text(good)
        test.write_text(good_test)
    test.unlink()
    refused("imagenet_lt", tmp_path, "imagenet_lt: ImageNet_LT_test.txt missing in")
