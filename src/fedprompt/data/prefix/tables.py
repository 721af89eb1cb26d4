"""The frozen prefix, computed once: what every training step would otherwise compute again.

Without augmentation, everything below the prompts is a constant of the image. A `FeatureTable`
holds those constants of one split: the tokens that the prompts join, the queries by which prompts
are selected, and the features without prompts. `data.prefix.cache` keeps tables on disk between
runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.task import Split

CHUNK = 256
"""Images that are computed at a time."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""How tokens may be kept, by name."""

ARRAYS = ("tokens", "style", "cls", "features", "labels", "groups")
"""The arrays of a table, in the order of its fields."""


class Encoder(Protocol):
    """What this module needs of a backbone; see `models.backbone.Backbone`."""

    cut: int
    """The block before which prompts enter."""

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, S, S) float."""
        ...

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, T, d)."""
        ...

    def constants(self, tokens: Tensor) -> Mapping[str, Tensor]:
        """(B, T, d) -> `tokens` (B, T, d), `style` (B, q), `cls` (B, q) and `features` (B, f)."""
        ...

    def checksum(self) -> str:
        """SHA-256 over the weights."""
        ...


@dataclasses.dataclass(frozen=True)
class FeatureTable:
    """Constants of the N images of one split: plain arrays, or arrays mapped from a cache entry.

    A table of a cache entry is pickled as the path of its entry, and its derived queries, so that
    all processes of a machine map the same pages; plain arrays Ray shares by itself.
    """

    tokens: NDArray[Any]
    """(N, T, d): what enters block `cut`, CLS first, in the type that `dtype` names; read them with
    `tokens_at`.
    """
    style: NDArray[np.float32]
    """(N, q): the queries of kind `style`; read them with `queries`."""
    cls: NDArray[np.float32]
    """(N, q): the queries of kind `cls`."""
    features: NDArray[np.float32]
    """(N, f): what the network without prompts gives."""
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    dtype: str = "float32"
    """A key of `DTYPES`; NumPy has no bfloat16, whose bits are kept as uint16."""
    cut: int = 0
    """The block that the tokens enter."""
    derived: Mapping[str, NDArray[np.float32]] = dataclasses.field(default_factory=dict)
    """Further kinds of queries, each (N, q), which no cache keeps: see `data.prefix.whitening`."""
    entry: CacheEntry | None = dataclasses.field(default=None, init=False, repr=False)
    """Set by `data.prefix.cache` alone: where the arrays are mapped from. `replace` drops it."""

    def __len__(self) -> int:
        return len(self.labels)

    def tokens_at(self, index: NDArray[np.int64]) -> Tensor:
        """Some rows of the tokens, in fresh memory: (k,) -> (k, T, d) float32."""
        rows = torch.from_numpy(self.tokens[index])
        return (rows.view(torch.bfloat16) if self.dtype == "bfloat16" else rows).float()

    def check_cut(self, cut: int) -> None:
        """Refuse tokens that another block than `cut` would take.

        Raises:
            InputError: names both.
        """
        if self.cut != cut:
            raise InputError(
                f"features: expected a table with the tokens before block {cut}, where the "
                f"backbone takes prompts, got those before block {self.cut}; compute the table "
                "with the same backbone"
            )

    def queries(
        self, kind: str, index: NDArray[np.int64] | slice = slice(None)
    ) -> NDArray[np.float32]:
        """(N, q), or of some rows: by which prompts are selected.

        Args:
            kind: `style`, `cls`, `both` (one after the other), or a kind that was added.
            index: (k,) rows; all by default.
        """
        if kind == "both":
            return np.concatenate([self.style[index], self.cls[index]], axis=1)
        return {"style": self.style, "cls": self.cls, **self.derived}[kind][index]

    def with_queries(self, derived: Mapping[str, NDArray[np.float32]]) -> FeatureTable:
        """The same table, of the same cache entry, with further kinds of queries."""
        table = dataclasses.replace(self, derived={**self.derived, **derived})
        object.__setattr__(table, "entry", self.entry)
        return table

    def loaded(self) -> FeatureTable:
        """The same table as plain arrays, for processes that cannot open its cache entry."""
        arrays = {name: np.asarray(getattr(self, name)) for name in ARRAYS}
        return FeatureTable(**arrays, dtype=self.dtype, cut=self.cut, derived=self.derived)

    def __reduce__(self) -> tuple[Callable[..., FeatureTable], tuple[object, ...]]:
        if self.entry is not None:
            return _reopened, (self.entry.reopen(), self.derived)
        arrays = (getattr(self, name) for name in ARRAYS)
        return FeatureTable, (*arrays, self.dtype, self.cut, self.derived)


def _reopened(
    how: tuple[Callable[..., FeatureTable], tuple[object, ...]],
    derived: Mapping[str, NDArray[np.float32]],
) -> FeatureTable:
    """A table of a cache entry in another process."""
    function, arguments = how
    return function(*arguments).with_queries(derived)


class CacheEntry(Protocol):
    """Where a table is mapped from; see `data.prefix.entries.Entry`."""

    def reopen(self) -> tuple[Callable[..., FeatureTable], tuple[object, ...]]:
        """A function, and its arguments, that opens the table in another process."""
        ...


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Constants of some images in a row, as they are kept."""

    tokens: NDArray[Any]
    style: NDArray[np.float32]
    cls: NDArray[np.float32]
    features: NDArray[np.float32]


@torch.no_grad()
def compute_chunks(
    encoder: Encoder, split: Split, device: torch.device, dtype: str = "float32"
) -> Iterator[Chunk]:
    """Run the frozen parts over a split, `CHUNK` images at a time.

    Queries and features are computed from the tokens before those are rounded to `dtype`, and stay
    float32: they are small, and they decide which prompts an image gets.

    Args:
        encoder: the frozen network.
        split: N images.
        device: where the network is.
        dtype: a key of `DTYPES`, in which tokens are kept.
    """
    if not len(split):
        raise InputError("features: expected a split with at least one image, got an empty one")
    for start in range(0, len(split), CHUNK):
        images = torch.from_numpy(split.images[start : start + CHUNK]).to(device)
        constants = dict(encoder.constants(encoder.embed(encoder.preprocess(images))))
        kept = constants.pop("tokens").to(DTYPES[dtype])
        if dtype == "float16" and not bool(torch.isfinite(kept).all()):
            raise ConfigError(
                f"cache.dtype=float16: a token of images {start} to {start + len(images) - 1} is "
                "too large for this type, or no number; use cache.dtype=bfloat16 or float32"
            )
        yield Chunk(
            tokens=(kept.view(torch.uint16) if dtype == "bfloat16" else kept).cpu().numpy(),
            **{name: each.cpu().numpy() for name, each in constants.items()},
        )


def compute_table(
    encoder: Encoder, split: Split, device: torch.device, dtype: str = "float32"
) -> FeatureTable:
    """A table in memory, in the order of the split.

    Args:
        encoder: a frozen backbone on `device`.
        split: the images.
        device: where to compute.
        dtype: how tokens are kept, a key of `DTYPES`.
    """
    chunks = list(compute_chunks(encoder, split, device, dtype))
    return FeatureTable(
        tokens=np.concatenate([chunk.tokens for chunk in chunks]),
        style=np.concatenate([chunk.style for chunk in chunks]),
        cls=np.concatenate([chunk.cls for chunk in chunks]),
        features=np.concatenate([chunk.features for chunk in chunks]),
        labels=split.labels.astype(np.int64),
        groups=split.groups.astype(np.int64),
        dtype=dtype,
        cut=encoder.cut,
    )
