"""The frozen prefix, computed once: what every training step would otherwise compute again.

Without augmentation, everything below the prompts is a constant of the image. A `FeatureTable`
holds those constants of one split: the embedded tokens, the queries by which prompts are selected,
and the CLS feature without prompts.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.data.task import Split

CHUNK = 256


class Encoder(Protocol):
    """What this module needs of a backbone; see `models.backbone.Backbone`."""

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, S, S) float."""
        ...

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, T, d)."""
        ...

    def encode(self, tokens: Tensor, prompts: Tensor | None = None) -> Tensor:
        """(B, T, d) -> (B, d)."""
        ...

    def queries(self, tokens: Tensor, kind: str) -> Tensor:
        """(B, T, d) -> (B, q)."""
        ...


@dataclasses.dataclass(frozen=True)
class FeatureTable:
    """Constants of the N images of one split; NumPy arrays, which Ray shares without copies."""

    tokens: NDArray[np.float32]
    """(N, T, d): what enters the first block, CLS first."""
    queries: NDArray[np.float32]
    """(N, q): by which prompts are selected."""
    features: NDArray[np.float32]
    """(N, d): the CLS feature of the network without prompts."""
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@torch.no_grad()
def compute_table(encoder: Encoder, split: Split, query: str, device: torch.device) -> FeatureTable:
    """Run the frozen parts over a split, `CHUNK` images at a time.

    Args:
        encoder: a frozen backbone on `device`.
        split: the images.
        query: kind of query, `style` or `cls`.
        device: where to compute.

    Returns:
        A table of float32 arrays in the order of the split.
    """
    tokens, queries, features = [], [], []
    for start in range(0, len(split), CHUNK):
        images = torch.from_numpy(split.images[start : start + CHUNK]).to(device)
        embedded = encoder.embed(encoder.preprocess(images))
        tokens.append(embedded.cpu())
        queries.append(encoder.queries(embedded, query).cpu())
        features.append(encoder.encode(embedded).cpu())
    return FeatureTable(
        tokens=torch.cat(tokens).numpy(),
        queries=torch.cat(queries).numpy(),
        features=torch.cat(features).numpy(),
        labels=split.labels.astype(np.int64),
        groups=split.groups.astype(np.int64),
    )
