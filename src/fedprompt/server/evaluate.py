"""The global model on a pooled split: the server's prompts and head, a class mask per domain.

The server chooses the prompts of every image and cuts the splits into pieces; the workers, which
have nothing to train meanwhile, measure the pieces from the cached tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from fedprompt.client.module import load_head, own_prompts, tuned_tensors
from fedprompt.client.recipe import LocalRecipe, has_global_model
from fedprompt.client.worker import ClientWorker
from fedprompt.core.types import Broadcast, ServerState, Tensors, Travelling
from fedprompt.data.prefix.tables import CHUNK, FeatureTable
from fedprompt.models.backbone import Backbone
from fedprompt.models.head import build_head
from fedprompt.models.selection import select_rows
from fedprompt.server.personalised import ClientFigures


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures of one split."""

    accuracy: float
    loss: float
    """Mean cross-entropy."""
    balanced_accuracy: float = math.nan
    """Mean of the classes' accuracies."""
    class_accuracy: tuple[float, ...] = ()
    """Per class; NaN for a class without images in the split."""
    clients: ClientFigures | None = None
    """Every client's own model on its own share of the split, where that was asked for."""


@dataclasses.dataclass(frozen=True)
class Model:
    """What an image is classified with: the server's tensors, or those of one client."""

    broadcast: Broadcast
    own: Tensors = dataclasses.field(default_factory=dict)
    """The client's own state; empty for the global model."""


@dataclasses.dataclass(frozen=True)
class Piece(Travelling):
    """At most `CHUNK` images of a split. Written by the server, read by a worker."""

    split: int
    """Which of the worker's splits."""
    index: NDArray[np.int64]
    """(B,) rows of the split."""
    rows: Tensor
    """(B, k) rows of the pool for each image."""


@dataclasses.dataclass(frozen=True)
class Tally(Travelling):
    """What a worker found in a piece."""

    loss: float
    """Mean cross-entropy."""
    predicted: Tensor
    """(B,) int64 classes."""


class PieceMap(Protocol):
    """What an evaluation needs of a runtime."""

    def measure(
        self, recipe: LocalRecipe, model: Broadcast, pieces: Sequence[Piece]
    ) -> Callable[[], list[Tally]]:
        """Begin to measure the pieces; what it returns waits for the tallies, in their order."""
        ...


def evaluate(
    runtime: PieceMap, state: ServerState, recipe: LocalRecipe, tables: Sequence[FeatureTable]
) -> Callable[[], list[Evaluation]]:
    """Begin to measure accuracy and loss of the global model on each split.

    Args:
        runtime: measures the pieces; its workers have the same splits.
        state: the server's prompts, keys and shared tensors.
        recipe: selection, head and tuning.
        tables: the splits.

    Returns:
        A function that waits for the figures; they are NaN where there is no global model.
    """
    if not has_global_model(recipe.prompts, recipe.head):
        return lambda: [Evaluation(math.nan, math.nan) for _ in tables]
    pieces = [
        piece for split, table in enumerate(tables) for piece in cut(split, state, recipe, table)
    ]
    tallies = runtime.measure(recipe, state.broadcast(), pieces)

    def wait() -> list[Evaluation]:
        measured = list(zip(pieces, tallies(), strict=True))
        return [
            summarise(
                [pair for pair in measured if pair[0].split == split], table, recipe.num_classes
            )
            for split, table in enumerate(tables)
        ]

    return wait


def summarise(
    measured: Sequence[tuple[Piece, Tally]], table: FeatureTable, num_classes: int
) -> Evaluation:
    """The figures of one split from those of its pieces."""
    accuracy = MulticlassAccuracy(num_classes, average="micro")
    by_class = MulticlassAccuracy(num_classes, average="none")
    loss = MeanMetric()
    for piece, tally in measured:
        labels = torch.from_numpy(table.labels[piece.index])
        accuracy.update(tally.predicted, labels)
        by_class.update(tally.predicted, labels)
        loss.update(tally.loss, weight=len(labels))
    present = np.bincount(table.labels, minlength=num_classes) > 0
    per_class = np.where(present, by_class.compute().numpy().astype(float), np.nan)
    return Evaluation(
        float(accuracy.compute()),
        float(loss.compute()),
        float(np.nanmean(per_class)),
        tuple(per_class.tolist()),
    )


def cut(split: int, state: ServerState, recipe: LocalRecipe, table: FeatureTable) -> list[Piece]:
    """A split in pieces.

    Prompts are selected by the rule of training, for `prompts.eval_batch` images of one domain in
    the order of the split; a piece then holds `CHUNK` images, each with its own prompts.
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
    everything = np.arange(len(table), dtype=np.int64)
    return select_for(Model(state.broadcast()), recipe, table, everything)


def select_for(
    model: Model, recipe: LocalRecipe, table: FeatureTable, images: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Tensor]:
    """The prompts of some images: as `select_for_split`, of a model and the images' indices."""
    prompts, keys = own_prompts(recipe, model.broadcast, model.own), model.broadcast.keys
    projection = model.broadcast.shared.get("query_projection")
    all_queries = table.queries(recipe.prompts.query_kind)
    order = images[np.argsort(table.groups[images], kind="stable")]
    chosen = []
    for group in np.unique(table.groups[images]):
        members = order[table.groups[order] == group]
        for start in range(0, len(members), recipe.prompts.eval_batch):
            batch = members[start : start + recipe.prompts.eval_batch]
            queries = torch.from_numpy(all_queries[batch])
            rows, _ = select_rows(recipe.prompts, queries, prompts, keys, projection)
            chosen.append(rows.expand(len(batch), -1))
    return order, torch.cat(chosen)


def measure_piece(
    worker: ClientWorker, recipe: LocalRecipe, model: Broadcast, piece: Piece
) -> Tally:
    """One piece on one worker.

    Args:
        worker: has the backbone and the splits.
        recipe: head and tuning.
        model: the prompts and the other tensors of the global model.
        piece: which images, with which prompts.
    """
    predictions = predict(
        Model(model),
        recipe,
        worker.backbone,
        worker.splits[piece.split],
        piece.index,
        piece.rows,
        worker.data.class_mask,
        worker.device,
    )
    ((logits, labels),) = predictions  # a piece is no larger than a chunk
    return Tally(float(F.cross_entropy(logits, labels)), logits.argmax(dim=1).cpu())


@torch.no_grad()
def predict(
    model: Model,
    recipe: LocalRecipe,
    backbone: Backbone,
    table: FeatureTable,
    order: NDArray[np.int64],
    rows: Tensor,
    class_mask: NDArray[np.bool_],
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, classes) and labels (B,) of some images, `CHUNK` at a time.

    Args:
        model: with what to classify.
        recipe: head and tuning.
        backbone: the frozen network on `device`.
        table: the split.
        order: (k,) which images, in this order.
        rows: (k, p) each image's rows of the prompts.
        class_mask: (groups, classes); other classes of an image's domain get minus infinity.
        device: where to compute.
    """
    head = build_head(recipe.head, backbone.feature_dim, recipe.num_classes, torch.Generator())
    load_head(head, model.broadcast, model.own)
    head.to(device).eval()
    tuning = recipe.build_tuning()
    tuned = {
        name: value.to(device) for name, value in tuned_tensors(model.broadcast.shared).items()
    }
    prompts = own_prompts(recipe, model.broadcast, model.own).to(device)
    mask = torch.from_numpy(class_mask).to(device)
    for start in range(0, len(order), CHUNK):
        index = order[start : start + CHUNK]
        if recipe.needs_tokens:
            chosen = prompts[rows[start : start + CHUNK].to(device)]
            features = tuning.encode(backbone, tuned, table.tokens_at(index).to(device), chosen)
        else:
            features = torch.from_numpy(table.features[index]).to(device)
        groups = torch.from_numpy(table.groups[index]).to(device)
        logits = head(features).masked_fill(~mask[groups], -torch.inf)
        yield logits, torch.from_numpy(table.labels[index]).to(device)
