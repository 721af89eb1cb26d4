"""One evaluation: the global model on pooled splits, and each client's own model on its own share.

The server says which model is measured on which images and chooses the prompts of every image; cut
into pieces, this goes to the workers, which have nothing to train meanwhile. A client's model is
what the server would send it, and what it keeps for itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.client.recipe import LocalRecipe
from fedprompt.client.worker import ClientWorker
from fedprompt.core.travelling import Travelling
from fedprompt.core.types import Broadcast, Parts, ServerState
from fedprompt.data.prefix.tables import CHUNK, FeatureTable
from fedprompt.models.backbone import Backbone
from fedprompt.models.prompted import PromptedNetwork
from fedprompt.models.selection import PromptOptions, rows_of_query, select_rows
from fedprompt.server.figures import Evaluation, Measured, over_clients, over_images
from fedprompt.server.mixing import chunks, firsts, mix, mixed

Rows = NDArray[np.int64]
"""Rows of a table."""


@dataclasses.dataclass(frozen=True)
class Model:
    """What an image is classified with: the server's tensors, or those of one client."""

    broadcast: Broadcast
    own: Parts = dataclasses.field(default_factory=Parts)
    """What the client keeps; empty for the global model."""
    keys: Tensor | None = None
    """(n, q) the keys themselves, where discriminants are broadcast; a soft choice needs them."""

    @property
    def addresses(self) -> Tensor:
        """(n, q) the keys themselves."""
        return self.broadcast.keys if self.keys is None else self.keys

    @property
    def parts(self) -> Parts:
        """The model's tensors."""
        return self.broadcast.model(self.own)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and the images of a split on which it is measured."""

    model: Model
    split: int
    """Which of the splits."""
    images: Rows
    """(k,) of the split."""
    client: int | None = None
    """Whose model it is; None for the global one."""
    query: Tensor | None = None
    """(q,) the mean query of the client's training images; with it the model's prompts are chosen
    once, by the nearest keys."""
    alone: bool = False
    """Each image selects its prompts by itself, whatever `prompts.eval_batch` says."""


@dataclasses.dataclass(frozen=True)
class Piece(Travelling):
    """At most `CHUNK` images of a split and the model that classifies them. Written by the server,
    read by a worker.
    """

    broadcast: Broadcast
    own: Parts
    """With the broadcast, the model."""
    split: int
    """Which of the worker's splits."""
    index: Rows
    """(B,) rows of the split."""
    rows: Tensor
    """(B, k) rows of the prompts for each image."""
    shares: Tensor | None = None
    """(B,) with a soft choice, in which an image may stand in several places, one after the other:
    how much each of them counts. The shares of an image add up to 1."""

    @property
    def images(self) -> Rows:
        """Each image once."""
        return self.index[firsts(self.index)]


@dataclasses.dataclass(frozen=True)
class Tally(Travelling):
    """What a worker found in a piece."""

    loss: float
    """Mean cross-entropy."""
    predicted: Tensor
    """(B,) int64 classes."""


class PieceMap(Protocol):
    """What an evaluation needs of a runtime."""

    def measure(self, recipe: LocalRecipe, pieces: Sequence[Piece]) -> Callable[[], list[Tally]]:
        """Begin to measure the pieces; what it returns waits for the tallies, in their order."""
        ...


def evaluate(
    runtime: PieceMap,
    recipe: LocalRecipe,
    tables: Sequence[FeatureTable],
    subjects: Sequence[Subject],
) -> Callable[[], list[Evaluation]]:
    """Begin to measure some models.

    Args:
        runtime: measures the pieces; its workers have the same splits.
        recipe: selection, head and tuning.
        tables: the splits.
        subjects: which models on which images; the global one on all images of a split.

    Returns:
        A function that waits for the figures of each split.
    """
    cuts = [(subject, cut(subject, recipe, tables[subject.split])) for subject in subjects]
    pieces = [piece for _, own in cuts for piece in own]
    waiting = runtime.measure(recipe, pieces) if pieces else list

    def wait() -> list[Evaluation]:
        tallies = iter(waiting())
        measured = [
            (subject, [_measured(piece, next(tallies), tables) for piece in own])
            for subject, own in cuts
        ]
        return [
            summarise([pair for pair in measured if pair[0].split == split], recipe.num_classes)
            for split in range(len(tables))
        ]

    return wait


def summarise(
    measured: Sequence[tuple[Subject, Sequence[Measured]]], num_classes: int
) -> Evaluation:
    """The figures of one split.

    Args:
        measured: what was measured on it, and what was found.
        num_classes: over all domains.
    """
    common = {s.alone: pieces for s, pieces in measured if s.client is None}
    clients = {s.client: pieces for s, pieces in measured if s.client is not None}
    figures = over_images(common[False], num_classes) if False in common else Evaluation()
    if True in common:
        alone = over_images(common[True], num_classes).accuracy
        figures = dataclasses.replace(figures, alone_accuracy=alone)
    return dataclasses.replace(figures, clients=over_clients(clients)) if clients else figures


def _measured(piece: Piece, tally: Tally, tables: Sequence[FeatureTable]) -> Measured:
    table, images = tables[piece.split], piece.images
    labels, groups = table.labels[images], table.groups[images]
    return Measured(labels, tally.predicted, tally.loss, groups, images)


def global_subjects(
    broadcast: Broadcast,
    tables: Sequence[FeatureTable],
    keys: Tensor | None = None,
    alone: bool = False,
) -> list[Subject]:
    """The global model on all images of each split.

    Args:
        broadcast: the server's tensors.
        tables: the splits.
        keys: (n, q) of the prompts, if discriminants are broadcast instead.
        alone: whether each image selects its prompts by itself.
    """
    model = Model(broadcast, keys=keys)
    return [
        Subject(model, split, np.arange(len(table), dtype=np.int64), alone=alone)
        for split, table in enumerate(tables)
    ]


def cut(subject: Subject, recipe: LocalRecipe, table: FeatureTable) -> list[Piece]:
    """A model's images in pieces, each image with its own prompts.

    Prompts are selected by the rule of training: once for a client that chooses by its mean query,
    otherwise for `prompts.eval_batch` images of one domain in the order of the split, or for each
    image by itself.

    Args:
        subject: the model and the images.
        recipe: the rule.
        table: the split.
    """
    model, order = subject.model, subject.images
    shares: Tensor | None = None
    together = 1 if subject.alone else recipe.prompts.eval_batch
    if subject.query is not None:
        chosen = rows_of_query(recipe.prompts, subject.query, model.broadcast.keys)
        rows = chosen.expand(len(order), -1)
    elif recipe.prompts.choice == "soft" and recipe.prompts.tells_spread:
        batches = batches_of(recipe.prompts, table, order, together)
        keys, count = model.addresses, recipe.prompts.count
        order, rows, shares = mix(batches, keys, model.broadcast.keys, count)
    else:
        order, rows = select_for(model, recipe, table, order, together)
    return [
        Piece(
            model.broadcast,
            model.own,
            subject.split,
            order[part],
            rows[part].clone(),
            None if shares is None else shares[part].clone(),
        )
        for part in chunks(order)
    ]


def select_for_split(
    state: ServerState, recipe: LocalRecipe, table: FeatureTable
) -> tuple[Rows, Tensor]:
    """The global model's prompts of every image of a split; see `select_for`.

    Args:
        state: the server's prompts and keys.
        recipe: the rule of selection.
        table: the images of the split.
    """
    everything = np.arange(len(table), dtype=np.int64)
    together = recipe.prompts.eval_batch
    model = Model(state.broadcast(), keys=state.keys)
    return select_for(model, recipe, table, everything, together)


def select_for(
    model: Model, recipe: LocalRecipe, table: FeatureTable, images: Rows, together: int
) -> tuple[Rows, Tensor]:
    """A model's prompts for some images.

    Args:
        model: whose prompts.
        recipe: the rule.
        table: the split.
        images: (k,) rows of the split.
        together: images of one domain that share a selection.

    Returns:
        The images domain by domain (k,), and for each in that order its rows of the prompts (k, n).
    """
    parts, keys = model.parts, model.broadcast.keys
    prompts = model.broadcast.prompts if parts.prompts is None else parts.prompts
    order, chosen = [], []
    for batch, queries in batches_of(recipe.prompts, table, images, together):
        rows, _ = select_rows(recipe.prompts, queries, prompts, keys, parts.query_projection)
        order.append(batch)
        chosen.append(rows.expand(len(batch), -1))
    return np.concatenate(order), torch.cat(chosen)


def batches_of(
    options: PromptOptions, table: FeatureTable, images: Rows, together: int
) -> Iterator[tuple[Rows, Tensor]]:
    """The images that select together: some of one domain in the order of the split.

    Args:
        options: says by which queries.
        table: the split.
        images: (k,) rows of the split.
        together: how many.

    Yields:
        Rows of the split (B,), and their queries (B, q).
    """
    all_queries = table.queries(options.query_kind)
    for group in np.unique(table.groups[images]):
        members = images[table.groups[images] == group]
        for start in range(0, len(members), together):
            batch = members[start : start + together]
            yield batch, torch.from_numpy(all_queries[batch])


def measure_piece(worker: ClientWorker, recipe: LocalRecipe, piece: Piece) -> Tally:
    """One piece on one worker.

    Args:
        worker: has the backbone and the splits.
        recipe: head and tuning.
        piece: which images, with which model and prompts.
    """
    model = Model(piece.broadcast, piece.own)
    network = network_of(model, recipe, worker.backbone, worker.data.class_mask, worker.device)
    logits, labels = classify_piece(piece, network, worker.splits[piece.split])
    return Tally(float(F.cross_entropy(logits, labels)), logits.argmax(dim=1).cpu())


def classify_piece(
    piece: Piece, network: PromptedNetwork, table: FeatureTable
) -> tuple[Tensor, Tensor]:
    """Logits (B, classes) and labels (B,) of the images of a piece, each image once.

    Args:
        piece: which images, with which prompts.
        network: of the piece's model, see `network_of`.
        table: the split.
    """
    # A piece is no larger than a chunk.
    ((logits, labels),) = classified(network, table, piece.index, piece.rows)
    if piece.shares is not None:
        places = torch.from_numpy(firsts(piece.index)).to(logits.device)
        logits, labels = mixed(logits, piece.shares.to(logits.device), places), labels[places]
    return logits, labels


def predict(
    model: Model,
    recipe: LocalRecipe,
    backbone: Backbone,
    table: FeatureTable,
    order: Rows,
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
    yield from classified(
        network_of(model, recipe, backbone, class_mask, device), table, order, rows
    )


def network_of(
    model: Model,
    recipe: LocalRecipe,
    backbone: Backbone,
    class_mask: NDArray[np.bool_],
    device: torch.device,
) -> PromptedNetwork:
    """The network of a model, ready to classify.

    Args:
        model: its tensors.
        recipe: head and tuning.
        backbone: the frozen network on `device`.
        class_mask: (groups, classes)
        device: where to compute.
    """
    keys, nobody = model.broadcast.keys, torch.Generator()
    network = PromptedNetwork(recipe, backbone, model.parts, keys, class_mask, nobody)
    return network.to(device).eval()


@torch.no_grad()
def classified(
    network: PromptedNetwork, table: FeatureTable, order: Rows, rows: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, classes) and labels (B,) of some images, `CHUNK` at a time.

    Args:
        network: from `network_of`.
        table: the split.
        order: (k,) which images, in this order.
        rows: (k, p) each image's rows of the prompts.
    """
    device, needs_tokens = network.class_mask.device, network.recipe.needs_tokens
    if needs_tokens:
        table.check_cut(network.backbone.cut)
    for start in range(0, len(order), CHUNK):
        index = order[start : start + CHUNK]
        inputs = table.tokens_at(index) if needs_tokens else torch.from_numpy(table.features[index])
        groups = torch.from_numpy(table.groups[index]).to(device)
        logits = network(inputs.to(device), rows[start : start + CHUNK].to(device), groups)
        yield logits, torch.from_numpy(table.labels[index]).to(device)
