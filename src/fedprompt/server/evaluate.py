"""The global model on a pooled split: the server's prompts and head, a class mask per domain.

The server chooses the prompts of every image and cuts the splits into pieces; the workers, which
have nothing to train meanwhile, measure the pieces from the cached tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.aggregation import MeanMetric, SumMetric

from fedprompt.client.module import load_head
from fedprompt.client.recipe import LocalRecipe
from fedprompt.client.train import ClientWorker
from fedprompt.data.tables import CHUNK, FeatureTable
from fedprompt.models.head import build_head
from fedprompt.models.prompted_vit import select_rows
from fedprompt.types import Broadcast, ServerState


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures of one split."""

    accuracy: float
    loss: float
    """Mean cross-entropy."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """At most `CHUNK` images of a split. Written by the server, read by a worker."""

    split: int
    """Which of the worker's splits."""
    index: NDArray[np.int64]
    """(B,) rows of the split."""
    rows: Tensor
    """(B, k) rows of the pool for each image."""


@dataclasses.dataclass(frozen=True)
class Tally:
    """What a worker found in a piece."""

    loss: float
    """Mean cross-entropy."""
    correct: int
    count: int


class PieceMap(Protocol):
    """What an evaluation needs of a runtime."""

    def measure(
        self, recipe: LocalRecipe, model: Broadcast, pieces: Sequence[Piece]
    ) -> list[Tally]:
        """Measure the pieces; the tallies come in their order."""
        ...


def evaluate(
    runtime: PieceMap, state: ServerState, recipe: LocalRecipe, tables: Sequence[FeatureTable]
) -> list[Evaluation]:
    """Accuracy and loss of the global model on each split.

    Args:
        runtime: measures the pieces; its workers have the same splits.
        state: the server's prompts, keys and shared tensors.
        recipe: selection and head.
        tables: the splits.
    """
    pieces = [
        piece for split, table in enumerate(tables) for piece in cut(split, state, recipe, table)
    ]
    tallies = runtime.measure(recipe, state.broadcast(), pieces)
    results = []
    for split in range(len(tables)):
        loss, correct, count = MeanMetric(), SumMetric(), SumMetric()
        for piece, tally in zip(pieces, tallies, strict=True):
            if piece.split == split:
                loss.update(tally.loss, weight=tally.count)
                correct.update(tally.correct)
                count.update(tally.count)
        accuracy = correct.compute() / count.compute()
        results.append(Evaluation(float(accuracy), float(loss.compute())))
    return results


def cut(split: int, state: ServerState, recipe: LocalRecipe, table: FeatureTable) -> list[Piece]:
    """A split in pieces.

    Prompts are selected as in training, for `prompts.eval_batch` images of one domain in the order
    of the split; a piece then holds `CHUNK` images, each with its own prompts.
    """
    order, rows = select_for_split(state, recipe, table)
    return [
        Piece(split, order[start : start + CHUNK], rows[start : start + CHUNK].clone())
        for start in range(0, len(order), CHUNK)
    ]


def select_for_split(
    state: ServerState, recipe: LocalRecipe, table: FeatureTable
) -> tuple[NDArray[np.int64], Tensor]:
    """The prompts of every image of a split.

    Returns:
        The images' order, domain by domain (N,), and for each image in that order its rows of the
        pool (N, k).
    """
    order = np.argsort(table.groups, kind="stable")
    projection = state.shared.get("query_projection")
    chosen = []
    for group in np.unique(table.groups):
        members = order[table.groups[order] == group]
        for start in range(0, len(members), recipe.prompts.eval_batch):
            batch = members[start : start + recipe.prompts.eval_batch]
            queries = torch.from_numpy(table.queries[batch])
            rows, _ = select_rows(recipe.prompts, queries, state.prompts, state.keys, projection)
            chosen.append(rows.expand(len(batch), -1))
    return order, torch.cat(chosen)


@torch.no_grad()
def measure_piece(
    worker: ClientWorker, recipe: LocalRecipe, model: Broadcast, piece: Piece
) -> Tally:
    """One piece on one worker.

    Args:
        worker: has the backbone and the splits.
        recipe: the head.
        model: the prompts and the head's tensors.
        piece: which images, with which prompts. An image is classified among the classes of its
            domain.
    """
    device, table = worker.device, worker.splits[piece.split]
    head = build_head(
        recipe.head, worker.backbone.feature_dim, recipe.num_classes, torch.Generator()
    )
    load_head(head, model)
    head.to(device).eval()
    if recipe.prompts.count:
        inputs = table.tokens_at(piece.index).to(device)
        prompts = model.prompts.to(device)[piece.rows.to(device)]
        features = worker.backbone.encode(inputs, prompts)
    else:
        features = torch.from_numpy(table.features[piece.index]).to(device)
    labels = torch.from_numpy(table.labels[piece.index]).to(device)
    groups = torch.from_numpy(table.groups[piece.index]).to(device)
    mask = torch.from_numpy(worker.data.class_mask).to(device)
    logits = head(features).masked_fill(~mask[groups], -torch.inf)
    return Tally(
        loss=float(F.cross_entropy(logits, labels)),
        correct=int((logits.argmax(dim=1) == labels).sum()),
        count=len(piece.index),
    )
