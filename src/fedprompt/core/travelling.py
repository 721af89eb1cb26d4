"""How tensors are pickled on their way between processes: as arrays."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor


class Travelling:
    """A dataclass that is pickled with its tensors as arrays; torch's own way takes ten times as
    long, which is most of what a task costs beside its work. What arrives shares no memory.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return _arrive, (type(self), {name: _packed(getattr(self, name)) for name in names})


class _Packed(NamedTuple):
    """A tensor on its way."""

    array: NDArray[Any]


def _packed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    plain = isinstance(value, Tensor) and value.device.type == "cpu" and not value.requires_grad
    # NumPy does not know bfloat16.
    return _Packed(value.numpy()) if plain and value.dtype != torch.bfloat16 else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in value.items()}
    # Copied: what comes out of Ray's object store may not be written to.
    return torch.from_numpy(value.array.copy()) if isinstance(value, _Packed) else value


def _arrive(kind: type[Any], fields: dict[str, Any]) -> Any:
    return kind(**{name: _unpacked(value) for name, value in fields.items()})
