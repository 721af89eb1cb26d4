"""Pickles of published data are read; whatever else a pickle asks for is refused and not done."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import noise, python2_pickle

from fedprompt.core.errors import InputError
from fedprompt.data.reading.unpickling import as_texts, read_pickle


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def written(folder: Path, content: Any, protocol: int = 2) -> Path:
    path = folder / "batch"
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
    path.write_bytes(data)
    return path


def test_a_python_2_pickle(tmp_path: Path) -> None:
    array = noise(4, 6, 1, 0, channels=1)[:, :, 0]
    content = python2_pickle({b"data": array, b"labels": [3, 1], b"names": [b"cat", b"dog"]})
    # What is written here is a pickle that NumPy itself reads as the array.
    np.testing.assert_array_equal(pickle.loads(content, encoding="bytes")[b"data"], array)
    read = read_pickle(written(tmp_path, content))
    np.testing.assert_array_equal(read["data"], array)
    assert read["labels"] == [3, 1] and as_texts(read["names"]) == ("cat", "dog")


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_python_3_pickle(tmp_path: Path, protocol: int) -> None:
    array = noise(4, 6, 1, 1, channels=1)[:, :, 0]
    content = {"data": array, "labels": [3, 1], "names": ["cat"]}
    read = read_pickle(written(tmp_path, content, protocol))
    np.testing.assert_array_equal(read["data"], array)
    assert as_texts(read["names"]) == ("cat",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "function",
    [os.system, os.mkdir, eval, exec, getattr, open, pickle.loads, np.load, np.fromfile],
    ids=lambda function: function.__name__,
)
def test_a_call_is_refused_and_not_made(tmp_path: Path, protocol: int, function: Any) -> None:
    marker = tmp_path / "marker"
    argument = f"mkdir {marker}" if function is os.system else str(marker)
    path = written(tmp_path, {"data": [Call(function, argument)]}, protocol)
    with pytest.raises(InputError, match=r"^[^\n]*batch: .*it asks for .*which no data set needs"):
        read_pickle(path)
    assert not marker.exists()


def test_the_allowed_names_give_no_way_in(tmp_path: Path) -> None:
    for attack in (
        b"\x80\x02cnumpy\nndarray.__init__\n.",
        b"\x80\x02cnumpy.core.multiarray\nscalar\n.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__class__\x93.",
        # A state for a class itself, and attributes for what stands for a function.
        b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}U\x08__init__K\x01s\x86b.",
        b"\x80\x02P1\n.",
        b"(lp0\nI1\naPpersistent\n.",
    ):
        with pytest.raises(InputError, match="expected a pickled dictionary"):
            read_pickle(written(tmp_path, attack))
    array = noise(2, 3, 1, 2, channels=1)[:, :, 0]
    read = read_pickle(written(tmp_path, python2_pickle({b"data": array})))
    np.testing.assert_array_equal(read["data"], array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Ran out of input"),
        (b"hello", "got something else"),
        (pickle.dumps([1], 2), "a list instead of a dictionary"),
        (pickle.dumps({"data": np.zeros((2, 2))}, 4), "another type than unsigned bytes"),
        (pickle.dumps({"data": np.array([{}])}, 4), "another type than unsigned bytes"),
        (pickle.dumps({"data": np.zeros((2, 3), np.uint8, "F")}, 4), "row by row"),
        (python2_pickle({b"data": noise(4, 6, 1, 0, 1)[:, :, 0]})[:-20], "got something else"),
    ],
)
def test_damaged_or_other_pickles(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"^[^\n]*batch: [^\n]*{message}"):
        read_pickle(written(tmp_path, content))


def test_an_array_with_fewer_bytes_than_its_shape(tmp_path: Path) -> None:
    content = python2_pickle({b"data": noise(4, 6, 1, 0, 1)[:, :, 0]})
    short = content.replace(b"J\x06\x00\x00\x00", b"J\x07\x00\x00\x00")
    assert short != content
    with pytest.raises(InputError, match="cannot reshape array"):
        read_pickle(written(tmp_path, short))
