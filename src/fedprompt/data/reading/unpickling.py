"""Read a pickle of dicts, lists, text, numbers and byte arrays without running what is in it.

A pickle names functions and has them called. Here the three names behind a NumPy array stand for
classes of this file that only write down what they are given, and every other name is refused; the
array is then built from the bytes after its shape and type have been checked. NumPy's own code
never sees the pickle.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.core.errors import InputError


class _Type:
    """Stands for `numpy.dtype`."""

    def __init__(self, code: object = None, *_: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: object) -> None:
        pass  # byte order and padding: a byte has none


class _Array:
    """Stands for `numpy.ndarray`, and for the function that makes an empty one."""

    state: Any = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def decoded(self) -> NDArray[np.uint8]:
        _, shape, kind, fortran, data = self.state
        if not isinstance(kind, _Type) or kind.code not in ("u1", "|u1") or fortran:
            raise ValueError("an array of another type than unsigned bytes, row by row")
        return np.frombuffer(data, np.uint8).reshape(shape)


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Array] | type[_Type]:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data set needs")
        return _STAND_INS[module, name]


def read_pickle(path: Path) -> dict[str, Any]:
    """A pickled dictionary, as Python 2 or 3 wrote it; its arrays are of unsigned bytes.

    Args:
        path: the file.

    Returns:
        Names of type `str`; text from Python 2 stays `bytes`.

    Raises:
        InputError: the file is damaged, asks for any function or class but NumPy's arrays, or holds
            no dictionary.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} instead of a dictionary")
        return {
            _text(key): value.decoded() if isinstance(value, _Array) else value
            for key, value in content.items()
        }
    except Exception as error:  # a damaged pickle can raise anything
        message = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: expected a pickled dictionary of lists, text and NumPy arrays of bytes, got "
            f"something else ({message}); get the file again from its publisher"
        ) from error


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def as_texts(values: Iterable[object]) -> tuple[str, ...]:
    """A pickled list of text."""
    return tuple(_text(value) for value in values)
