"""How tensors are pickled on their way between processes: as arrays."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Travelling:
    """A dataclass that is pickled with its tensors as arrays; torch's own way takes ten times as
    long, which is most of what a task costs beside its work. What arrives shares no memory.
    """

    def __reduce__(self) -> tuple[object, ...]:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return _arrive, (type(self), {name: _packed(getattr(self, name)) for name in names})


class _Packed(NamedTuple):
    """A tensor on its way."""

    array: NDArray[np.generic]


def _packed(value: object) -> object:
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.requires_grad:
        return value
    # NumPy does not know bfloat16.
    return value if value.dtype == torch.bfloat16 else _Packed(value.numpy())


def _unpacked(value: object) -> object:
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in value.items()}
    # Copied: what comes out of Ray's object store may not be written to.
    return torch.from_numpy(value.array.copy()) if isinstance(value, _Packed) else value


def _arrive(kind: type[object], fields: dict[str, object]) -> object:
    return kind(**{name: _unpacked(value) for name, value in fields.items()})
