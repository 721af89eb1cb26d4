"""Write small data sets laid out as their publishers do; each returns what was written."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Written = tuple[Pixels, NDArray[np.int64]]


def noise(count: int, height: int, width: int, seed: int, channels: int = 3) -> Pixels:
    """(count, height, width[, 3]) uint8."""
    shape = (count, height, width, channels)[: 4 if channels > 1 else 3]
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def labels_of(count: int, classes: int) -> NDArray[np.int64]:
    """Every class as often as any other, in turn."""
    return np.arange(count) % classes


# CIFAR


def cifar10_binary(folder: Path, per_batch: int = 20) -> tuple[Written, Written]:
    folder.mkdir(parents=True, exist_ok=True)
    train = []
    for number in (1, 2, 3, 4, 5, 0):
        images, labels = noise(per_batch, 32, 32, number), labels_of(per_batch, 10)
        rows = images.transpose(0, 3, 1, 2).reshape(per_batch, -1)
        records = np.hstack([labels[:, None].astype(np.uint8), rows])
        name = f"data_batch_{number}.bin" if number else "test_batch.bin"
        (folder / name).write_bytes(records.tobytes())
        train.append((images, labels))
    (folder / "batches.meta.txt").write_text("".join(f"class{n}\n" for n in range(10)) + "\n")
    test = train.pop()
    return (np.concatenate([i for i, _ in train]), np.concatenate([n for _, n in train])), test


def cifar10_python(folder: Path, per_batch: int = 20) -> tuple[Written, Written]:
    folder.mkdir(parents=True, exist_ok=True)
    train = []
    for number in (1, 2, 3, 4, 5, 0):
        images, labels = noise(per_batch, 32, 32, 50 + number), labels_of(per_batch, 10)
        content = {
            b"batch_label": b"a batch",
            b"labels": labels.tolist(),
            b"data": images.transpose(0, 3, 1, 2).reshape(per_batch, -1),
            b"filenames": [b"a.png"] * per_batch,
        }
        name = f"data_batch_{number}" if number else "test_batch"
        (folder / name).write_bytes(python2_pickle(content))
        train.append((images, labels))
    meta = {b"num_cases_per_batch": per_batch, b"num_vis": 3072}
    names = [f"class{n}".encode() for n in range(10)]
    (folder / "batches.meta").write_bytes(python2_pickle({**meta, b"label_names": names}))
    test = train.pop()
    return (np.concatenate([i for i, _ in train]), np.concatenate([n for _, n in train])), test


def cifar100_binary(folder: Path, per_class: int = 3, test_per_class: int = 1) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, Any] = {}
    for name, count in (("train", per_class * 100), ("test", test_per_class * 100)):
        images, fine = noise(count, 32, 32, count), labels_of(count, 100)
        coarse = fine // 5
        rows = images.transpose(0, 3, 1, 2).reshape(count, -1)
        records = np.hstack([np.stack([coarse, fine], 1).astype(np.uint8), rows])
        (folder / f"{name}.bin").write_bytes(records.tobytes())
        written[name] = (images, fine, coarse)
    (folder / "fine_label_names.txt").write_text("".join(f"fine{n}\n" for n in range(100)))
    (folder / "coarse_label_names.txt").write_text("".join(f"coarse{n}\n" for n in range(20)))
    return written


def cifar100_python(folder: Path, per_class: int = 3) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, Any] = {}
    for name, count in (("train", per_class * 100), ("test", 100)):
        images, fine = noise(count, 32, 32, count + 1), labels_of(count, 100)
        content = {
            b"filenames": [b"a.png"] * count,
            b"batch_label": b"a batch",
            b"fine_labels": fine.tolist(),
            b"coarse_labels": (fine // 5).tolist(),
            b"data": images.transpose(0, 3, 1, 2).reshape(count, -1),
        }
        (folder / name).write_bytes(python2_pickle(content))
        written[name] = (images, fine, fine // 5)
    names = {
        b"fine_label_names": [f"fine{n}".encode() for n in range(100)],
        b"coarse_label_names": [f"coarse{n}".encode() for n in range(20)],
    }
    (folder / "meta").write_bytes(python2_pickle(names))
    return written


def python2_pickle(value: Any) -> bytes:
    """Protocol 2 as Python 2 wrote it: text and array contents are byte strings."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    if isinstance(value, bytes):
        short = len(value) < 256
        return (
            b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<I", len(value))
        ) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_opcodes, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_opcodes(k) + _opcodes(v) for k, v in value.items()) + b"u"
    rows, columns = value.shape
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + 2 * b"J\xff\xff\xff\xff"
    shape = _opcodes(rows) + _opcodes(columns) + b"\x86"
    state = b"(K\x01" + shape + kind + b"K\x00tb" + b"\x89" + _opcodes(value.tobytes()) + b"tb"
    return empty + state


# idx


def idx(path: Path, values: Pixels) -> None:
    """`.gz` is compressed."""
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    data = header + values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def fashion_mnist(folder: Path, count: int = 40, suffix: str = "") -> tuple[Written, Written]:
    splits = []
    for seed, name in enumerate(("train", "t10k")):
        images, labels = noise(count, 28, 28, seed, channels=1), labels_of(count, 10)
        idx(folder / f"{name}-images-idx3-ubyte{suffix}", images)
        idx(folder / f"{name}-labels-idx1-ubyte{suffix}", labels.astype(np.uint8))
        splits.append((images, labels))
    return splits[0], splits[1]


# Image files


def png(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def jpeg(path: Path, pixels: Pixels) -> Pixels:
    """Returns what the file decodes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG", quality=90)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def mnist_m(folder: Path, count: int = 40) -> tuple[Written, Written]:
    splits = []
    for seed, name in enumerate(("train", "test")):
        images, labels = noise(count, 32, 32, 10 + seed), labels_of(count, 10)
        lines = []
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            png(folder / f"mnist_m_{name}" / f"{number:08d}.png", image)
            lines.append(f"{number:08d}.png {label}\n")
        (folder / f"mnist_m_{name}_labels.txt").write_text("".join(lines))
        splits.append((images, labels))
    return splits[0], splits[1]


def class_folders(
    folder: Path, splits: Sequence[str], classes: Sequence[str], per_class: int, side: int
) -> dict[str, Written]:
    """SPLIT/CLASS/NUMBER.png; `side` < 0 makes grey images."""
    written = {}
    for seed, split in enumerate(splits):
        count = per_class * len(classes)
        images = noise(count, abs(side), abs(side), 20 + seed, 3 if side > 0 else 1)
        labels = np.repeat(np.arange(len(classes)), per_class)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            png(folder / split / classes[label] / f"{number:04d}.png", image)
        written[split] = (images, labels)
    return written


CINIC = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
EMOTIONS = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]


def four(home: Path, per_class: int = 4) -> None:
    mnist_m(home / "mnist_m" / "mnist_m", per_class * 10)
    fashion_mnist(home / "fashion_mnist", per_class * 10, ".gz")
    splits = ("train", "valid", "test")
    class_folders(home / "cinic10", splits, CINIC, per_class, 32)
    class_folders(home / "mmafedb" / "MMAFEDB", splits, EMOTIONS, per_class, -48)


def tinyimagenet(folder: Path, ids: Sequence[str], per_class: int = 4) -> dict[str, Written]:
    folder.mkdir(parents=True, exist_ok=True)
    count = per_class * len(ids)
    pixels, test = [], []
    labels = np.repeat(np.arange(len(ids)), per_class)
    for number, (image, label) in enumerate(zip(noise(count, 64, 64, 1), labels, strict=True)):
        wnid = ids[label]
        name = f"{wnid}_{number % per_class}.JPEG"
        pixels.append(jpeg(folder / "train" / wnid / "images" / name, image))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{name}\t0\t0\t62\t62\n")
    lines = []
    for number, image in enumerate(noise(len(ids), 64, 64, 2)):
        test.append(jpeg(folder / "val" / "images" / f"val_{number}.JPEG", image))
        lines.append(f"val_{number}.JPEG\t{ids[number]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in ids))
    words = "".join(f"{wnid}\tword{n}, other{n}\n" for n, wnid in enumerate(ids))
    (folder / "words.txt").write_text("n00000000\tnothing\n" + words)
    return {"train": (np.stack(pixels), labels), "test": (np.stack(test), np.arange(len(ids)))}


def imagenet_lt(root: Path, images: Path, times: int = 1) -> dict[str, Written]:
    """Three classes of 5, 3 and 2 training images, one validation and two test images each; or
    some times as many.
    """
    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, (split, counts) in enumerate(
        {"train": (5, 3, 2), "val": (1, 1, 1), "test": (2, 2, 2)}.items()
    ):
        labels = np.repeat(np.arange(3), np.multiply(counts, times))
        pixels = noise(len(labels), 40, 30, seed)
        lines, squares = [], []
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            folder = "val" if split == "test" else "train"
            path = f"{folder}/n0{label}/{split}_{number}.JPEG"
            png(images / path.replace(".JPEG", ".png"), image)
            (images / path.replace(".JPEG", ".png")).rename(images / path)  # lossless inside
            resized = Image.fromarray(image).resize((24, 32), Image.Resampling.BILINEAR)
            squares.append(np.asarray(resized.crop((0, 4, 24, 28))))
            lines.append(f"{path} {label}\n")
        (root / f"ImageNet_LT_{split}.txt").write_text("".join(lines))
        written[split] = (np.stack(squares), labels)
    return written


# Hugging Face


def saved_to_disk(folder: Path, count: int, side: int) -> Written:
    """One data set of two classes in turn, as the library writes it."""
    import datasets

    datasets.disable_progress_bars()
    images, labels = noise(count, side, side, 8), labels_of(count, 2)
    columns = {"image": [Image.fromarray(each) for each in images], "label": labels.tolist()}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    table.save_to_disk(folder)
    return images, labels
